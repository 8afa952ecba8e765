"""Activations to FP8 on Hopper and Blackwell: compiled for sm_90a and sm_100a, not run on a GPU.

XLA takes three kernels of its own: the maxima of blocks, the quotients, and the scales turned over, which the matmuls
read along tokens. Here a thread block has 64 tokens and one block of 128 channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.gpu_chip import interpret
from pallas_kernels.gpu_compat import store
from pallas_kernels.quantize.rounding import float8_scales, round_to_float8

ROWS = 64
"""Tokens of a thread block."""
TILE_ROWS = 8
"""Rows of what Mosaic copies as one."""


def unsupported(x: Array) -> str | None:
    """Why the kernel cannot quantise x, [M, K]; None if it can."""
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} (expected bfloat16)"
    if x.shape[0] % TILE_ROWS or x.shape[1] % BLOCK or x.size == 0:
        return f"shape {list(x.shape)} (expected multiples of {TILE_ROWS} and {BLOCK})"
    return None


def quantize_rows(x: Array, scale_fmt: str | None) -> tuple[Array, Array]:
    """As `quantize_activations`, with the scales in the order in which the matmuls read them.

    Args:
        x: bfloat16 [M, K], M a multiple of 8, K of 128.

    Returns:
        float8_e4m3fn [M, K] and float32 [K / 128, M].
    """
    num_rows, num_columns = x.shape
    blocks = num_columns // BLOCK
    kernel = plgpu.kernel(
        functools.partial(_quantize, scale_fmt=scale_fmt),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((blocks, num_rows), jnp.float32),
        ),
        grid=(blocks, pl.cdiv(num_rows, ROWS)),
        grid_names=("block", "tile"),
        scratch_types={
            "tile": _tiled(x.dtype),
            "quantized": _tiled(jnp.float8_e4m3fn),
            "numbers": plgpu.SMEM((ROWS,), jnp.float32),
            "here": plgpu.Barrier(),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="dsv3_quantize_rows",
        interpret=interpret(),
    )
    return kernel(x)


def _tiled(dtype: Any) -> Any:
    transforms = (
        plgpu.TilingTransform((TILE_ROWS, 128 // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(128),
    )
    return plgpu.SMEM((ROWS, BLOCK), dtype, transforms=transforms)


def _quantize(
    x: Any,
    values: Any,
    scales: Any,
    *,
    tile: Any,
    quantized: Any,
    numbers: Any,
    here: Any,
    scale_fmt: str | None,
) -> None:
    block = lax.axis_index("block")
    rows = pl.ds(lax.axis_index("tile") * ROWS, ROWS)
    columns = pl.ds(block * BLOCK, BLOCK)
    # Rows beyond the last come as zeros, and are not written.
    plgpu.copy_gmem_to_smem(x.at[rows, columns], tile, here)
    plgpu.barrier_wait(here)
    wide = plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA).astype(jnp.float32)
    scale = float8_scales(jnp.max(jnp.abs(wide), axis=1), scale_fmt)
    divisors = plgpu.layout_cast(lax.broadcast_in_dim(scale, wide.shape, (0,)), plgpu.Layout.WGMMA)
    store(quantized, round_to_float8(wide, divisors))
    store(numbers, scale)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(quantized, values.at[rows, columns])
    plgpu.copy_smem_to_gmem(numbers, scales.at[block, rows])
    plgpu.wait_smem_to_gmem(0)
