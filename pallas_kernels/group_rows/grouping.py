"""How rows that belong to groups lie when they are sorted by group."""

import dataclasses

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """The (group, row tile) pairs that share at least a row, in order of group, then tile.

    A tile is `row_tile` consecutive sorted rows, aligned. Entries beyond `num_visits` repeat the last valid one, so
    that a pipeline over all V of them fetches nothing new; they are 0 if no row is in a group.

    Attributes:
        starts: int32 [num_groups + 1], first row of each group, and the end of the last.
        visit_group: int32 [V], V = min(num_groups, R) + ceil(R / row_tile) - 1 for R rows, at least 1.
        visit_tile: int32 [V].
        num_visits: int32 [1].
    """

    starts: Array
    visit_group: Array
    visit_tile: Array
    num_visits: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouping:
    """The (token, choice) pairs sorted by group.

    Attributes:
        order: int32 [M * K], sorted row -> pair t * K + k.
        tokens: int32 [M * K], sorted row -> token t.
        position: int32 [M, K], pair -> sorted row.
        sizes: int32 [num_groups].
        visits: what a grouped matmul walks along.
    """

    order: Array
    tokens: Array
    position: Array
    sizes: Array
    visits: Visits


def max_visits(num_groups: int, num_rows: int, row_tile: int) -> int:
    """V: every group but the first can begin inside a tile that another one has begun."""
    return max(min(num_groups, num_rows) + -(-num_rows // row_tile) - 1, 1)
