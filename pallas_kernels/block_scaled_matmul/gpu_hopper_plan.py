"""Tiles of the products on Hopper."""

import dataclasses
import math

from pallas_kernels.block_scaled import BLOCK, num_blocks
from pallas_kernels.gpu_chip import KIB, gpu_chip
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, max_gpu_visits

WARPGROUP_ROWS = 64
"""Rows of the weight that a warpgroup multiplies: the M side of wgmma."""
WARPGROUPS = 2
MAX_STAGES = 16
_MAX_TOKENS = {(1, 2): 160, (2, 2): 96, (1, 1): 192, (2, 1): 128}
"""Weights, bytes of an element of x -> rows of x whose sums and fresh accumulators fit the registers."""
MIN_PART = 4
"""Blocks of 128 of K."""
SM_BYTES_A_MICROSECOND, MEMORY_BYTES_A_MICROSECOND, SUM_MICROSECONDS = 45_000, 25_000, 2
"""Estimates: weights that one SM converts and multiplies, an SM's share of an H100's memory, another kernel."""
RESERVED_BYTES = 4 * KIB
"""Shared memory left for barriers and for what Mosaic takes."""


@dataclasses.dataclass(frozen=True)
class HopperPlan:
    """How the product is cut.

    Attributes:
        tokens: rows of x in a tile.
        scale_tokens: of which it copies scales, in multiples of 128 bytes.
        warpgroups: that multiply, each `WARPGROUP_ROWS` rows of the weight, or of each of a pair.
        columns: tiles along N.
        columns_together: how many of them follow each other before the next rows of x; divides `columns`.
        splits: parts of K, summed in a second step.
        depth_blocks: blocks of 128 of K in a part.
        stages: steps of 128 of K in shared memory.
        step_bytes: copied by a step.
        blocks: persistent thread blocks.
    """

    tokens: int
    scale_tokens: int
    warpgroups: int
    columns: int
    columns_together: int
    splits: int
    depth_blocks: int
    stages: int
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
) -> HopperPlan:
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
    chip = gpu_chip()
    assert chip is not None
    tokens = _row_tile(num_rows, num_groups, _MAX_TOKENS[num_weights, x_bytes])
    scale_tokens = -(-tokens // 32) * 32
    rows = WARPGROUPS * WARPGROUP_ROWS
    columns = -(-num_columns // rows)
    visits = -(-num_rows // tokens)
    if num_groups is not None:
        visits = max_gpu_visits(num_groups, num_rows, tokens)
    depth_blocks = num_blocks(depth)
    weight_size = num_weights * weight_bytes * num_columns * depth * min(visits, num_groups or 1)
    splits = _splits(chip.sms, visits * columns, depth_blocks, weight_size)
    part = -(-depth_blocks // splits)
    splits = -(-depth_blocks // part)
    step_bytes = BLOCK * (num_weights * rows * weight_bytes + tokens * x_bytes)
    if x_bytes == 1:
        step_bytes += 4 * scale_tokens
    out_tile = rows * tokens * (out_bytes if splits == 1 else 4)
    stages = min((chip.shared_bytes - RESERVED_BYTES - out_tile) // step_bytes, MAX_STAGES)
    return HopperPlan(
        tokens=tokens,
        scale_tokens=scale_tokens,
        warpgroups=WARPGROUPS,
        columns=columns,
        columns_together=max(c for c in range(1, min(columns, 16) + 1) if columns % c == 0),
        splits=splits,
        depth_blocks=part,
        stages=stages,
        step_bytes=step_bytes,
        blocks=min(chip.sms, visits * columns * splits),
    )


def _row_tile(num_rows: int, num_groups: int | None, largest: int) -> int:
    """A multiple of 8 such that most groups need as few tiles as they can.

    A group's size varies about as a Poisson variable does, and it begins up to 7 rows into its tile; a second tile
    reads the weights once more.
    """
    if num_groups is None:
        enough = float(num_rows)
    else:
        mean = num_rows / num_groups
        enough = mean + 2 * math.sqrt(mean) + ROW_ALIGNMENT - 1
    tiles = math.ceil(enough / largest)
    return math.ceil(enough / tiles / ROW_ALIGNMENT) * ROW_ALIGNMENT


def _splits(sms: int, tiles: int, depth_blocks: int, weight_size: int) -> int:
    """Parts of K for the shortest estimated time, if every part has `MIN_PART` blocks and an SM of its own."""

    def microseconds(splits: int) -> float:
        rate = min(sms * MEMORY_BYTES_A_MICROSECOND, tiles * splits * SM_BYTES_A_MICROSECOND)
        return weight_size / rate + (SUM_MICROSECONDS if splits > 1 else 0)

    most = max(min(sms // tiles, depth_blocks // MIN_PART), 1)
    return min(range(1, most + 1), key=microseconds)
