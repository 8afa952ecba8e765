"""The tiles of the result that a persistent block of Hopper's products takes in turns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.block_scaled_matmul.gpu_hopper_refs import Refs, Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """One tile of the result.

    Attributes:
        group: of its rows; the number of groups for rows beyond the last.
        row: of x, the first of the group in the tile.
        rows: of the group in the tile.
        column: which tile of columns.
        split: which part of K.
        first: block of 128 of K, and
        end: of those that the tile sums.
    """

    group: Any
    row: Any
    rows: Any
    column: Any
    split: Any
    first: Any
    end: Any


def for_tiles(
    refs: Refs, shape: Shape, ahead: Callable[[Work], Any], tile: Callable[[Work, Any, Any], Any]
) -> None:
    """Walks along the tiles of this block, and reads what they need from memory while the one before is at work.

    Args:
        ahead: work -> what `tile` needs at once.
        tile: (work, of `ahead`, step) -> step, which counts the stages used.
    """
    plan = shape.plan
    num_rows = refs.out.shape[2]
    count = -(-num_rows // plan.tokens) if refs.visits is None else refs.visits.count[0]
    total = jnp.asarray(count * (plan.columns * plan.splits), jnp.int32)
    block = lax.axis_index("block")
    num_groups = refs.values[0].shape[1]

    def visit_at(visit: Any) -> tuple[Any, Any, Any]:
        if refs.visits is not None:
            return refs.visits.group[visit], refs.visits.row[visit], refs.visits.rows[visit]
        row = visit * plan.tokens
        return jnp.int32(0), row, jnp.minimum(num_rows - row, plan.tokens)

    def work_at(turn: Any) -> Work:
        rest, column = _divide(jnp.minimum(turn * plan.blocks + block, total - 1), plan.columns_together)
        rest, visit = _divide(rest, count)
        part, split = _divide(rest, plan.splits)
        group, row, rows = visit_at(visit)
        first = split * plan.depth_blocks
        end = jnp.minimum(first + plan.depth_blocks, refs.x.shape[1] // BLOCK)
        return Work(
            group=group,
            row=row,
            rows=rows,
            column=part * plan.columns_together + column,
            split=split,
            first=first,
            end=jnp.where(group < num_groups, end, first),
        )

    def body(turn: Any, carry: Any) -> Any:
        step, work, needed, next_work = carry
        work_after_next = work_at(turn + 2)
        next_needed = ahead(next_work)
        return tile(work, needed, step), next_work, next_needed, work_after_next

    turns = lax.div(total - block + plan.blocks - 1, plan.blocks)
    work = work_at(0)
    lax.fori_loop(0, turns, body, (jnp.int32(0), work, ahead(work), work_at(1)))


def _divide(number: Any, divisor: Any) -> tuple[Any, Any]:
    divisor = jnp.asarray(divisor, jnp.int32)
    return lax.div(number, divisor), lax.rem(number, divisor)
