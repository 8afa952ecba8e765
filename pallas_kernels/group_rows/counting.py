"""The sorting by group on GPUs, as counts: every pair is compared with every other.

A sort, a scatter and their like are a kernel each of XLA's, microseconds whatever they do; comparisons that are summed
at once fuse into one or two.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.group_rows.grouping import Grouping
from pallas_kernels.group_rows.reference import plan_visits

MAX_PAIRS = 2048
"""The comparisons grow with the square of the pairs; from here on a sort is faster."""


def group_rows(ids: Array, valid: Array, num_groups: int, row_tile: int) -> Grouping:
    """Arguments as of the public function, at most `MAX_PAIRS` pairs."""
    keys = jnp.where(valid[:, None], ids, num_groups).reshape(-1)
    pair = jnp.arange(keys.size, dtype=jnp.int32)
    same = keys == keys[:, None]
    before = (keys < keys[:, None]) | (same & (pair < pair[:, None]))
    position = jnp.sum(before, axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(position == pair[:, None], pair, 0), axis=1, dtype=jnp.int32)
    sizes = jnp.sum(keys == jnp.arange(num_groups)[:, None], axis=1, dtype=jnp.int32)
    visits = plan_visits(sizes, order.size, row_tile)
    return Grouping(order, order // ids.shape[1], position.reshape(ids.shape), sizes, visits)
