"""The last warpgroups of the Blackwell kernel: partial sums from tensor memory to the result."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.block_scaled_matmul.gpu_blackwell_refs import Refs, Shape, Work, num_items, work_at
from pallas_kernels.gpu_compat import load, store
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, GpuVisits

PIECE = 64
"""Tokens whose partial sums are in registers at once, beside the sums so far."""
LAYOUT = plgpu.Layout.TCGEN05


def finish(refs: Refs, shape: Shape, index: Any) -> None:
    """Takes `tokens / finishers` columns of every product; scales of weights are read one step ahead."""
    plan = shape.plan
    for place in range(plan.ring):
        plgpu.barrier_arrive(refs.free.at[place])

    def finish_tile(i: Any, work: Work, scales: tuple[Any, ...]) -> None:
        sums = _sums(refs, shape, index, work, scales, i * plan.depth_blocks)
        _store_sums(refs, shape, index, work, sums)

    def first_scales(work: Work) -> tuple[Any, ...]:
        return _scales(refs, shape, work, work.first_block)

    def turn(i: Any, carry: None) -> None:
        work = work_at(refs, shape, i)
        finish_tile(i, work, first_scales(work))

    def turn_ahead(i: Any, carry: Any) -> Any:
        work, scales, following = carry
        after = work_at(refs, shape, i + 2)
        next_scales = first_scales(following)
        finish_tile(i, work, scales)
        return following, next_scales, after

    items = num_items(refs, shape)
    if plan.finishers == 1:
        # Small tiles may have little to sum: what the next needs from memory is read before.
        first, second = (work_at(refs, shape, jnp.int32(i)) for i in range(2))
        lax.fori_loop(0, items, turn_ahead, (first, first_scales(first), second))
    else:
        lax.fori_loop(0, items, turn, None)
    if refs.visits is not None:
        pl.when(index == 0)(functools.partial(_store_zeros, refs, shape, refs.visits))
    plgpu.wait_smem_to_gmem(0)


def _pieces(shape: Shape) -> tuple[int, int]:
    """Tokens of a finisher, and of a piece of them."""
    tokens = shape.plan.tokens // shape.plan.finishers
    return tokens, tokens if tokens <= PIECE else math.gcd(tokens, PIECE)


def _scales(refs: Refs, shape: Shape, work: Work, block: Any) -> tuple[Any, ...]:
    """Of a block of K in every panel; those of blocks that do not exist are not used."""
    if not shape.scaled:
        return ()
    _, _, row_blocks, depth_blocks = refs.scales[0].shape
    block = lax.min(block, depth_blocks - 1)
    numbers = []
    for panel in range(shape.plan.panels):
        which, row = shape.panel(work.column, panel)
        row_block = lax.min(lax.div(row, BLOCK), row_blocks - 1)
        numbers.append(refs.scales[which][refs.layer[0], work.group, row_block, block])
    return tuple(numbers)


def _sums(refs: Refs, shape: Shape, index: Any, work: Work, scales: tuple[Any, ...], first: Any) -> Any:
    """float32 [128, piece] for every piece of every panel."""
    plan = shape.plan
    tokens, piece = _pieces(shape)
    starts = [index * tokens + i for i in range(0, tokens, piece)]
    zeros = plgpu.layout_cast(jnp.zeros((BLOCK, piece), jnp.float32), LAYOUT)

    def add_step(k: Any, carry: Any) -> Any:
        sums, scales = carry
        step = first + k
        slot = lax.rem(step, plan.stages)
        next_scales = _scales(refs, shape, work, work.first_block + k + 1)
        x_scales: list[Array] = []
        if shape.quantized:
            plgpu.barrier_wait(refs.full.at[slot])
            x_scales = [
                load(
                    refs.x_scale_tiles.at[slot, pl.ds(start, piece)],
                    layout=LAYOUT.reduce(0),
                    optimized=False,
                )
                for start in starts
            ]
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.read.at[slot])
        totals = []
        for panel in range(plan.panels):
            place = lax.rem(step * plan.panels + panel, plan.ring)
            plgpu.barrier_wait(refs.multiplied.at[place])
            for i, start in enumerate(starts):
                part = plgpu.async_load_tmem(
                    refs.products.at[:, pl.ds(place * plan.tokens + start, piece)], layout=LAYOUT
                )
                if i == len(starts) - 1:
                    plgpu.wait_load_tmem()
                    plgpu.barrier_arrive(refs.free.at[place])
                if shape.quantized:
                    part = part * _along_tokens(x_scales[i] * scales[panel])
                elif shape.scaled:
                    part = part * scales[panel]
                totals.append(sums[panel * len(starts) + i] + part)
        return tuple(totals), next_scales

    sums = (zeros,) * (plan.panels * len(starts))
    return lax.fori_loop(0, plan.depth_blocks, add_step, (sums, scales))[0]


def _along_tokens(row: Array) -> Array:
    """float32 [128, tokens]: one number a token, from [tokens]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (BLOCK, *row.shape), (1,)), LAYOUT)


