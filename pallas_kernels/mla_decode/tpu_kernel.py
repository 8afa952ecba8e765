"""Body of `mla_decode`'s TPU kernel.

The grid is (parts, batch rows of a part). A step goes through the blocks of one row; while a block is worked on, the
next one is copied, of the next row if need be, so that the memory is never idle between rows.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.mla_decode.plan import BUFFERS, Plan
from pallas_kernels.mla_decode.tpu_attention import LOWEST, Attention
from pallas_kernels.mla_decode.tpu_copies import block_range, next_row, row_end, start_copies, wait_for_copies
from pallas_kernels.mla_decode.tpu_refs import Refs


def kernel(refs: Refs, plan: Plan, scale: float, compute_dtype: jnp.dtype) -> None:
    """One row of the batch (or one part's share of it)."""
    part, step = pl.program_id(0), pl.program_id(1)
    row = step if plan.split else part * plan.rows_a_part + step
    first, end = block_range(refs, plan, row, part)
    length = refs.lengths[row]

    @pl.when(step == 0)
    def _() -> None:
        refs.slot[0] = 0
        start = next_row(refs, plan, row - 1, part)

        @pl.when(start < row_end(plan, part))
        def _() -> None:
            start_copies(refs, plan, start, block_range(refs, plan, start, part)[0], 0)

    _load_query(refs, plan, compute_dtype)
    refs.accumulator[...] = jnp.zeros_like(refs.accumulator)
    refs.peak[...] = jnp.full_like(refs.peak, LOWEST)
    refs.total[...] = jnp.zeros_like(refs.total)

    @pl.when(first < end)
    def _() -> None:
        follower = next_row(refs, plan, row, part)
        more = follower < row_end(plan, part)
        follower = jnp.where(more, follower, row)
        follower_first = block_range(refs, plan, follower, part)[0]
        first_slot = refs.slot[0]

        def begin(block: Array) -> Array:
            slot = lax.rem(first_slot + block - first, BUFFERS)
            inside = block + 1 < end

            @pl.when(inside | more)
            def _() -> None:
                next_block = jnp.where(inside, block + 1, follower_first)
                start_copies(refs, plan, jnp.where(inside, row, follower), next_block, 1 - slot)

            wait_for_copies(refs, plan, row, block, slot)
            return slot

        attend = Attention(refs, plan, scale, compute_dtype, length)
        seen_by_all = jnp.maximum(length - plan.queries + 1, 0)
        whole_end = jnp.clip(lax.div(seen_by_all, plan.block), first, end)
        lax.fori_loop(first, whole_end, lambda block, _: attend.whole(begin(block)), None)
        lax.fori_loop(whole_end, end, lambda block, _: attend.masked(begin(block), block), None)
        refs.slot[0] = lax.rem(first_slot + end - first, BUFFERS)

    _finish(refs, plan)


def _load_query(refs: Refs, plan: Plan, compute_dtype: jnp.dtype) -> None:
    rows, rank, end = plan.rows, plan.rank, plan.rank + plan.rope
    padding = refs.query.shape[0] - rows
    if padding:
        refs.query[rows:] = jnp.zeros((padding, plan.width), compute_dtype)
    if plan.width > end:
        refs.query[:rows, end:] = jnp.zeros((rows, plan.width - end), compute_dtype)
    refs.query[:rows, :rank] = refs.q_latent[0].astype(compute_dtype)
    refs.query[:rows, rank:end] = refs.q_rope[0].astype(compute_dtype)


def _finish(refs: Refs, plan: Plan) -> None:
    total = jnp.sum(refs.total[...], axis=1, keepdims=True)
    any_seen = total > 0
    inverse = jnp.where(any_seen, 1 / total, 0)
    out = refs.accumulator[...] * inverse
    refs.out[...] = out[: plan.rows, : plan.rank].reshape(refs.out.shape).astype(refs.out.dtype)
    lse = jnp.where(any_seen, (refs.peak[...] + jnp.log2(total)) * math.log(2), -jnp.inf)
    refs.lse[...] = lse.T[:1, : plan.rows].reshape(refs.lse.shape)
