"""Tiles of the products on Blackwell."""

import dataclasses
import math

from pallas_kernels.block_scaled import BLOCK, num_blocks
from pallas_kernels.gpu_chip import KIB, gpu_chip
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, max_gpu_visits

MAX_STAGES = 16
TOKENS = {False: (16, 32, 64, 128), True: (16, 32, 64, 96)}
"""Whether weights are converted -> rows of x in a tile, the N side of tcgen05.mma; 16 is the least that it takes.

With converters, sums for 128 rows do not fit the registers: ptxas spills.
"""
RESERVED_BYTES = KIB
"""Shared memory left for barriers and for what Mosaic takes."""

# For the choice among plans only; an order of magnitude is enough.
_MEMORY_BYTES_PER_US = 8e6
_SM_BYTES_PER_US = 1e5
_TURN_US = 0.5
_SUM_US = 2.5
"""A second kernel that adds the parts of K."""


@dataclasses.dataclass(frozen=True)
class BlackwellPlan:
    """How the product is cut.

    Attributes:
        tokens: rows of x in a tile.
        scale_tokens: of which it copies scales, in multiples of 128 bytes.
        panels: tiles of 128 rows of a weight in a step: gate and up of a pair, or one or two of a single weight.
        columns: tiles along N.
        columns_together: how many of them follow each other before the next rows of x; divides `columns`.
        splits: parts of K, summed in a second kernel; their number divides that of the blocks of K.
        depth_blocks: blocks of 128 of K in a part.
        stages: steps of 128 of K in shared memory; an even number.
        ring: accumulators in tensor memory, and converted tiles; an even number.
        converters: warpgroups that convert weights; 0 where the tensor cores take them as they are.
        finishers: warpgroups that scale and add partial sums, each of a part of the tokens.
        step_bytes: copied by a step.
        blocks: persistent thread blocks.
    """

    tokens: int
    scale_tokens: int
    panels: int
    columns: int
    columns_together: int
    splits: int
    depth_blocks: int
    stages: int
    ring: int
    converters: int
    finishers: int
    step_bytes: int
    blocks: int


def choose_plan(
    num_rows: int,
    num_groups: int | None,
    num_columns: int,
    depth: int,
    num_weights: int,
    x_bytes: int,
    weight_bytes: int,
    out_bytes: int,
) -> BlackwellPlan:
    """Tiles of x that hold most groups, and parts of K where there is too little else to share out.

    Args:
        num_rows: M.
        num_groups: E; None where one matrix has all rows.
        num_columns: N.
        depth: K.
        num_weights: 1, or 2 of a pair.
        x_bytes: of an element of x; FP8 has scales.
        weight_bytes: of an element of the weights.
        out_bytes: of an element of the result.
    """
    tokens = _row_tile(num_rows, num_groups, TOKENS[weight_bytes < x_bytes])
    if num_groups is None:
        visits, splits = -(-num_rows // tokens), _divisors(num_blocks(depth))
    else:
        visits, splits = max_gpu_visits(num_groups, num_rows, tokens), [1]
    candidates = [
        _plan(
            tokens, visits, panels, split, num_columns, depth, num_weights, x_bytes, weight_bytes, out_bytes
        )
        for panels in ([2] if num_weights == 2 else [1, 2])
        for split in splits
    ]
    return min(candidates, key=lambda plan: _microseconds(plan, visits))


def _plan(
    tokens: int,
    visits: int,
    panels: int,
    splits: int,
    num_columns: int,
    depth: int,
    num_weights: int,
    x_bytes: int,
    weight_bytes: int,
    out_bytes: int,
) -> BlackwellPlan:
    chip = gpu_chip()
    assert chip is not None
    scale_tokens = max(tokens, 32)
    columns = -(-num_columns // (BLOCK * panels // num_weights))
    converts = weight_bytes < x_bytes
    # 128 x 128 sums fill the registers of one warpgroup.
    finishers = 2 if tokens * panels > BLOCK else 1
    step_bytes = BLOCK * (panels * BLOCK * weight_bytes + tokens * x_bytes)
    if x_bytes == 1:
        step_bytes += 4 * scale_tokens
    out_tile = BLOCK * tokens * (out_bytes if splits == 1 else 4)
    stages = min((chip.shared_bytes - RESERVED_BYTES - out_tile) // step_bytes, MAX_STAGES)
    return BlackwellPlan(
        tokens=tokens,
        scale_tokens=scale_tokens,
        panels=panels,
        columns=columns,
        columns_together=max(c for c in range(1, min(columns, 16) + 1) if columns % c == 0),
        splits=splits,
        depth_blocks=num_blocks(depth) // splits,
        stages=stages // 2 * 2 if panels == 1 else stages,
        # Of the 512 columns of tensor memory a converted tile takes 64.
        ring=4 if tokens <= 64 or not converts else 2,
        converters=(3 - finishers) if converts else 0,
        finishers=finishers,
        step_bytes=step_bytes,
        blocks=min(chip.sms, visits * columns * splits),
    )


def _row_tile(num_rows: int, num_groups: int | None, sizes: tuple[int, ...]) -> int:
    """Such that most groups need as few tiles as they can: a second tile reads the weights once more.

    A group's size varies about as a Poisson variable does, and its first tile begins up to 7 rows before it.
    """
    if num_groups is None:
        enough = float(num_rows)
    else:
        mean = num_rows / num_groups
        enough = mean + 2 * math.sqrt(mean) + ROW_ALIGNMENT / 2
    tiles = math.ceil(enough / sizes[-1])
    return next(size for size in sizes if size * tiles >= enough)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _microseconds(plan: BlackwellPlan, visits: int) -> float:
    """A rough estimate: all SMs share the memory, and few of them cannot take all that it gives."""
    items = visits * plan.columns * plan.splits
    item_bytes = plan.depth_blocks * plan.step_bytes
    turns = -(-items // plan.blocks)
    moving = max(items * item_bytes / _MEMORY_BYTES_PER_US, turns * item_bytes / _SM_BYTES_PER_US)
    return moving + turns * _TURN_US + (_SUM_US if plan.splits > 1 else 0)
