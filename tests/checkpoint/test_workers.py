import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from dsv3_jax.checkpoint.workers import THREADS, run

SHOW_BAR = """
from dsv3_jax.checkpoint.workers import progress_bar
with progress_bar("loading", 4_000_000_000) as report:
    report(1_000_000_000)
"""


def test_every_work_is_done_once_and_reported():
    done, reported = [], []
    run((lambda number=number: done.append(number) or number for number in range(500)), reported.append)
    assert sorted(done) == list(range(500))
    assert sum(reported) == sum(range(500))


def test_works_run_at_the_same_time():
    together = threading.Barrier(THREADS, timeout=60)
    run((lambda: together.wait() and 0 for _ in range(THREADS)), lambda _: None)


def test_first_error_ends_the_rest():
    started = []

    def work(number: int) -> int:
        started.append(number)
        if number == 10:
            raise OSError("disk on fire")
        return 0

    with pytest.raises(OSError, match="disk on fire"):
        run((lambda number=number: work(number) for number in range(100_000)), lambda _: None)
    assert len(started) < 100_000


def test_error_of_the_iterator_is_raised():
    def works():
        yield lambda: 1
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        run(works(), lambda _: None)


def test_bar_shows_bytes_on_a_terminal_and_nothing_elsewhere():
    command = [sys.executable, "-c", SHOW_BAR]
    root = Path(__file__).parents[2]
    silent = subprocess.run(command, cwd=root, check=True, capture_output=True)
    assert silent.stderr == silent.stdout == b""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    subprocess.run(command, cwd=root, check=True, stderr=end)
    os.close(end)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert "loading: 25%" in " ".join(shown.split())
    assert "1.00G/4.00G" in shown
