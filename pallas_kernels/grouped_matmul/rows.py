"""The loop over groups of rows that the grouped matmul and its gradients share."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

MAX_ROW_TILE = 512

RowTile = Callable[[Array], Array]
"""First row -> float32 [row_tile_size, K], the rows from there on."""

Group = Callable[[Array, RowTile, Array, Array, Array], Array]
"""(group, rows, result so far, first row, number of row tiles) -> result with this group's part in it."""


def row_tile_size(num_rows: int, num_groups: int) -> int:
    """Rows multiplied at once: about what a group has on average, a power of two from 1 to 512."""
    mean = -(-num_rows // num_groups)
    return min(1 << (mean - 1).bit_length(), MAX_ROW_TILE)


def row_tile(num_rows: int, num_groups: int) -> int:
    """Rows of an aligned tile of the TPU kernel, all of whose K is in VMEM at once: a multiple of `chunk_rows`.

    Args:
        num_rows: M, all rows.
        num_groups: E.
    """
    chunk = chunk_rows(num_rows, num_groups)
    return min(-(-num_rows // chunk) * chunk, 256)


def chunk_rows(num_rows: int, num_groups: int) -> int:
    """Rows that the TPU kernel multiplies at once: 16 where groups have few, else 64."""
    return 16 if num_rows <= 16 * num_groups else 64


def over_nonempty(group_sizes: Array, body: Callable[[Array, Array], Array], init: Array) -> Array:
    """Loop over the groups that have rows, in ascending order: body(group, state) -> state."""
    chosen = jnp.argsort(group_sizes == 0, stable=True).astype(jnp.int32)
    return lax.fori_loop(0, jnp.sum(group_sizes > 0), lambda i, state: body(chosen[i], state), init)


def over_groups(x: Array, group_sizes: Array, num_columns: int, group: Group) -> Array:
    """Fills float32 [M, num_columns] group by group; rows beyond the last group are zeros.

    A row tile may reach beyond its group: what it writes there is overwritten by the groups that follow.

    Args:
        x: float32 [M, K], sorted by group.
        group_sizes: int32 [E].
        num_columns: N of the result.
        group: writes the rows of one group into the result, [M + row_tile_size, N].
    """
    size = row_tile_size(x.shape[0], group_sizes.shape[0])
    padded = jnp.pad(x, ((0, size), (0, 0)))
    ends = jnp.cumsum(group_sizes)

    def rows(first: Array) -> Array:
        return lax.dynamic_slice(padded, (first, 0), (size, x.shape[1]))

    def body(e: Array, out: Array) -> Array:
        count = (group_sizes[e] + size - 1) // size
        return group(e, rows, out, ends[e] - group_sizes[e], count)

    out = jnp.zeros((x.shape[0] + size, num_columns), jnp.float32)
    out = over_nonempty(group_sizes, body, out)[: x.shape[0]]
    return jnp.where((jnp.arange(x.shape[0]) < ends[-1])[:, None], out, 0)
