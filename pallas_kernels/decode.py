"""Weights as float32 matrices, a tile at a time, the way XLA does it fast on a CPU.

XLA reads arrays of float8 and bfloat16 by scalar code on a CPU, ten times slower than the memory, even if only to
slice or bitcast them; the same values made from integers by integer operations are vectorised. So weights may also
come as their bit patterns, uint8 for float8_e4m3fn and uint16 for bfloat16: see `bit_patterns`. A tile goes through an
`optimization_barrier`, so that it is made once, stays in the cache, and is not fused into the product that reads it
(`docs/decisions.md`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight

TILE_ELEMENTS = 1 << 21


def tile_rows(num_rows: int, num_columns: int) -> int:
    """Rows of a tile that has at most 2 Mi elements: all of them, or a multiple of 128."""
    rows = max(TILE_ELEMENTS // num_columns // BLOCK, 1) * BLOCK
    return min(num_rows, rows)


def bit_patterns(tree: Any) -> Any:
    """Float8 and bfloat16 arrays of a pytree as unsigned integers, without a copy on a CPU.

    Every operation takes them in place of the arrays and gives the same values; on a CPU, ten times faster.
    """
    integers = {jnp.dtype(jnp.float8_e4m3fn): np.uint8, jnp.dtype(jnp.bfloat16): np.uint16}

    def pattern(array: Array) -> Array:
        integer = integers.get(array.dtype)
        if integer is None:
            return array
        # device_put, unlike jnp.asarray, takes the memory as it is.
        shards = [
            jax.device_put(np.asarray(shard.data).view(integer), shard.device)
            for shard in array.addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)

    return jax.tree.map(pattern, tree)


def float8_to_float32(values: Array, scales: Array) -> Array:
    """Exact `values * scales` in float32.

    An e4m3 pattern moved into a float16 is the value divided by 256, subnormals included; the 256 goes into the
    scale. The two NaN patterns become +-480: checkpoints that hold them are refused when they are read.

    Args:
        values: float8_e4m3fn [...], or its bit patterns.
        scales: float32, broadcastable to `values`.
    """
    bits = values if values.dtype == jnp.uint8 else lax.bitcast_convert_type(values, jnp.uint8)
    bits = bits.astype(jnp.uint16)
    halves = lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)
    return halves.astype(jnp.float32) * (scales * 256)


def to_float32(values: Array) -> Array:
    """Plain weights in float32; uint16 stands for the bit patterns of bfloat16."""
    if values.dtype != jnp.uint16:
        return values.astype(jnp.float32)
    return lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)


def expand_scales(scales: Array, num_rows: int, num_columns: int) -> Array:
    """One scale an element: float32 [..., ceil(N / 128), ceil(K / 128)] -> [..., N, K]."""
    rows = jnp.repeat(scales, BLOCK, axis=-2)[..., :num_rows, :]
    return jnp.repeat(rows, BLOCK, axis=-1)[..., :num_columns]


def matrix_tile(weight: Weight, index: tuple[Array | int, ...], row: Array | int, num_rows: int) -> Array:
    """Rows `row : row + num_rows` of one matrix of a stack, in float32.

    Args:
        weight: [*stack, N, K].
        index: which matrix of the stack, one number for each of its dimensions.
        row: first row; a multiple of 128 where the weight is block-scaled.
        num_rows: static; the rows must exist.

    Returns:
        float32 [num_rows, K].
    """
    values = weight.values if isinstance(weight, BlockScaled) else weight
    num_columns = values.shape[-1]
    tile = _slice(values, index, row, (num_rows, num_columns))
    if isinstance(weight, BlockScaled):
        blocks = (-(-num_rows // BLOCK), weight.scales.shape[-1])
        scales = _slice(weight.scales, index, row // BLOCK, blocks)
        tile = float8_to_float32(tile, expand_scales(scales, num_rows, num_columns))
    else:
        tile = to_float32(tile)
    return lax.optimization_barrier(tile)


def _slice(stack: Array, index: tuple[Array | int, ...], row: Array | int, shape: tuple[int, int]) -> Array:
    start = tuple(jnp.asarray(i, jnp.int32) for i in (*index, row, 0))
    ones = (1,) * len(index)
    return lax.dynamic_slice(stack, start, ones + shape).reshape(shape)


def dot_transposed(x: Array, matrix: Array) -> Array:
    """`x @ matrix.T` in float32: [M, K], [N, K] -> [M, N].

    With few rows the product is written the other way round: XLA's CPU backend takes 25 times as long for
    [1, K] @ [K, N] as for [N, K] @ [K, 1] where the matrix is an argument of the program.
    """
    contract = (((1,), (1,)), ((), ()))
    if x.shape[0] <= 8:
        return lax.dot_general(matrix, x, contract, precision=lax.Precision.HIGHEST).T
    return lax.dot_general(x, matrix, contract, precision=lax.Precision.HIGHEST)
