"""`group_rows`: the (token, choice) pairs of a mixture of experts sorted by expert, for a grouped matmul."""

from jax import Array

from pallas_kernels.group_rows import counting, reference, tpu
from pallas_kernels.group_rows.grouping import Grouping, Visits
from pallas_kernels.implementation import Kernel, choose

__all__ = ["Grouping", "Visits", "group_rows", "plan_visits"]


def group_rows(
    ids: Array, valid: Array, *, num_groups: int, row_tile: int, implementation: str | None = None
) -> Grouping:
    """Sorts pairs by group, those of a group by token; pairs of invalid tokens come last and are in no group.

    Args:
        ids: int32 [M, K], groups of each token, in [0, num_groups) and distinct within a valid token.
        valid: bool [M].
        num_groups: static.
        row_tile: rows of a tile of the grouped matmul that will walk along `Grouping.visits`; static.
        implementation: None, "reference" or "pallas"; more pairs than a decode step has are sorted by XLA in any case;
            on a GPU XLA counts fewer ones instead of sorting them.
    """
    kernel = reference.group_rows if tpu.unsupported(ids, num_groups) else tpu.group_rows
    function = choose(
        "group_rows",
        implementation,
        reference=reference.group_rows,
        tpu=Kernel(kernel),
        gpu=Kernel(counting.group_rows) if ids.size <= counting.MAX_PAIRS else None,
    )
    return function(ids, valid, num_groups, row_tile)


def plan_visits(sizes: Array, *, num_rows: int, row_tile: int) -> Visits:
    """The walk of a grouped matmul along its row tiles, from the sizes of the groups alone.

    Args:
        sizes: int32 [num_groups], rows of each group.
        num_rows: R, rows that there are, static; the sizes' sum is at most R.
        row_tile: rows of a tile, static.
    """
    return reference.plan_visits(sizes, num_rows, row_tile)
