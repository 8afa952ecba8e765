"""Definition of the per-head products, a few heads at a time so that kv_b_proj is never float32 as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_scaled import BLOCK, Weight
from pallas_kernels.decode import TILE_ELEMENTS, matrix_tile
from pallas_kernels.rotary import rotate

if TYPE_CHECKING:
    from pallas_kernels.mla_heads import HeadDims


def absorb_queries(
    q: Array, rope: Array, kv_b: Weight, dims: HeadDims, layer: Array | int | None
) -> tuple[Array, Array]:
    num_rows, width = q.shape
    heads = width // (dims.qk_nope_head_dim + dims.qk_rope_head_dim)
    q_nope, q_rope = jnp.split(q.reshape(num_rows, heads, -1), [dims.qk_nope_head_dim], axis=-1)
    q_latent = _head_matmul(q_nope, kv_b, (0, dims.qk_nope_head_dim), False, layer)
    return q_latent, rotate(q_rope, rope[:, None])


def head_values(context: Array, kv_b: Weight, dims: HeadDims, layer: Array | int | None) -> Array:
    rows = (dims.qk_nope_head_dim, dims.qk_nope_head_dim + dims.v_head_dim)
    return _head_matmul(context, kv_b, rows, True, layer).reshape(context.shape[0], -1)


def _head_matmul(
    x: Array, weight: Weight, rows: tuple[int, int], transpose: bool, layer: Array | int | None
) -> Array:
    """Every head's vectors times the part `rows` of its own rows of the matrix, transposed if asked for.

    Args:
        x: [M, H, D].
        weight: [L, N, K], N a multiple of H.
    """
    heads = x.shape[1]
    rows_a_head, num_columns = weight.shape[-2] // heads, weight.shape[-1]
    index = () if layer is None else (layer,)
    size = _heads_a_tile(heads, rows_a_head, num_columns)
    by_head = x.astype(jnp.float32).swapaxes(0, 1)

    def some_heads(args: tuple[Array, Array]) -> Array:
        i, part = args
        tile = matrix_tile(weight, index, i * size * rows_a_head, size * rows_a_head)
        matrices = tile.reshape(size, rows_a_head, num_columns)[:, slice(*rows)]
        contract = "hmk,hrk->hmr" if transpose else "hmr,hrk->hmk"
        return jnp.einsum(contract, part, matrices, precision=lax.Precision.HIGHEST)

    if size == heads:
        out = some_heads((jnp.int32(0), by_head))
    else:
        parts = by_head.reshape(heads // size, size, *by_head.shape[1:])
        out = lax.map(some_heads, (jnp.arange(heads // size, dtype=jnp.int32), parts))
    return out.reshape(heads, by_head.shape[1], -1).swapaxes(0, 1).astype(x.dtype)


def _heads_a_tile(heads: int, rows_a_head: int, num_columns: int) -> int:
    """The most heads that divide all, fill at most a tile, and begin at blocks; all where there are no such."""
    fitting = [
        size
        for size in range(1, heads + 1)
        if heads % size == 0
        and size * rows_a_head % BLOCK == 0
        and size * rows_a_head * num_columns <= TILE_ELEMENTS
    ]
    return max(fitting, default=heads)
