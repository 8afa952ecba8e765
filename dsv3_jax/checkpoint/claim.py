"""A folder that one conversion claims: refused if it is another's, resumed if it is its own."""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.folder import CONFIG_FILE, Checkpoint
from dsv3_jax.checkpoint.hf_config import write_json
from dsv3_jax.checkpoint.safetensors_file import SCRATCH_SUFFIX
from dsv3_jax.config import read_json_object
from dsv3_jax.errors import InputError

STATE_FILE = ".dsv3_convert.json"


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one state of a checkpoint folder from another: config, and the files' names, sizes and times."""
    digest = hashlib.sha256((checkpoint.folder / CONFIG_FILE).read_bytes())
    for path in checkpoint.files():
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def claimed_folder(folder: Path, request: dict[str, Any], results: list[str]) -> Iterator[Path]:
    """Makes `folder`, or takes up the one that an interrupted run with the same request has left.

    A state file marks it until the block ends without an exception. After an InputError the folder is removed
    again unless one of `results` is complete in it; after a kill or an interrupt it stays for the next run.

    Args:
        folder: may be absent (its parent not) or empty.
        request: what is being done, a JSON object.
        results: names of the files worth keeping.

    Raises:
        InputError: the folder cannot be written, holds something else, or another process is at work in it.
    """
    state = folder / STATE_FILE
    existed = folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        others = {path.name for path in folder.iterdir()} - {STATE_FILE, STATE_FILE + SCRATCH_SUFFIX}
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or read ({error.strerror})") from error
    if not state.exists():
        if others:
            raise InputError(f"{folder}: is not empty; expected a new folder or an interrupted conversion")
        write_json(state, request)
    elif read_json_object(state) != request:
        raise InputError(f"{folder}: holds part of another conversion; expected a new folder or the same one")
    with state.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder}: another process is converting into it") from error
        try:
            yield folder
        except InputError:
            if not any((folder / name).exists() for name in results):
                state.unlink()
                if not existed:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            raise
        state.unlink()
