"""Cases of quantising activations on GPUs, in front of W8A8 products."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.gpu_case import GpuCase, Tile
from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.quantize import gpu, reference

SHAPES = ((8, 7168), (64, 2048), (4096, 7168), (65536, 7168))
"""Tokens, or pairs of tokens and experts, and the channels of what enters a linear."""


def quantize_cases() -> list[GpuCase]:
    """Scales in float32."""
    return [_case(rows, columns) for rows, columns in SHAPES]


def _case(rows: int, columns: int) -> GpuCase:
    return GpuCase(
        kernel="dsv3_quantize_rows",
        label=f"[{rows}, {columns}]",
        function=functools.partial(gpu.quantize_rows, scale_fmt=None),
        arguments=(jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),),
        instructions={"h100": "", "h200": "", "b200": ""},
        ideal_bytes=rows * columns * 3 + rows * columns // BLOCK * 4,
        flops=0,
        tile=Tile(
            bytes=gpu.ROWS * BLOCK * 2,
            flops=0,
            stages=1,
            blocks=columns // BLOCK * -(-rows // gpu.ROWS),
        ),
        xla=functools.partial(reference.quantize_activations, scale_fmt=None),
    )
