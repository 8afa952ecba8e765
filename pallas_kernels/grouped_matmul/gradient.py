"""The two products of the grouped matmul's gradient, by the same loop over the groups that have rows."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.decode import matrix_tile
from pallas_kernels.grouped_matmul.rows import RowTile, over_groups, over_nonempty, row_tile_size

PRECISION = lax.Precision.HIGHEST


def grouped_transposed(d_out: Array, weight: Array, group_sizes: Array, index: tuple[Array, ...]) -> Array:
    """Gradient of the rows: d_out times each group's matrix, not transposed.

    Args:
        d_out: float32 [M, N], sorted by group.
        weight: [*stack, E, N, K], plain.
        group_sizes: int32 [E].
        index: which matrices of the stack.

    Returns:
        float32 [M, K].
    """
    size = row_tile_size(d_out.shape[0], group_sizes.shape[0])

    def group(e: Array, rows: RowTile, out: Array, start: Array, count: Array) -> Array:
        matrix = matrix_tile(weight, (*index, e), 0, weight.shape[-2])

        def row_tile(i: Array, out: Array) -> Array:
            first = start + i * size
            return lax.dynamic_update_slice(
                out, jnp.dot(rows(first), matrix, precision=PRECISION), (first, 0)
            )

        return lax.fori_loop(0, count, row_tile, out)

    return over_groups(d_out, group_sizes, weight.shape[-1], group)


def grouped_outer(
    d_out: Array, x: Array, weight: Array, group_sizes: Array, index: tuple[Array, ...]
) -> Array:
    """Gradient of the matrices: for each group the sum of outer products of its rows.

    Args:
        d_out: float32 [M, N], sorted by group.
        x: float32 [M, K].
        weight: [*stack, E, N, K], the stack whose gradient this is; only its shape and dtype count.
        group_sizes: int32 [E].
        index: which matrices of the stack; the others get zeros.

    Returns:
        The shape and dtype of weight.
    """
    size = row_tile_size(x.shape[0], group_sizes.shape[0])
    padded_x, padded_d = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, d_out))
    ends = jnp.cumsum(group_sizes)
    shape = weight.shape[-2:]

    def body(e: Array, out: Array) -> Array:
        start = ends[e] - group_sizes[e]

        def row_tile(i: Array, total: Array) -> Array:
            first = start + i * size
            inside = first + jnp.arange(size) < ends[e]
            d_rows = lax.dynamic_slice(padded_d, (first, 0), (size, shape[0]))
            rows = lax.dynamic_slice(padded_x, (first, 0), (size, shape[1]))
            d_rows = jnp.where(inside[:, None], d_rows, 0)
            return total + jnp.dot(d_rows.T, rows, precision=PRECISION)

        count = (group_sizes[e] + size - 1) // size
        total = lax.fori_loop(0, count, row_tile, jnp.zeros(shape, jnp.float32))
        return lax.dynamic_update_slice(out, total[None], (e, 0, 0))

    gradient = over_nonempty(group_sizes, body, jnp.zeros(weight.shape[-3:], jnp.float32))
    gradient = gradient.astype(weight.dtype)
    return jnp.zeros(weight.shape, weight.dtype).at[index[0]].set(gradient) if index else gradient
