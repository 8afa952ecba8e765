"""Definition of the grouped matmul, and its path on a CPU.

A loop over the groups that have rows makes each matrix float32 once and multiplies it by the group's rows, a tile of
rows at a time. `lax.ragged_dot` would multiply every row by every expert on a CPU.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_scaled import BlockScaled, Weight
from pallas_kernels.block_scaled_matmul.reference import as_rows
from pallas_kernels.decode import dot_transposed, matrix_tile, tile_rows
from pallas_kernels.group_rows import Visits
from pallas_kernels.grouped_matmul.gradient import grouped_outer, grouped_transposed
from pallas_kernels.grouped_matmul.rows import RowTile, over_groups, row_tile_size


def grouped_matmul(
    x: Array,
    weights: tuple[Weight, ...],
    group_sizes: Array,
    visits: Visits | None,
    row_scale: Array | None,
    layer: Array | int | None,
    activations: str,
    scale_fmt: str | None,
) -> Array:
    """One matrix a group, or gate and up of SwiGLU; arguments as of the public functions, visits unused."""
    rows = as_rows(x, activations if isinstance(weights[0], BlockScaled) else "none", scale_fmt)
    out = _product(rows, weights, group_sizes, _index(layer))
    if row_scale is not None:
        out = out * row_scale[:, None]
    return out.astype(x.dtype)


def _index(layer: Array | int | None) -> tuple[Array, ...]:
    return () if layer is None else (jnp.asarray(layer, jnp.int32),)


def _product(x: Array, weights: tuple[Weight, ...], group_sizes: Array, index: tuple[Array, ...]) -> Array:
    """One matrix a group, or SwiGLU of a pair: float32 [M, K] -> float32 [M, N]."""
    if isinstance(weights[0], BlockScaled):
        return _forward(x, weights, group_sizes, index)
    return _differentiable(x, weights, group_sizes, index)


def _forward(x: Array, weights: tuple[Weight, ...], group_sizes: Array, index: tuple[Array, ...]) -> Array:
    num_rows, num_columns = weights[0].shape[-2:]
    tile = tile_rows(num_rows, num_columns * len(weights))
    size = row_tile_size(x.shape[0], group_sizes.shape[0])

    def group(e: Array, rows: RowTile, out: Array, start: Array, count: Array) -> Array:
        for row in range(0, num_rows, tile):
            # One tile after the other: XLA's GPU backend would make all of them first, a float32 copy of the matrix.
            e, out = lax.optimization_barrier((e, out))
            tiles = [matrix_tile(w, (*index, e), row, min(tile, num_rows - row)) for w in weights]

            def row_tile(i: Array, out: Array, tiles: list[Array] = tiles, row: int = row) -> Array:
                first = start + i * size
                value = _combine(*(dot_transposed(rows(first), t) for t in tiles))
                return lax.dynamic_update_slice(out, value, (first, row))

            out = lax.fori_loop(0, count, row_tile, out)
        return out

    return over_groups(x, group_sizes, num_rows, group)


def _combine(*products: Array) -> Array:
    return products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]


_differentiable = jax.custom_vjp(_forward)


def _save(
    x: Array, weights: tuple[Array, ...], group_sizes: Array, index: tuple[Array, ...]
) -> tuple[Array, tuple]:
    return _forward(x, weights, group_sizes, index), (x, weights, group_sizes, index)


def _backward(residuals: tuple, d_out: Array) -> tuple:
    x, weights, group_sizes, index = residuals
    products = [_forward(x, (w,), group_sizes, index) for w in weights] if len(weights) > 1 else [d_out]
    d_products = jax.vjp(_combine, *products)[1](d_out)
    d_x = sum(grouped_transposed(d, w, group_sizes, index) for d, w in zip(d_products, weights, strict=True))
    d_weights = tuple(
        grouped_outer(d, x, w, group_sizes, index) for d, w in zip(d_products, weights, strict=True)
    )
    return d_x, d_weights, None, None


_differentiable.defvjp(_save, _backward)
