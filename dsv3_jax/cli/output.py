"""Output files that are there whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_jax.errors import InputError


def check_output_file(path: Path, flag: str) -> None:
    """Raises InputError, naming `flag`, where `path` could not be written; before any work is done for it."""
    if path.exists() and not path.is_file():
        raise InputError(f"{flag}: {path} is not a regular file; expected a file to write")
    if not path.parent.is_dir():
        raise InputError(
            f"{flag}: {path.parent} is not a folder; expected an existing folder for {path.name}"
        )
    try:
        # Permission bits do not tell of read-only and virtual file systems: trying does.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"{flag}: {path.parent} cannot be written ({error.strerror}); expected a writable folder"
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; it takes its place where the block succeeds."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as UTF-8 JSON, atomically."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
