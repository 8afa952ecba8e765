"""All kernel cases: the operations of V3 at the real model's shapes."""

import re
from collections.abc import Callable

from benchmarks.tpu_case import Case
from benchmarks.tpu_cases_grouped import grouped_cases
from benchmarks.tpu_cases_matmul import matmul_cases
from benchmarks.tpu_cases_mla_cache import mla_cache_cases
from benchmarks.tpu_cases_mla_decode import mla_decode_cases
from benchmarks.tpu_cases_mla_heads import mla_heads_cases
from benchmarks.tpu_cases_mla_prefill import mla_prefill_cases
from benchmarks.tpu_cases_quantize import quantize_cases
from benchmarks.tpu_cases_route import route_cases
from benchmarks.tpu_cases_unscaled import unscaled_cases

COLLECTIONS: tuple[Callable[[], list[Case]], ...] = (
    matmul_cases,
    grouped_cases,
    mla_cache_cases,
    mla_decode_cases,
    mla_heads_cases,
    mla_prefill_cases,
    quantize_cases,
    route_cases,
    unscaled_cases,
)
"""One `benchmarks/tpu_cases_<operation>.py` each."""


def all_cases(kernel_prefix: str = "", label_pattern: str = "", *, first: bool = False) -> list[Case]:
    """Cases of the kernels whose names begin with `kernel_prefix`, whose labels match a regular expression.

    Sorted by kernel, else in the order given. Call it with the chip's abstract mesh in force: block
    sizes depend on it.

    Args:
        first: only the first case of every kernel.
    """
    collected = sorted((case for cases in COLLECTIONS for case in cases()), key=lambda case: case.kernel)
    collected = [
        c for c in collected if c.kernel.startswith(kernel_prefix) and re.search(label_pattern, c.label)
    ]
    return list({case.kernel: case for case in reversed(collected)}.values())[::-1] if first else collected
