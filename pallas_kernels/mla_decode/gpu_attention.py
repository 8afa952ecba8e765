"""What the computing warpgroups of `mla_decode`'s GPU kernels do, but for the products, which differ by generation.

Each of the two has half of the latent's columns in its accumulator. Blocks of tokens are dealt to them in turn: whose a
block is takes its softmax weights, which both halves of its latents are then multiplied by. So no product is computed
twice, and while one takes weights the other can still be adding.

Shared memory holds the queries and two blocks of entries. A block's weights are written over its rope keys, which its
scores were the last to need: same shape, same type.
"""

import abc
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_compat import load
from pallas_kernels.mla_decode.gpu_plan import BLOCK, BUFFERS, TILE_ROWS, GpuPlan
from pallas_kernels.mla_decode.gpu_shared import Shared

WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)

LOWEST = -1e30
"""Below every score, and finite: the difference of two is a number."""

NO_BLOCK = 20
"""A block's number has fewer bits. Shifted out, they are a 0 that the compiler takes for a variable: it would otherwise
compute the addresses of all operands ahead of the loop and keep them in more registers than there are."""

State = tuple[Array, ...]
"""The accumulator, in pieces of columns, relative to the largest score so far; empty where it is in tensor memory."""


class Attention(abc.ABC):
    """A computing warpgroup.

    Args:
        warpgroup: 0 or 1.
        tile: of the batch row's query rows.
        length: entries of the batch row that count.
        first, end: blocks of this split.
    """

    def __init__(
        self,
        shared: Shared,
        plan: GpuPlan,
        scale: float,
        warpgroup: Array,
        tile: Array,
        length: Array,
        first: Array,
        end: Array,
    ) -> None:
        self.shared, self.plan, self.scale, self.warpgroup = shared, plan, scale, warpgroup
        self.tile, self.length, self.first, self.end = tile, length, first, end
        self.pieces = plan.pieces // 2

    @abc.abstractmethod
    def fetch(self, block: Array, buffer: Array, slot: Array) -> None:
        """Waits for a block's entries; of an FP8 cache, converts this warpgroup's pieces of them."""

    @abc.abstractmethod
    def scores(self, block: Array, buffer: Array, slot: Array) -> Array:
        """float32 [64, BLOCK], queries times a block of this warpgroup's; its rope keys are not needed any more."""

    @abc.abstractmethod
    def add(self, block: Array, slot: Array, state: State) -> State:
        """Adds a block's latents, weighted, to the accumulator; gives the buffer of a bfloat16 block back."""

    @abc.abstractmethod
    def initial(self) -> State:
        """What the accumulator begins with."""

    @abc.abstractmethod
    def accumulated(self, state: State, i: int) -> Array:
        """float32 [64, piece], this warpgroup's i-th piece of the accumulator after the last block."""

    def run(self, out: Any, lse: Any) -> None:
        """Goes through the blocks and writes the results [64, rank] and [64]."""
        shared = self.shared
        shared.peak[self.warpgroup] = _row_vector(LOWEST)
        shared.total[self.warpgroup] = _row_vector(0.0)
        plgpu.barrier_arrive(shared.ready)
        plgpu.barrier_wait(shared.ready)

        def step(block: Array, state: State) -> State:
            buffer = lax.rem(block - self.first, BUFFERS) + nought(block)
            slot = nought(block) if self.plan.scaled else buffer
            owner = self.owner(block)
            self.fetch(block, buffer, slot)

            @pl.when(owner == self.warpgroup)
            def _() -> None:
                self._weigh(block, slot, self.scores(block, buffer, slot), self._scales(block, buffer))

            @pl.when(owner != self.warpgroup)
            def _() -> None:
                plgpu.barrier_wait(shared.weighed.at[owner])

            if self.plan.scaled:
                plgpu.barrier_arrive(shared.free.at[buffer])
            return self.add(block, slot, state)

        self._finish(lax.fori_loop(self.first, self.end, step, self.initial()), out, lse)

    def owner(self, block: Array) -> Array:
        """The warpgroup whose block it is."""
        return lax.rem(block - self.first, 2)

    def own(self, i: Array | int) -> Array:
        """The piece of the latent that this warpgroup's i-th piece of the accumulator has."""
        return self.warpgroup * self.pieces + i

    def shrink(self, block: Array) -> Array:
        """[64, piece], by what a block made weights relative to the blocks before it smaller."""
        return _across(self._load(self.shared.shrink, self.owner(block)), self.plan.piece)

    def erase(self, block: Array, slot: Array, first_piece: Array | int, num_pieces: int) -> None:
        """Writes zeros for bfloat16 tokens that do not exist: 0 times what the cache holds there could be NaN."""
        rest = self.length - block * BLOCK

        @pl.when(rest < BLOCK)
        def _() -> None:
            token = plgpu.broadcasted_iota(jnp.int32, (BLOCK, self.plan.piece), 0, layout=WGMMA)

            @pl.loop(0, num_pieces + nought(block))
            def _(i: Array) -> None:
                latent = self.shared.latent.at[slot, first_piece + i]
                entries = load(latent, layout=WGMMA)
                latent[...] = jnp.where(token < rest, entries, jnp.zeros_like(entries))

            plgpu.commit_smem()

    def _weigh(self, block: Array, slot: Array, scores: Array, scales: Array | None) -> None:
        """Weights of a block, relative to the largest score so far."""
        shared = self.shared
        factor = self.scale * math.log2(math.e)
        scores *= factor if scales is None else lax.broadcast_in_dim(scales * factor, scores.shape, (1,))
        scores = jnp.where(self._visible(block), scores, -jnp.inf)
        old = self._load(shared.peak, self.warpgroup)
        before = self._load(shared.peak, 1 - self.warpgroup)
        peak = jnp.maximum(before, jnp.max(scores, axis=1))
        shared.shrink[self.warpgroup] = jnp.exp2(before - peak)
        weights = jnp.exp2(scores - _across(peak, BLOCK))
        total = self._load(shared.total, self.warpgroup) * jnp.exp2(old - peak) + jnp.sum(weights, axis=1)
        shared.peak[self.warpgroup] = peak
        shared.total[self.warpgroup] = total
        if scales is not None:
            weights *= lax.broadcast_in_dim(scales, weights.shape, (1,))
        shared.rope[slot] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weighed.at[self.warpgroup])

    def _visible(self, block: Array) -> Array:
        """[64, BLOCK], which tokens of a block each query row sees."""
        shape = (TILE_ROWS, BLOCK)
        token = block * BLOCK + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
        last = self.length - self.plan.queries
        if self.plan.queries == 1:
            return token <= last
        first_row = self.tile * TILE_ROWS + nought(block)
        row = first_row + plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=ROW)
        last += sum((row >= i * self.plan.heads).astype(jnp.int32) for i in range(1, self.plan.queries))
        return token <= lax.broadcast_in_dim(last, shape, (0,))

    def _scales(self, block: Array, buffer: Array) -> Array | None:
        """[BLOCK], the scales of an FP8 block's tokens, 0 where there is none."""
        if not self.plan.scaled:
            return None
        token = block * BLOCK + plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=COLUMN)
        return jnp.where(token < self.length, load(self.shared.scales.at[buffer], layout=COLUMN), 0.0)

    def _finish(self, state: State, out: Any, lse: Any) -> None:
        """Divides by the sums of weights and writes the results; nothing was accumulated where nothing was seen."""
        shared = self.shared
        peaks, totals = (
            [self._load(vectors, i) for i in range(2)] for vectors in (shared.peak, shared.total)
        )
        peak = jnp.maximum(*peaks)
        total = totals[0] * jnp.exp2(peaks[0] - peak) + totals[1] * jnp.exp2(peaks[1] - peak)
        seen = total > 0
        shared.lse[self.warpgroup] = jnp.where(seen, peak * math.log(2) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            plgpu.copy_smem_to_gmem(shared.lse.at[0], lse)

        inverse = _across(1 / jnp.where(seen, total, 1.0), self.plan.piece)
        shape = (TILE_ROWS, self.plan.piece)
        for i in range(self.pieces):
            # The queries are not needed any more; float32 pieces follow each other in the same place.
            part = (
                shared.query.at[self.own(i)] if shared.results is None else shared.results.at[self.warpgroup]
            )
            mean = self.accumulated(state, i) * inverse
            part[...] = jnp.where(lax.broadcast_in_dim(seen, shape, (0,)), mean, 0.0).astype(part.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part, out.at[:, pl.ds(self.own(i) * self.plan.piece, self.plan.piece)])
            if shared.results is not None:
                plgpu.wait_smem_to_gmem(0)
        plgpu.wait_smem_to_gmem(0)

    def _load(self, vectors: Any, index: Array | int) -> Array:
        return load(vectors.at[index], layout=ROW)


def nought(block: Array) -> Array:
    """0, and the compiler does not know it."""
    return lax.shift_right_logical(block, NO_BLOCK)


def _row_vector(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), ROW)


def _across(vector: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))
