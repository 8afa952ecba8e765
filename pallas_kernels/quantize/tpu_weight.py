"""Weights to FP8 in blocks of 128 x 128, on a TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.block_scaled import BLOCK, BlockScaled, num_blocks
from pallas_kernels.chip import compiler_params, interpret
from pallas_kernels.quantize.rounding import float8_scales, round_to_float8


def quantize_weight(weight: Array, scale_fmt: str | None) -> BlockScaled:
    rows, depth = weight.shape[-2:]
    stack = weight.reshape(-1, rows, depth)
    blocks = (num_blocks(rows), num_blocks(depth))
    tile = pl.BlockSpec((1, min(BLOCK, rows), depth), lambda s, n: (s, n, 0))
    vmem = 2 * BLOCK * depth * (weight.dtype.itemsize + 1) + 2 * 4 * (blocks[0] + 8) * (blocks[1] + BLOCK)
    values, scales = pl.pallas_call(
        functools.partial(_kernel, num_rows=rows, scale_fmt=scale_fmt),
        grid=(stack.shape[0], blocks[0]),
        in_specs=[tile],
        out_specs=[tile, pl.BlockSpec((1, *blocks), lambda s, n: (s, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(stack.shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((stack.shape[0], *blocks), jnp.float32),
        ],
        compiler_params=compiler_params(("parallel", "arbitrary"), vmem),
        name="dsv3_quantize_weight",
        interpret=interpret(),
    )(stack)
    lead = weight.shape[:-2]
    return BlockScaled(values.reshape(weight.shape), scales.reshape(*lead, *blocks))


def _kernel(weight: Any, values: Any, scales: Any, *, num_rows: int, scale_fmt: str | None) -> None:
    """One row of blocks; the scales of a matrix stay in VMEM until all of its rows are done."""
    tile_rows, depth = weight.shape[1:]
    row = pl.program_id(1)
    full, rest = divmod(depth, BLOCK)
    lane = lax.broadcasted_iota(jnp.int32, (1, scales.shape[2]), 1)

    def block(lanes: Any, index: Any, row_scales: Array) -> Array:
        part = weight[0, :, lanes].astype(jnp.float32)
        if num_rows % tile_rows:
            # Rows beyond the matrix hold anything.
            exists = lax.broadcasted_iota(jnp.int32, part.shape, 0) < num_rows - row * tile_rows
            part = jnp.where(exists, part, 0)
        amax = jnp.max(jnp.max(jnp.abs(part), axis=0, keepdims=True), axis=1, keepdims=True)
        scale = float8_scales(amax, scale_fmt, in_kernel=True)
        values[0, :, lanes] = round_to_float8(part, scale, in_kernel=True)
        return jnp.where(lane == index, scale, row_scales)

    def step(i: Array, row_scales: Array) -> Array:
        return block(pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK), i, row_scales)

    row_scales = jnp.zeros(lane.shape, jnp.float32)
    if full:
        row_scales = lax.fori_loop(0, full, step, row_scales)
    if rest:
        row_scales = block(pl.ds(full * BLOCK, rest), full, row_scales)
    scales[0, pl.ds(row, 1), :] = row_scales
