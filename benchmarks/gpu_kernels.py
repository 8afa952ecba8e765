"""The GPU kernels timed on the GPU at hand: `python -m benchmarks.gpu_kernels [--json FIGURES.json]`.

Every case of gpu_cases.py runs beside XLA's own best at the same operation and a plain copy, in one process: times are
the device's own (CUPTI), medians of several runs, the second-level cache filled with something else before each. The
figure that counts is the share of the chip's peak bandwidth (or of its tensor cores' peak, where that binds).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import profiler

from benchmarks.gpu_case import GpuCase
from benchmarks.gpu_cases import all_gpu_cases
from dsv3_jax.aot import GPUS, GpuModel

CACHE_FILLER_BYTES = 512 << 20


def gpu_at_hand() -> tuple[str, GpuModel]:
    """Name and data sheet of the default device.

    Raises:
        SystemExit: it is none of `GPUS`.
    """
    kind = jax.devices()[0].device_kind
    for name, gpu in GPUS.items():
        if gpu.kind == kind:
            return name, gpu
    raise SystemExit(
        f"gpu_kernels: expected one of {', '.join(gpu.kind for gpu in GPUS.values())}; found {kind}"
    )


def random_array(shape: jax.ShapeDtypeStruct) -> Array:
    """Random values of a floating type on the default device: normal, or the scales of weights."""
    key = jax.random.key(0)
    if shape.dtype == jnp.float8_e4m3fn:
        # Made as bits, none of them NaN: a stack of experts in float32 would not fit.
        bits = jax.random.bits(key, shape.shape, jnp.uint8) & 0xF7
        return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
    values = jax.random.normal(key, shape.shape, jnp.bfloat16).astype(shape.dtype)
    return jnp.abs(values) * 1e-4 if shape.dtype == jnp.float32 else values


def fill(case: GpuCase) -> tuple[Any, ...]:
    """Arguments on the device: random values, and the case's integers."""
    integers = iter(case.integers)

    def argument(shape: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jnp.broadcast_to(jnp.asarray(next(integers), shape.dtype), shape.shape)
        return random_array(shape)

    return jax.tree.map(argument, case.arguments)


def device_seconds(function: Callable, arguments: tuple[Any, ...], runs: int) -> float:
    """Median of the device's busy time, each run with a cold cache."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    sweep = jax.jit(lambda filler: filler + 1)
    filler = jnp.zeros(CACHE_FILLER_BYTES // 4, jnp.float32)
    measured = profiler.measure(compiled)
    times = []
    for _ in range(runs):
        filler = jax.block_until_ready(sweep(filler))
        milliseconds = measured(*arguments)[1]
        assert isinstance(milliseconds, float)
        times.append(milliseconds / 1e3)
    return statistics.median(times)


def measure(case: GpuCase, gpu: GpuModel, runs: int) -> dict[str, Any]:
    """One case: microseconds of the kernel's program and of XLA's, and what share of the chip the former uses."""
    arguments = fill(case)
    ours = device_seconds(case.function, arguments, runs)
    xla = device_seconds(case.xla, arguments, runs) if case.xla else None
    return {
        "kernel": case.kernel,
        "label": case.label,
        "microseconds": round(ours * 1e6, 2),
        "xla_microseconds": xla and round(xla * 1e6, 2),
        "bandwidth": round(case.ideal_bytes / ours / gpu.hbm_bytes_per_s, 3),
        "bf16_peak": round(case.flops / ours / gpu.bf16_flops, 3),
    }


def copy_bandwidth(gpu: GpuModel, runs: int) -> float:
    """Share of the peak that XLA's own copy of 1 GiB reaches."""
    source = jnp.zeros(1 << 28, jnp.float32)
    return 2 * source.nbytes / device_seconds(lambda a: a + 1, (source,), runs) / gpu.hbm_bytes_per_s


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", default="", help="only kernels whose name begins so")
    parser.add_argument(
        "--labels", default="", help="only shapes whose label matches this regular expression"
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file that gets one line of JSON a case")
    options = parser.parse_args()
    name, gpu = gpu_at_hand()
    print(
        f"{gpu.kind}, jax {jax.__version__}: a copy reaches {copy_bandwidth(gpu, options.runs):.0%} of the peak"
    )
    lines = []
    for case in all_gpu_cases(name, options.kernels, options.labels):
        figures = measure(case, gpu, options.runs) | {"chip": name, "jax": jax.__version__}
        lines.append(json.dumps(figures) + "\n")
        print(lines[-1], end="", flush=True)
    if options.json:
        options.json.write_text("".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
