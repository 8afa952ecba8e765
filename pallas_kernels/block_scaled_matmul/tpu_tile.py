"""The inner product of the TPU kernels that multiply by `Weight`s: one tile of the result, all of K.

K is unrolled: a loop would drain the MXU's pipeline at every turn (measured, `docs/decisions.md`). Block scales are
scalars in SMEM, applied to the float32 partial product of 128 columns of K; the FP8 weight goes to the MXU as it is.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.block_scaled import BLOCK, num_blocks
from pallas_kernels.chip import chip

TILE_COLUMNS = 256
"""Columns of the result made at once: the width of the newer MXUs."""

TILE_ROWS = 128
"""Rows made at once: 128 x 256 float32 fill half of the vector registers."""

NT = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Operand:
    """References to one weight inside a kernel.

    Attributes:
        values: [..., rows, K] in VMEM, leading dimensions of 1.
        scales: float32 [..., blocks of N, blocks of K] in SMEM, or None for a plain weight.
    """

    values: Any
    scales: Any | None


def multiply_tile(
    x: Any,
    x_scales: Any | None,
    weight: Operand,
    rows: Any,
    column: Array | int,
    width: int,
    first_block: Array,
) -> list[Array]:
    """x[rows] times columns `column : column + width` of the transposed weight block.

    Args:
        x: reference [M, K]; bfloat16, float32 or float8_e4m3fn.
        x_scales: reference float32 [M, blocks of K] if x is FP8, else None.
        rows: `pl.ds` of rows of x.
        column: first row of the weight block, a multiple of 128.
        width: static, at most 256.
        first_block: index in `scales` of the block that `column` begins.

    Returns:
        float32 [rows, 128] parts side by side; the last may be narrower.
    """
    if weight.scales is None:
        product = _dot(x[rows, :], _rows(weight.values, column, width, slice(None)))
        return [product[:, start : start + BLOCK] for start in range(0, width, BLOCK)]
    parts = [slice(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]
    row_parts = _row_parts(rows)
    totals: list[list[Array]] = [[] for _ in row_parts]
    last_block = weight.scales.shape[-2] - 1
    lead = (0,) * (len(weight.scales.shape) - 2)
    for block in range(num_blocks(x.shape[-1])):
        columns = slice(block * BLOCK, min((block + 1) * BLOCK, x.shape[-1]))
        values = _rows(weight.values, column, width, columns)
        # A block that hangs over the edge of the weight has no scale; its columns are dropped.
        scales = [
            weight.scales[(*lead, jnp.minimum(first_block + i, last_block), block)] for i in range(len(parts))
        ]
        for r, some in enumerate(row_parts):
            product = _dot(x[some, columns], values)
            if x_scales is not None:
                product = product * x_scales[some, block : block + 1]
            scaled = [product[:, part] * scale for part, scale in zip(parts, scales, strict=True)]
            before = totals[r]
            totals[r] = [t + s for t, s in zip(before, scaled, strict=True)] if before else scaled
    return [jnp.concatenate(halves) for halves in zip(*totals, strict=True)]


def _row_parts(rows: Any) -> list[Any]:
    """On v6e two halves of a full tile, taken in turns: the compiler then keeps fewer products in flight.

    It spilled 375 registers in 1958 bundles of a tile, and so 24 in 1990; on the other chips it spills none anyway.
    """
    if chip().name != "v6e" or rows.size != TILE_ROWS:
        return [rows]
    half = rows.size // 2
    return [pl.ds(rows.start, half), pl.ds(rows.start + half, half)]


def _rows(values: Any, start: Array | int, size: int, columns: slice) -> Array:
    return values[(*(0,) * (len(values.shape) - 2), pl.ds(start, size), columns)]


def _dot(x: Array, w: Array) -> Array:
    """x @ w.T with float32 accumulation; float32 factors are not rounded to bfloat16."""
    if x.dtype == jnp.float32:
        return lax.dot_general(
            x, w.astype(jnp.float32), NT, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    if w.dtype == jnp.float32:
        return _dot(x.astype(jnp.float32), w)
    return lax.dot_general(x, w, NT, preferred_element_type=jnp.float32)
