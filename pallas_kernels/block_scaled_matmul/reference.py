"""Definition of the block-scaled matmul, and its path on a CPU: a tile of the weight at a time."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight
from pallas_kernels.decode import TILE_ELEMENTS, dot_transposed, matrix_tile, tile_rows
from pallas_kernels.quantize.reference import dequantize_activations, quantize_activations


def block_scaled_matmul(
    x: Array, weight: Weight, layer: Array | int | None, activations: str, scale_fmt: str | None
) -> Array:
    rows = as_rows(x, activations, scale_fmt)
    return _product(rows, weight, layer).reshape(*x.shape[:-1], weight.shape[-2]).astype(x.dtype)


def block_scaled_swiglu(
    x: Array, gate: Weight, up: Weight, layer: Array | int | None, activations: str, scale_fmt: str | None
) -> Array:
    rows = as_rows(x, activations, scale_fmt)
    hidden = jax.nn.silu(_product(rows, gate, layer)) * _product(rows, up, layer)
    return hidden.reshape(*x.shape[:-1], gate.shape[-2]).astype(x.dtype)


def block_scaled_head_matmul(
    x: Array, weight: Weight, rows: tuple[int, int], transpose: bool, layer: Array | int | None
) -> Array:
    heads = x.shape[-2]
    rows_a_head, num_columns = weight.shape[-2] // heads, weight.shape[-1]
    index = () if layer is None else (layer,)
    size = _heads_a_tile(heads, rows_a_head, num_columns)
    by_head = x.astype(jnp.float32).reshape(-1, heads, x.shape[-1]).swapaxes(0, 1)

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
    out = out.reshape(heads, by_head.shape[1], -1).swapaxes(0, 1)
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


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


def as_rows(x: Array, activations: str, scale_fmt: str | None) -> Array:
    """[..., K] -> float32 [M, K], rounded to the values that FP8 activations stand for if they are asked for."""
    rows = x.reshape(-1, x.shape[-1])
    if activations == "float8":
        return dequantize_activations(*quantize_activations(rows, scale_fmt))
    return rows.astype(jnp.float32)


def _product(x: Array, weight: Weight, layer: Array | int | None) -> Array:
    """float32 [M, K] times the transposed matrix, float32 [M, N]."""
    if layer is None and not isinstance(weight, BlockScaled) and weight.dtype == jnp.float32:
        return dot_transposed(x, weight)
    index = () if layer is None else (layer,)
    num_rows, num_columns = weight.shape[-2:]
    tile = tile_rows(num_rows, num_columns)
    whole, rest = divmod(num_rows, tile)
    if whole == 1:
        products = dot_transposed(x, matrix_tile(weight, index, 0, tile))
    else:
        products = _tiled_product(x, weight, index, tile, whole)
    if not rest:
        return products
    last = dot_transposed(x, matrix_tile(weight, index, whole * tile, rest))
    return jnp.concatenate([products, last], axis=1)


def _tiled_product(x: Array, weight: Weight, index: tuple, tile: int, num_tiles: int) -> Array:
    def one_tile(i: Array) -> Array:
        return dot_transposed(x, matrix_tile(weight, index, i * tile, tile))

    products = lax.map(one_tile, jnp.arange(num_tiles, dtype=jnp.int32))
    return products.swapaxes(0, 1).reshape(x.shape[0], num_tiles * tile)
