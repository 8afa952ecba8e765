"""Body of `mla_decode`'s TPU kernel: copies of the cache on one side, attention to a block on the other.

The grid is (parts, batch rows of a part). A step goes through the blocks of one row; while a block is worked on, the
next one is copied, of the next row if need be, so that the memory is never idle between rows. Blocks and pages
beyond a row's length are not read.

Attention to a block runs over sub-blocks, written so that the scores of one do not depend on the softmax of the one
before: the scheduler of the compiler lays the MXU's work over the exponentials. Maxima are kept once a lane and sums
are left in 128 partial sums until a row ends, which saves the relayouts.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode.plan import BUFFERS, Plan

LANES = 128
LOWEST = -1e30
"""Start of the running maximum: below every score, yet finite, so that a row that sees nothing gives no NaN."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


class Refs(NamedTuple):
    """The kernel's references: prefetched scalars, operands, results, scratch. `None`s where a variant has none."""

    lengths: Any
    layer: Any
    table: Any
    q_latent: Any
    q_rope: Any
    cache: Any
    scales: Any
    out: Any
    lse: Any
    buffer: Any
    scale_buffer: Any
    semaphore: Any
    slot: Any
    query: Any
    scores: tuple[Any, Any]
    accumulator: Any
    peak: Any
    total: Any


