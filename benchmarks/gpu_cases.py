"""All GPU kernel cases: the operations of V3 at the real model's shapes, whole and an eighth of them (TP 8)."""

import importlib
import importlib.util
import re
from collections.abc import Callable

from benchmarks.gpu_case import GpuCase

COLLECTIONS = ("grouped", "matmul", "mla_decode", "mla_heads", "mla_prefill", "quantize", "route")
"""One `benchmarks/gpu_cases_<operation>.py` each."""


def all_gpu_cases(
    chip: str, kernel_prefix: str = "", label_pattern: str = "", *, first: bool = False
) -> list[GpuCase]:
    """Cases for one chip, of the kernels whose names begin with `kernel_prefix`, sorted by kernel.

    Call it with the chip's mesh in force: the kernels' plans depend on it.

    Args:
        chip: of `dsv3_jax.aot.GPUS`.
        label_pattern: regular expression that the labels match.
        first: only the first case of every kernel.
    """
    collected = []
    for name in COLLECTIONS:
        if importlib.util.find_spec(f"benchmarks.gpu_cases_{name}") is None:
            continue
        cases: Callable[[], list[GpuCase]] = getattr(
            importlib.import_module(f"benchmarks.gpu_cases_{name}"), f"{name}_cases"
        )
        collected += [case for case in cases() if chip in case.instructions]
    collected = [
        case
        for case in sorted(collected, key=lambda case: case.kernel)
        if case.kernel.startswith(kernel_prefix) and re.search(label_pattern, case.label)
    ]
    return list({case.kernel: case for case in reversed(collected)}.values())[::-1] if first else collected
