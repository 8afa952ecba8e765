"""Attention of a row's queries to the blocks of the cache that lie in VMEM.

It runs over sub-blocks, written so that the scores of one do not depend on the softmax of the one before: the
compiler's scheduler lays the MXU's work over the exponentials. Maxima are kept in every lane and sums are left in 128
partial sums until a row ends, which saves relayouts.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.mla_decode.plan import Plan
from pallas_kernels.mla_decode.tpu_copies import ceil_div
from pallas_kernels.mla_decode.tpu_refs import LANES, Refs

LOWEST = -1e30
"""Start of the running maximum: below every score, yet finite, so that a row that sees nothing gives no NaN."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


class Attention:
    """Attention of a row's queries to one block, added to the running softmax.

    Scores are in units of log 2, since `exp2` is what the hardware has.
    """

    def __init__(self, refs: Refs, plan: Plan, scale: float, compute_dtype: jnp.dtype, length: Array) -> None:
        self.refs, self.plan, self.dtype, self.length = refs, plan, compute_dtype, length
        self.scale = scale * math.log2(math.e)
        self.precision = lax.Precision.HIGHEST if compute_dtype == jnp.float32 else None

    def whole(self, slot: Array) -> None:
        """A block that every query sees from end to end."""
        size = self.plan.sub_block
        count = self.plan.block // size
        buffers = (self.refs.scores, self.refs.other_scores)

        def group(rows: Any, _: Array | int) -> None:
            for i in range(count + 1):
                if i < count:
                    buffers[i % 2][:, :size] = self.product(slot, i * size, size, rows)
                if i > 0:
                    self.softmax(slot, (i - 1) * size, size, rows, buffers[(i - 1) % 2], None)

        self.groups(group)

    def masked(self, slot: Array, block: Array) -> None:
        """A block that ends beyond the row's tokens, or of which the earlier queries do not see the last."""
        size = self.plan.masked_sub_block
        tokens = jnp.minimum(self.length - block * self.plan.block, self.plan.block)

        def step(i: Array, _: None) -> None:
            offset = pl.multiple_of(i * size, size)

            def group(rows: Any, first_row: Array | int) -> None:
                position = block * self.plan.block + offset
                self.refs.scores[:, :size] = self.product(slot, offset, size, rows)
                self.softmax(slot, offset, size, rows, self.refs.scores, (position, first_row))

            self.groups(group)

        lax.fori_loop(0, ceil_div(tokens, size), step, None)

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
        score_buffer: Any,
        mask: tuple[Array, Array | int] | None,
    ) -> None:
        refs, columns = self.refs, self.plan.columns
        values = self.entries(slot, offset, size, columns)
        entry_scales = None
        if refs.scales is not None:
            entry_scales = refs.scale_buffer[slot, :, pl.ds(offset, size)]
        scores = score_buffer[:, :size] * (self.scale if entry_scales is None else self.scale * entry_scales)
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
        return lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


def _repeat(column: Array, size: int) -> Array:
    """[rows, 128], every lane the same, as wide as `size`."""
    return jnp.concatenate([column] * (size // LANES), axis=1)


def _lane_sums(weights: Array) -> Array:
    """[rows, 128]: what remains to be done of a sum over the tokens is a sum over lanes."""
    sums = weights[:, :LANES]
    for i in range(LANES, weights.shape[1], LANES):
        sums = sums + weights[:, i : i + LANES]
    return sums