def kernel(refs: Refs, plan: Plan, scale: float, compute_dtype: jnp.dtype) -> None:
    """One row of the batch (or one part's share of it)."""
    part, step = pl.program_id(0), pl.program_id(1)
    row = step if plan.split else part * plan.rows_a_part + step
    first, end = _block_range(refs, plan, row, part)
    length = refs.lengths[row]

    @pl.when(step == 0)
    def _() -> None:
        refs.slot[0] = 0
        start = _next_row(refs, plan, row - 1, part)

        @pl.when(start < _row_end(plan, part))
        def _() -> None:
            _start(refs, plan, start, _block_range(refs, plan, start, part)[0], 0)

    _load_query(refs, plan, compute_dtype)
    refs.accumulator[...] = jnp.zeros_like(refs.accumulator)
    refs.peak[...] = jnp.full_like(refs.peak, LOWEST)
    refs.total[...] = jnp.zeros_like(refs.total)

    @pl.when(first < end)
    def _() -> None:
        follower = _next_row(refs, plan, row, part)
        more = follower < _row_end(plan, part)
        follower = jnp.where(more, follower, row)
        follower_first = _block_range(refs, plan, follower, part)[0]
        first_slot = refs.slot[0]

        def begin(block: Array) -> Array:
            slot = lax.rem(first_slot + block - first, BUFFERS)
            inside = block + 1 < end

            @pl.when(inside | more)
            def _() -> None:
                next_row = jnp.where(inside, row, follower)
                _start(refs, plan, next_row, jnp.where(inside, block + 1, follower_first), 1 - slot)

            _wait(refs, plan, row, block, slot)
            return slot

        attend = Attention(refs, plan, scale, compute_dtype, length)
        seen_by_all = jnp.maximum(length - plan.queries + 1, 0)
        whole_end = jnp.clip(seen_by_all // plan.block, first, end)
        lax.fori_loop(first, whole_end, lambda block, _: attend.whole(begin(block)), None)
        lax.fori_loop(whole_end, end, lambda block, _: attend.masked(begin(block), block), None)
        refs.slot[0] = lax.rem(first_slot + end - first, BUFFERS)

    _finish(refs, plan)


def _row_end(plan: Plan, part: Array) -> Array | int:
    return plan.batch if plan.split else (part + 1) * plan.rows_a_part


def _block_range(refs: Refs, plan: Plan, row: Array, part: Array) -> tuple[Array, Array]:
    """Blocks of a row that this part works on."""
    num_blocks = pl.cdiv(refs.lengths[row], plan.block)
    if not plan.split:
        return jnp.zeros_like(num_blocks), num_blocks
    return num_blocks * part // plan.parts, num_blocks * (part + 1) // plan.parts


def _next_row(refs: Refs, plan: Plan, row: Array, part: Array) -> Array:
    """The first row after `row` that has a block for this part; the end of its rows if there is none."""
    row_end = _row_end(plan, part)

    def empty(candidate: Array) -> Array:
        first, end = _block_range(refs, plan, jnp.minimum(candidate, plan.batch - 1), part)
        return (candidate < row_end) & (first >= end)

    return lax.while_loop(empty, lambda candidate: candidate + 1, row + 1)


def _num_tokens(refs: Refs, plan: Plan, row: Array, block: Array) -> Array:
    """Tokens of a block to copy: those that exist, rounded up to the tile of the cache's type."""
    rest = refs.lengths[row] - block * plan.block
    return jnp.minimum(pl.cdiv(rest, plan.granule) * plan.granule, plan.block)


def _start(refs: Refs, plan: Plan, row: Array, block: Array, slot: Array | int) -> None:
    tokens = _num_tokens(refs, plan, row, block)

    def copy(i: Array | int) -> None:
        token = block * plan.block + i * plan.chunk
        size = pl.multiple_of(jnp.minimum(tokens - i * plan.chunk, plan.chunk), plan.granule)
        page, offset = row, token
        if plan.pages_a_row:
            page = refs.table[row * plan.pages_a_row + token // plan.page_size]
            offset = lax.rem(token, plan.page_size)
        source = pl.ds(pl.multiple_of(offset, plan.granule), size)
        target = pl.ds(pl.multiple_of(i * plan.chunk, plan.granule), size)
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
    else:
        lax.fori_loop(0, pl.cdiv(tokens, plan.chunk), lambda i, _: copy(i), None)


def _wait(refs: Refs, plan: Plan, row: Array, block: Array, slot: Array) -> None:
    """Waits for all copies of a block: a semaphore counts bytes, however many copies bring them."""
    size = pl.multiple_of(_num_tokens(refs, plan, row, block), plan.granule)
    target = refs.buffer.at[slot, pl.ds(0, size)]
    pltpu.make_async_copy(target, target, refs.semaphore.at[0, slot]).wait()
    if refs.scales is not None:
        target = refs.scale_buffer.at[slot, :, pl.ds(0, size)]
        pltpu.make_async_copy(target, target, refs.semaphore.at[1, slot]).wait()


def _load_query(refs: Refs, plan: Plan, compute_dtype: jnp.dtype) -> None:
    rows, rank, end = plan.rows, plan.rank, plan.rank + plan.rope
    if refs.query.shape[0] > rows or plan.width > end:
        refs.query[...] = jnp.zeros_like(refs.query)
    refs.query[:rows, :rank] = refs.q_latent[0].astype(compute_dtype)
    refs.query[:rows, rank:end] = refs.q_rope[0].astype(compute_dtype)


class Attention:
    """Attention of a row's queries to one block, added to the running softmax.

    Scores are in units of log 2, since `exp2` is what the hardware has.
    """

    def __init__(
        self, refs: Refs, plan: Plan, scale: float, compute_dtype: jnp.dtype, length: Array
    ) -> None:
        self.refs, self.plan, self.dtype, self.length = refs, plan, compute_dtype, length
        self.scale = scale * math.log2(math.e)
        self.precision = lax.Precision.HIGHEST if compute_dtype == jnp.float32 else None

    def whole(self, slot: Array) -> None:
        """A block that every query sees from end to end."""
        size = self.plan.sub_block
        count = self.plan.block // size

        def group(rows: Any, _: Array | int) -> None:
            for i in range(count + 1):
                if i < count:
                    self.refs.scores[i % 2][:, :size] = self.product(slot, i * size, size, rows)
                if i > 0:
                    self.softmax(slot, (i - 1) * size, size, rows, (i - 1) % 2, None)

        self.groups(group)

    def masked(self, slot: Array, block: Array) -> None:
        """A block that ends beyond the row's tokens, or of which the earlier queries do not see the last."""
        size = self.plan.masked_sub_block
        tokens = jnp.minimum(self.length - block * self.plan.block, self.plan.block)

        def step(i: Array, _: None) -> None:
            offset = pl.multiple_of(i * size, size)

            def group(rows: Any, first_row: Array | int) -> None:
                self.refs.scores[0][:, :size] = self.product(slot, offset, size, rows)
                self.softmax(slot, offset, size, rows, 0, (block * self.plan.block + offset, first_row))

            self.groups(group)

        lax.fori_loop(0, pl.cdiv(tokens, size), step, None)

    def groups(self, function: Any) -> None:
        rows = self.plan.group_rows
        if self.plan.groups == 1:
            function(pl.ds(0, rows), 0)
            return

        def step(i: Array, _: None) -> None:
            first = pl.multiple_of(i * rows, 16)
            function(pl.ds(first, rows), first)

        lax.fori_loop(0, self.plan.groups, step, None)

    def product(self, slot: Array, offset: Array | int, size: int, rows: Any) -> Array:
        keys = self.entries(slot, offset, size, self.plan.width)
        return self.dot(self.refs.query[rows, :], keys, NT)

    def softmax(
        self,
        slot: Array,
        offset: Array | int,
        size: int,
        rows: Any,
        which: int,
        mask: tuple[Array, Array | int] | None,
    ) -> None:
        refs, columns = self.refs, self.plan.columns
        values = self.entries(slot, offset, size, columns)
        entry_scales = None
        if refs.scales is not None:
            entry_scales = refs.scale_buffer[slot, :, pl.ds(offset, size)]
        scores = refs.scores[which][:, :size] * (
            self.scale if entry_scales is None else self.scale * entry_scales
        )
        if mask is not None:
            position, first_row = mask
            scores = jnp.where(self.visible(position, first_row, size), scores, -jnp.inf)
            values = jnp.where(self.exists(position, size, 0), values, jnp.zeros_like(values))
            if entry_scales is not None:
                entry_scales = jnp.where(self.exists(position, size, 1), entry_scales, 0)
        old = refs.peak[rows, :]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        shrink = jnp.exp2(old - new)
        weights = jnp.exp2(scores - _repeat(new, size))
        refs.peak[rows, :] = new
        refs.total[rows, :] = refs.total[rows, :] * shrink + _lane_sums(weights)
        if entry_scales is not None:
            weights = weights * entry_scales
        part = self.dot(weights.astype(self.dtype), values, NN)
        refs.accumulator[rows, :] = refs.accumulator[rows, :] * _repeat(shrink, columns) + part

    def exists(self, position: Array, size: int, axis: int) -> Array:
        shape = (1, size) if axis else (size, 1)
        return position + lax.broadcasted_iota(jnp.int32, shape, axis) < self.length

    def visible(self, position: Array, first_row: Array | int, size: int) -> Array:
        if self.plan.queries == 1:
            return self.exists(position, size, 1)
        token = position + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        row = first_row + lax.broadcasted_iota(jnp.int32, (self.plan.group_rows, 1), 0)
        return token <= self.length - self.plan.queries + row // self.plan.heads

    def entries(self, slot: Array, offset: Array | int, size: int, columns: int) -> Array:
        return self.refs.buffer[slot, pl.ds(offset, size), :columns]

    def dot(self, a: Array, b: Array, dimensions: Any) -> Array:
        if self.precision is not None:
            b = b.astype(jnp.float32)
        return lax.dot_general(
            a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32
        )


def _repeat(column: Array, size: int) -> Array:
    """[rows, 128], every lane the same, as wide as `size`."""
    return jnp.concatenate([column] * (size // LANES), axis=1)


def _lane_sums(weights: Array) -> Array:
    return sum(weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES))


def _finish(refs: Refs, plan: Plan) -> None:
    total = jnp.sum(refs.total[...], axis=1, keepdims=True)
    any_seen = total > 0
    inverse = jnp.where(any_seen, 1 / total, 0)
    out = refs.accumulator[...] * inverse
    refs.out[...] = out[: plan.rows, : plan.rank].reshape(refs.out.shape).astype(refs.out.dtype)
    lse = jnp.where(any_seen, (refs.peak[...] + jnp.log2(total)) * math.log(2), -jnp.inf)
    refs.lse[...] = lse.T[:1, : plan.rows].reshape(refs.lse.shape)
