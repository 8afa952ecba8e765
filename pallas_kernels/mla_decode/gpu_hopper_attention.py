"""What the computing warpgroups of `mla_decode`'s Hopper kernel do.

Each of the two has half of the latent's columns in its accumulator; blocks of tokens are dealt to them in turn, and
whose a block is computes its scores and softmax weights, which both then multiply with their half of the block's
latents. So one's softmax runs beside the other's products, and no product is computed twice.

Shared memory holds the queries and two blocks of entries. A block's weights are written over its rope keys, which its
scores were the last to need: same shape, same type.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_compat import accumulate, load
from pallas_kernels.mla_decode.gpu_hopper_shared import BUFFERS, TILE_ROWS, Shared
from pallas_kernels.mla_decode.gpu_plan import BLOCK, GpuPlan

WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)

LOWEST = -1e30
"""Below every score, and finite: the difference of two is a number."""

NO_BLOCK = 20
"""A block's number has fewer bits. Shifted out, they are a 0 that the compiler takes for a variable: it would otherwise
compute the addresses of all operands ahead of the loop and keep them in more registers than there are."""

State = tuple[Array, ...]
"""The accumulator, in pieces of columns, relative to the largest score so far."""


class Attention:
    """A computing warpgroup of a kernel for bfloat16 caches."""

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

    def run(self) -> State:
        """Goes through the blocks; the next one's weights come before this one's product."""
        self.begin()
        self.weigh_own(self.first)

        def step(block: Array, state: State) -> State:
            self.weigh_own(block + 1)
            others, buffer = self.owner(block) != self.warpgroup, self.buffer(block)

            @pl.when(others)
            def _() -> None:
                plgpu.barrier_wait(self.shared.full.at[buffer])

            @pl.when(others & (block + 1 == self.end))
            def _() -> None:
                self.wait_for_weights()

            state = self.add(block, buffer, state)
            plgpu.barrier_arrive(self.shared.free.at[buffer])
            return state

        return lax.fori_loop(self.first, self.end, step, self.initial())

    def begin(self) -> None:
        """Clears what the other warpgroup will read, and waits for it and for the queries."""
        shared = self.shared
        shared.peak[self.warpgroup] = _row_vector(LOWEST)
        shared.total[self.warpgroup] = _row_vector(0.0)
        plgpu.barrier_arrive(shared.begun)
        plgpu.barrier_wait(shared.begun)
        plgpu.barrier_wait(shared.ready)

    def initial(self) -> State:
        zero = plgpu.layout_cast(jnp.zeros((TILE_ROWS, self.plan.piece), jnp.float32), WGMMA)
        return (zero,) * self.pieces

    def own(self, i: Array | int) -> Array:
        """The piece of the latent of this warpgroup's piece of the accumulator."""
        return self.warpgroup * self.pieces + i

    def owner(self, block: Array) -> Array:
        """The warpgroup whose block it is."""
        return lax.rem(block - self.first, 2)

    def buffer(self, block: Array) -> Array:
        return lax.rem(block - self.first, BUFFERS) + nought(block)

    def weigh_own(self, block: Array) -> None:
        """Weights of a block, if it exists and is this warpgroup's."""

        @pl.when((self.owner(block) == self.warpgroup) & (block < self.end))
        def _() -> None:
            buffer = self.buffer(block)
            plgpu.barrier_wait(self.shared.full.at[buffer])
            scores = self.scores(block, buffer)

            @pl.when(block > self.first)
            def _() -> None:
                self.wait_for_weights()

            self.weigh(block, buffer, scores)

    def wait_for_weights(self) -> None:
        """Waits for weights of the other warpgroup, and its largest score: once for each of its blocks."""
        plgpu.barrier_wait(self.shared.weighed.at[1 - self.warpgroup])

    def weigh(self, block: Array, slot: Array, scores: Array, scales: Array | None = None) -> None:
        """Weights of a block, relative to the largest score so far.

        Args:
            scores: products of queries and entries.
            scales: finite [BLOCK], of the tokens, or None.
        """
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

    def scores(self, block: Array, slot: Array) -> Array:
        shared = self.shared

        def multiply(scores: Any) -> Array:
            # A number of steps that the compiler does not know: unrolled, it spills.
            @pl.loop(0, self.plan.pieces + nought(block))
            def _(i: Array) -> None:
                plgpu.wgmma(
                    scores, shared.query.at[i], plgpu.transpose_ref(shared.latent.at[slot, i], (1, 0))
                )

            plgpu.wgmma(scores, shared.query_rope, plgpu.transpose_ref(shared.rope.at[slot], (1, 0)))
            return scores[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE_ROWS, BLOCK), jnp.float32))

    def _visible(self, block: Array) -> Array:
        """[64, BLOCK], which tokens of a block each query row sees."""
        shape = (TILE_ROWS, BLOCK)
        token = block * BLOCK + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
        last = self.length - self.plan.queries
        visible = token <= last
        if self.plan.queries > 1:
            row = self.tile * TILE_ROWS + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
            for i in range(1, self.plan.queries):
                visible |= (row >= i * self.plan.heads) & (token <= last + i)
        return visible

    def add(self, block: Array, slot: Array, state: State) -> State:
        """Adds a block's latents, weighted, to this warpgroup's half of the accumulator."""
        shared = self.shared
        rest = self.length - block * BLOCK

        @pl.when(rest < BLOCK)
        def _() -> None:
            self._erase(slot, rest)

        shrink = _across(self._load(shared.shrink, self.owner(block)), self.plan.piece)

        def multiply(*pieces: Any) -> None:
            for i, accumulated in enumerate(pieces):
                plgpu.wgmma(accumulated, shared.rope.at[slot], shared.latent.at[slot, self.own(i)])

        return accumulate(tuple(part * shrink for part in state), multiply)

    def _erase(self, slot: Array, rest: Array) -> None:
        """Writes zeros for tokens that do not exist: 0 times what the cache holds there could be NaN."""
        token = plgpu.broadcasted_iota(jnp.int32, (BLOCK, self.plan.piece), 0, layout=WGMMA)
        for i in range(self.pieces):
            latent = self.shared.latent.at[slot, self.own(i)]
            entries = load(latent, layout=WGMMA)
            latent[...] = jnp.where(token < rest, entries, jnp.zeros_like(entries))
        plgpu.commit_smem()

    def finish(self, state: State, out: Any, lse: Any) -> None:
        """Divides by the sums of weights and writes the results [64, rank] and [64]."""
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

        inverse = _across(jnp.where(seen, 1 / total, 0.0), self.plan.piece)
        for i in range(self.pieces):
            # The queries are not needed any more; float32 pieces follow each other in the same place.
            part = (
                shared.query.at[self.own(i)] if shared.results is None else shared.results.at[self.warpgroup]
            )
            part[...] = (state[i] * inverse).astype(part.dtype)
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
