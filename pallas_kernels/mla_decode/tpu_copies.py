"""Copies of the cache from HBM: which blocks of which rows, page by page, ahead of their use.

What lies beyond a row's length is not read, but for the rest of the last tile of tokens.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode.plan import Plan
from pallas_kernels.mla_decode.tpu_refs import Refs


def row_end(plan: Plan, part: Array) -> Array | int:
    """The end of a part's rows of the batch."""
    return plan.batch if plan.split else (part + 1) * plan.rows_a_part


def block_range(refs: Refs, plan: Plan, row: Array, part: Array) -> tuple[Array, Array]:
    """Blocks of a row that this part works on."""
    num_blocks = ceil_div(refs.lengths[row], plan.block)
    if not plan.split:
        return jnp.zeros_like(num_blocks), num_blocks
    return lax.div(num_blocks * part, plan.parts), lax.div(num_blocks * (part + 1), plan.parts)


def next_row(refs: Refs, plan: Plan, row: Array, part: Array) -> Array:
    """The first row after `row` that has a block for this part; the end of its rows if there is none."""
    end_of_rows = row_end(plan, part)

    def empty(candidate: Array) -> Array:
        first, end = block_range(refs, plan, jnp.minimum(candidate, plan.batch - 1), part)
        return (candidate < end_of_rows) & (first >= end)

    return lax.while_loop(empty, lambda candidate: candidate + 1, row + 1)


def _num_tokens(refs: Refs, plan: Plan, row: Array, block: Array) -> Array:
    """Tokens of a block to copy: those that exist, rounded up to the tile of the cache's type."""
    rest = refs.lengths[row] - block * plan.block
    return jnp.minimum(ceil_div(rest, plan.granule) * plan.granule, plan.block)


def start_copies(refs: Refs, plan: Plan, row: Array, block: Array, slot: Array | int) -> None:
    """Begins to bring a block of a row into a buffer."""
    tokens = _num_tokens(refs, plan, row, block)

    def copy(i: Array | int, size: Array | int | None = None) -> None:
        if size is None:
            size = pl.multiple_of(jnp.minimum(tokens - i * plan.chunk, plan.chunk), plan.granule)
        page, offset = _place(refs, plan, row, block, i)
        source = pl.ds(offset, size)
        target = pl.ds(pl.multiple_of(jnp.asarray(i * plan.chunk), plan.granule), size)
        pltpu.make_async_copy(
            refs.cache.at[refs.layer[0], page, source],
            refs.buffer.at[slot, target],
            refs.semaphore.at[0, slot],
        ).start()
        if refs.scales is not None:
            pltpu.make_async_copy(
                refs.scales.at[refs.layer[0], page, :, source],
                refs.scale_buffer.at[slot, :, target],
                refs.semaphore.at[1, slot],
            ).start()

    if plan.chunk == plan.block:
        copy(0)
        return
    together = plan.copies_together
    whole = lax.div(tokens, plan.chunk * together)

    def copy_several(i: Array, _: None) -> None:
        for k in range(together):
            copy(i * together + k, plan.chunk)

    lax.fori_loop(0, whole, copy_several, None)
    lax.fori_loop(whole * together, ceil_div(tokens, plan.chunk), lambda i, _: copy(i), None)


def _place(refs: Refs, plan: Plan, row: Array, block: Array, chunk: Array | int) -> tuple[Array, Array | int]:
    """Page of a chunk of a block, and where in the page it begins."""
    if not plan.pages_a_row:
        return row, pl.multiple_of(block * plan.block, plan.granule)
    number = block * (plan.block // plan.chunk) + chunk
    chunks_a_page = plan.page_size // plan.chunk
    page = refs.table[row * plan.pages_a_row + lax.div(number, chunks_a_page)]
    if chunks_a_page == 1:
        return page, 0
    return page, pl.multiple_of(lax.rem(number, chunks_a_page) * plan.chunk, plan.granule)


def ceil_div(a: Array, b: int) -> Array:
    """For numbers that are not negative, where it is cheaper than the division of any two integers."""
    return lax.div(a + (b - 1), b)


def wait_for_copies(refs: Refs, plan: Plan, row: Array, block: Array, slot: Array) -> None:
    """Waits for all copies of a block: a semaphore counts bytes, however many copies bring them."""
    size = pl.multiple_of(_num_tokens(refs, plan, row, block), plan.granule)
    target = refs.buffer.at[slot, pl.ds(0, size)]
    pltpu.make_async_copy(target, target, refs.semaphore.at[0, slot]).wait()
    if refs.scales is not None:
        target = refs.scale_buffer.at[slot, :, pl.ds(0, size)]
        pltpu.make_async_copy(target, target, refs.semaphore.at[1, slot]).wait()
