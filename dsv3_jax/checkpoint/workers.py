"""A few threads that read, convert and write, and the bar that shows how far they are."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

THREADS = 4  # reads wait for the disk as well as for a core

Work = Callable[[], int]
Report = Callable[[int], None]


def run(works: Iterator[Work], report: Report) -> None:
    """Does the works in their order, several at a time.

    Args:
        works: callables that return the number of bytes they have read. The iterator itself is advanced by
            one thread at a time.
        report: called with that number after each, never by two threads at once.

    Raises:
        The first exception of a work; the other threads stop after the one they are at.
    """
    lock, failed = threading.Lock(), threading.Event()

    def worker() -> None:
        done = 0
        try:
            while not failed.is_set():
                with lock:
                    report(done)
                    work = next(works, None)
                if work is None:
                    return
                done = work()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(worker) for _ in range(THREADS)]
        try:
            for future in futures:
                future.result()
        finally:
            failed.set()  # an interrupt in this thread stops the others too


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Report]:
    """A bar on stderr with bytes, rate and time left; nothing where stderr is no terminal.

    Args:
        label: what is being done.
        total: bytes that will be reported.
    """
    bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr, disable=None)

    def report(count: int) -> None:
        bar.update(count)

    with bar:
        yield report
