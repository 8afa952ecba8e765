"""Definition of the sorting by group: a stable argsort, and the visits from the sizes."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.group_rows.grouping import Grouping, Visits, max_visits


def group_rows(ids: Array, valid: Array, num_groups: int, row_tile: int) -> Grouping:
    """Arguments as of the public function."""
    keys = jnp.where(valid[:, None], ids, num_groups).reshape(-1)
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    rows = jnp.arange(order.size, dtype=jnp.int32)
    position = jnp.zeros_like(order).at[order].set(rows, unique_indices=True).reshape(ids.shape)
    sizes = jnp.bincount(keys, length=num_groups + 1)[:num_groups].astype(jnp.int32)
    return Grouping(order, order // ids.shape[1], position, sizes, plan_visits(sizes, order.size, row_tile))


def plan_visits(sizes: Array, num_rows: int, row_tile: int) -> Visits:
    """Arguments as of the public function."""
    num_groups = sizes.shape[0]
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    starts = ends - sizes
    count = jnp.where(sizes > 0, (ends - 1) // row_tile - starts // row_tile + 1, 0)
    last = jnp.cumsum(count).astype(jnp.int32)
    num_visits = last[-1:]
    visit = jnp.arange(max_visits(num_groups, num_rows, row_tile), dtype=jnp.int32)
    visit = jnp.minimum(visit, jnp.maximum(num_visits - 1, 0))
    # Without any row the search runs over the end, to which the last group answers: not 0.
    group = jnp.where(num_visits > 0, jnp.searchsorted(last, visit, side="right"), 0).astype(jnp.int32)
    tile = starts[group] // row_tile + visit - (last - count)[group]
    return Visits(jnp.pad(ends, (1, 0)), group, tile, num_visits)
