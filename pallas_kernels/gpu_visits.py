"""The walk of a GPU's grouped matmul along the groups: row tiles, none of which has rows of two groups.

Mosaic copies tiles of 8 rows to shared memory, and can begin at no other row: a tile lies in memory from a multiple of
8 on, and its own rows begin up to 7 rows later.
"""

import dataclasses

import jax
import jax.numpy as jnp
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
        group_sizes = jnp.full(1, num_rows, jnp.int32)
    num_groups = group_sizes.shape[0]
    rest = num_rows - jnp.sum(group_sizes)
    sizes = jnp.append(group_sizes, rest).astype(jnp.int32)
    row_ends = jnp.cumsum(sizes)
    skipped = (row_ends - sizes) % ROW_ALIGNMENT
    tile_ends = jnp.cumsum(jnp.where(sizes > 0, -(-(sizes + skipped) // row_tile), 0))
    visit = jnp.arange(max_gpu_visits(num_groups, num_rows, row_tile), dtype=jnp.int32)
    # The group of a visit is the number of groups whose tiles come before it.
    before = visit[:, None] >= tile_ends
    group = jnp.minimum(jnp.sum(before, axis=1, dtype=jnp.int32), num_groups)
    first_tile = jnp.max(jnp.where(before, tile_ends, 0), axis=1)
    first_row = jnp.max(jnp.where(before, row_ends, 0), axis=1)
    last_row = jnp.min(jnp.where(before, num_rows, row_ends), axis=1)
    begin = first_row // ROW_ALIGNMENT * ROW_ALIGNMENT + (visit - first_tile) * row_tile
    row = jnp.maximum(begin, first_row)
    return GpuVisits(group, row, jnp.minimum(last_row, begin + row_tile) - row, tile_ends[-1:])