def _store_sums(refs: Refs, shape: Shape, index: Any, work: Work, sums: tuple[Array, ...]) -> None:
    """Writes the tile panel by panel: SwiGLU, a panel of a single weight, or partial sums as they are."""
    plan = shape.plan
    tokens, piece = _pieces(shape)
    pieces = tokens // piece
    partial = plan.splits > 1
    together = shape.num_weights == 2 and not partial
    for panel in range(1 if together else plan.panels):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(pieces):
            value = sums[panel * pieces + i]
            if together:
                value = _silu(value) * sums[pieces + i]
            if shape.has_row_scale:
                rows = pl.ds(work.begin + index * tokens + i * piece, piece)
                scale = load(refs.row_scale.at[rows], layout=LAYOUT.reduce(0), optimized=False)
                value = value * _along_tokens(scale)
            tile = refs.out_tiles.at[index, pl.ds(i * piece, piece)]
            value = plgpu.layout_cast(value.astype(tile.dtype), plgpu.Layout.TCGEN05_TRANSPOSED)
            store(tile.transpose((1, 0)), value)
        plgpu.commit_smem()
        which, column = shape.panel(work.column, panel)
        low = lax.max(work.skip - index * tokens, 0)
        rows = lax.min(work.skip + work.rows - index * tokens, tokens) - low
        first = work.begin + index * tokens + low
        _copy_rows(refs, index, work.split, which if partial else 0, tokens, low, first, rows, column)


def _silu(value: Array) -> Array:
    """value / (1 + exp(-value)); a division would be a call, which spills."""
    root = lax.rsqrt(1 + jnp.exp(-value))
    return value * root * root


def _copy_rows(
    refs: Refs,
    index: Any,
    split: Any,
    which: int,
    most: int,
    low: Any,
    first: Any,
    rows: Any,
    column: Any,
) -> None:
    """Copies rows of `out_tiles` from `low` on to the result, as powers of two, since a copy's size is static."""

    def copy(done: Any, size: int) -> None:
        target = refs.out.at[split, which, pl.ds(first + done, size), pl.ds(column, BLOCK)]
        plgpu.copy_smem_to_gmem(refs.out_tiles.at[index, pl.ds(low + done, size)], target)

    size = 1 << (most.bit_length() - 1)
    while size:
        whole = functools.partial(copy, rows & (-2 * size), size)
        pl.when((rows > 0) & (rows & size != 0))(whole)
        size //= 2


def _store_zeros(refs: Refs, shape: Shape, visits: GpuVisits) -> None:
    """The rows beyond the last group, whose visits come behind the others; 8 at a time."""
    plan = shape.plan
    filled, count = visits.count[0], visits.count[1]
    columns = -(-refs.out.shape[3] // BLOCK)

    @pl.when(filled < count)
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile = refs.out_tiles.at[0, pl.ds(0, ROW_ALIGNMENT)]
        zeros = jnp.zeros((BLOCK, ROW_ALIGNMENT), tile.dtype)
        store(tile.transpose((1, 0)), plgpu.layout_cast(zeros, plgpu.Layout.TCGEN05_TRANSPOSED))
        plgpu.commit_smem()

        def store_item(i: Any, carry: None) -> None:
            item = refs.block + i * plan.blocks
            visit = filled + lax.div(item, jnp.int32(columns))
            column = lax.rem(item, jnp.int32(columns)) * BLOCK
            row, rows = visits.row[visit], visits.rows[visit]

            def store_rows(j: Any, carry: None) -> None:
                done = j * ROW_ALIGNMENT
                few = lax.min(rows - done, ROW_ALIGNMENT)
                _copy_rows(refs, 0, 0, 0, ROW_ALIGNMENT, 0, row + done, few, column)

            lax.fori_loop(0, lax.div(rows + ROW_ALIGNMENT - 1, ROW_ALIGNMENT), store_rows, None)

        items = (count - filled) * columns
        lax.fori_loop(
            0, lax.div(items - refs.block + plan.blocks - 1, jnp.int32(plan.blocks)), store_item, None
        )
