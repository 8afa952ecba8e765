"""All kernel cases: the operations of V3 at the real model's shapes."""

from collections.abc import Callable

from benchmarks.tpu_case import Case
from benchmarks.tpu_cases_matmul import matmul_cases
from benchmarks.tpu_cases_mla_decode import mla_decode_cases

COLLECTIONS: tuple[Callable[[], list[Case]], ...] = (matmul_cases, mla_decode_cases)
"""One `benchmarks/tpu_cases_<operation>.py` each."""


def all_cases(kernel_prefix: str = "", label_part: str = "", *, first: bool = False) -> list[Case]:
    """Cases of the kernels whose names begin with `kernel_prefix`, in shapes whose label contains `label_part`.

    Sorted by kernel, else in the order given. Call it with the mesh of the chip in force: block sizes depend on it.

    Args:
        first: only the first case of every kernel.
    """
    collected = sorted((case for cases in COLLECTIONS for case in cases()), key=lambda case: case.kernel)
    collected = [c for c in collected if c.kernel.startswith(kernel_prefix) and label_part in c.label]
    return list({case.kernel: case for case in reversed(collected)}.values())[::-1] if first else collected
