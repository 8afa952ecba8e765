"""The walk of a GPU's grouped matmul along the groups: row tiles, none of which has rows of two groups.

Mosaic copies tiles of 8 rows to shared memory, and can begin at no other row: a tile lies in memory from a multiple of
8 on, and its own rows begin up to 7 rows later.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ROW_ALIGNMENT = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GpuVisits:
    """Row tiles in order of group, then row; no tile has rows of two groups.

    The rows beyond the last group are visited too, as one more group E, so that a kernel can write their zeros.
    Entries beyond `count` are not to be visited.

    Attributes:
        group: int32 [V].
        row: int32 [V], first row of the group in the tile, which begins at the multiple of 8 before it.
        rows: int32 [V], how many of the tile's rows belong to the group, at least 1; row % 8 + rows is at most the
            tile's size.
        count: int32 [1], at least 1.
    """

    group: Array
    row: Array
    rows: Array
    count: Array


def max_gpu_visits(num_groups: int, num_rows: int, row_tile: int) -> int:
    """V: every group with rows, and the rows beyond the last group, may have a tile that is not full at either end."""
    nonempty = min(num_groups + 1, num_rows)
    skipped = (ROW_ALIGNMENT - 1) * (nonempty - 1)
    return nonempty + (num_rows - nonempty + skipped) // row_tile


def plan_gpu_visits(group_sizes: Array | None, num_rows: int, row_tile: int) -> GpuVisits:
    """Cuts the rows of every group into tiles.

    Args:
        group_sizes: int32 [E]; None for one group that has all rows.
        num_rows: M, at least 1.
        row_tile: rows of a tile, a multiple of 8.
    """
    if group_sizes is None:
        return _one_group(num_rows, row_tile)
    num_groups = group_sizes.shape[0]
    row_ends = _running_sum(group_sizes)
    tiles = _tiles(group_sizes, row_ends - group_sizes, row_tile)
    tile_ends = _running_sum(tiles)
    visit = jnp.arange(max_gpu_visits(num_groups, num_rows, row_tile), dtype=jnp.int32)[:, None]
    passed = visit >= tile_ends
    inside = ~passed & (visit >= tile_ends - tiles)

    def total(mask: Array, values: Array | int) -> Array:
        return jnp.sum(jnp.where(mask, values, 0), axis=1, dtype=jnp.int32)

    group, first_row, first_tile = total(passed, 1), total(passed, group_sizes), total(passed, tiles)
    # What no group has belongs to one more, E.
    size = jnp.where(group == num_groups, num_rows - first_row, total(inside, group_sizes))
    begin = first_row // ROW_ALIGNMENT * ROW_ALIGNMENT + (visit[:, 0] - first_tile) * row_tile
    row = jnp.maximum(begin, first_row)
    rows = jnp.minimum(first_row + size, begin + row_tile) - row
    num_in_groups = jnp.sum(group_sizes)
    count = jnp.sum(tiles) + _tiles(num_rows - num_in_groups, num_in_groups, row_tile)
    return GpuVisits(group, row, rows, count.astype(jnp.int32).reshape(1))


def _one_group(num_rows: int, row_tile: int) -> GpuVisits:
    """The walk along a plain matrix, which is known when a program is compiled."""
    row = np.arange(max_gpu_visits(1, num_rows, row_tile), dtype=np.int32) * row_tile
    rows = np.clip(num_rows - row, 0, row_tile).astype(np.int32)
    arrays = np.zeros_like(row), row, rows, np.array([np.count_nonzero(rows)], np.int32)
    return GpuVisits(*(jnp.asarray(array) for array in arrays))


def _tiles(size: Array, first_row: Array, row_tile: int) -> Array:
    """Tiles of groups of so many rows that begin at these."""
    return jnp.where(size > 0, -(-(size + first_row % ROW_ALIGNMENT) // row_tile), 0)


def _running_sum(values: Array) -> Array:
    """int32 cumsum, as comparisons: they fuse with what follows, a cumsum is two kernels of XLA's."""
    index = jnp.arange(values.size)
    return jnp.sum(jnp.where(index <= index[:, None], values, 0), axis=1, dtype=jnp.int32)
