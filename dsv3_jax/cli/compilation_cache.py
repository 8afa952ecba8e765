"""The persistent compilation cache: what XLA compiled once is read back by the next process."""

import argparse
import os
from pathlib import Path

from dsv3_jax.errors import InputError


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--compilation-cache DIR` and `--no-compilation-cache`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        type=Path,
        help="folder where compiled programs are kept (default: in the user's cache folder)",
    )
    group.add_argument("--no-compilation-cache", action="store_true", help="compile anew, and keep nothing")


def enable_compilation_cache(args: argparse.Namespace) -> None:
    """Turns JAX's cache on as the arguments say; before anything is compiled.

    JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) stands where no argument is given. A default folder that
    cannot be made is no error: there is just no cache.

    Raises:
        InputError: the folder that was asked for cannot be made.
    """
    import jax

    if args.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = args.compilation_cache
    if folder is None and jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        path = default_folder() if folder is None else folder
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        if folder is not None:
            raise InputError(f"--compilation-cache: {folder} cannot be made ({error})") from error
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs count too: together they are most of the time to the first token of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def default_folder() -> Path:
    """`dsv3-jax/xla` in the user's cache folder (`$XDG_CACHE_HOME`, or `~/.cache`)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dsv3-jax" / "xla"
