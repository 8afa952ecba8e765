"""`dsv3 generate` as a process: its compilation cache, ^C, and a reader that goes away."""

import signal
import subprocess
import sys
from pathlib import Path


def start(checkpoint: Path, cache: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dsv3_jax", "generate", "--checkpoint", str(checkpoint), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--compilation-cache", str(cache)], stdin=pipe, stdout=pipe, stderr=pipe
    )


def test_processes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The compilation cache is filled; ^C and a closed pipe end a process without a word."""
    long = ("--prompt", "def", "--ignore-eos")
    with start(tiny_checkpoint, tmp_path / "cache", *long) as process:
        whole, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert any((tmp_path / "cache").iterdir())

    with start(tiny_checkpoint, tmp_path / "cache", *long) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, err) == (130, b"\n")
    assert len(out) < len(whole) - 1

    with start(tiny_checkpoint, tmp_path / "cache", *long) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate()
    assert (process.returncode, err) == (141, b"")
