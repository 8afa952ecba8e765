"""What the warps of the Blackwell kernel share: its references, and the walk along the tiles of the result."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.block_scaled_matmul.gpu_blackwell_plan import BlackwellPlan
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, GpuVisits


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is traced for.

    Attributes:
        num_weights: 1, or 2 of a SwiGLU pair.
        quantized: x is FP8, with scales.
        scaled: the weights have scales.
        has_row_scale: rows of the result are multiplied.
        grouped: rows belong to groups; else one matrix has all, and visits need no table.
        num_rows: M.
        plan: tiles.
    """

    num_weights: int
    quantized: bool
    scaled: bool
    has_row_scale: bool
    grouped: bool
    num_rows: int
    plan: BlackwellPlan

    @property
    def column_panels(self) -> int:
        """Tiles of 128 columns of the result that a tile of all panels has."""
        return self.plan.panels // self.num_weights

    def panel(self, column: Any, panel: int) -> tuple[int, Any]:
        """Which weight a panel is of, and its first row, of the `column`-th tile along N."""
        which, part = divmod(panel, self.column_panels)
        return which, (column * self.column_panels + part) * BLOCK


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's references by name: operands, result, shared and tensor memory, barriers.

    Attributes:
        block: index of the thread block.
        layer ... out: arguments of `multiply`; `visits.count` holds the visits of groups, and all;
            None without groups.
        x_tiles: [stages, tokens, 128].
        x_scale_tiles: [stages, scale tokens].
        tiles: [stages * panels, 128, 128], of weights.
        out_tiles: [finishers, tokens / finishers, 128].
        converted: bfloat16 [128, ring * 128] in tensor memory.
        products: float32 [128, ring * tokens] in tensor memory.
        full: of each stage: it has been copied.
        multiplied_from: of each stage: its products are there.
        read: of each stage: warpgroups have read what they take from it themselves, tiles to convert or scales.
        ready: of each place in the ring: the tile has been converted.
        multiplied: of each place in the ring: the product is there.
        free: of each place in the ring: the product has been taken.
    """

    block: Any
    layer: Any
    visits: GpuVisits | None
    x: Any
    x_scales: Any
    values: list[Any]
    scales: list[Any]
    row_scale: Any
    out: Any
    x_tiles: Any
    x_scale_tiles: Any
    tiles: Any
    out_tiles: Any
    converted: Any
    products: Any
    full: Any
    multiplied_from: Any
    read: Any
    ready: Any
    multiplied: Any
    free: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """One tile of the result.

    Attributes:
        group: of its rows.
        eighth: where it begins, in steps of 8 rows.
        skip: rows that belong to earlier groups.
        rows: of the group, behind those.
        column: which tile along N.
        split: which part of K.
        first_block: of 128 of K.
    """

    group: Any
    eighth: Any
    skip: Any
    rows: Any
    column: Any
    split: Any
    first_block: Any

    @property
    def begin(self) -> Any:
        """First row; Mosaic has to see the multiplication, to know what divides it."""
        return self.eighth * ROW_ALIGNMENT


def num_visits(refs: Refs, shape: Shape) -> Any:
    """Tiles of rows that belong to groups."""
    if refs.visits is None:
        return -(-shape.num_rows // shape.plan.tokens)
    return refs.visits.count[0]


def num_items(refs: Refs, shape: Shape) -> Any:
    """Tiles of the result that this block makes."""
    plan = shape.plan
    total = num_visits(refs, shape) * (plan.columns * plan.splits)
    return lax.div(total - refs.block + plan.blocks - 1, jnp.int32(plan.blocks))


def work_at(refs: Refs, shape: Shape, turn: Any) -> Work:
    """This block's tile at a turn; beyond the last turn, any tile."""
    plan, visits = shape.plan, refs.visits
    count = lax.max(jnp.int32(num_visits(refs, shape)), 1)
    last = count * (plan.columns * plan.splits) - 1
    rest, column = _divide(lax.min(turn * plan.blocks + refs.block, last), plan.columns_together)
    rest, visit = _divide(rest, count)
    part, split = _divide(rest, plan.splits)
    if visits is None:
        group = skip = jnp.int32(0)
        eighth = visit * (plan.tokens // ROW_ALIGNMENT)
        rows = lax.min(shape.num_rows - visit * plan.tokens, plan.tokens)
    else:
        group = lax.min(visits.group[visit], refs.values[0].shape[1] - 1)
        eighth, skip = _divide(visits.row[visit], ROW_ALIGNMENT)
        rows = visits.rows[visit]
    return Work(
        group=group,
        eighth=eighth,
        skip=skip,
        rows=rows,
        column=part * plan.columns_together + column,
        split=split,
        first_block=split * plan.depth_blocks,
    )


def for_items(refs: Refs, shape: Shape, body: Callable[[Work, Any], None]) -> None:
    """body(work, first step) for this block's tiles, each read from memory while the one before is at work."""

    def turn(i: Any, work: Work) -> Work:
        following = work_at(refs, shape, i + 1)
        body(work, i * shape.plan.depth_blocks)
        return following

    lax.fori_loop(0, num_items(refs, shape), turn, work_at(refs, shape, jnp.int32(0)))


def _divide(number: Any, divisor: Any) -> tuple[Any, Any]:
    divisor = jnp.asarray(divisor, jnp.int32)
    return lax.div(number, divisor), lax.rem(number, divisor)
