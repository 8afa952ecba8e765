"""Products of `mla_decode` by tcgen05, issued by the warpgroup whose a block is.

The accumulator is in tensor memory, where each warpgroup makes its half of the columns smaller before a block is added.
(Products of a block that are added to an accumulator in registers would wait less, but spilled.)
"""

import functools

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.gpu_attention import Attention, State, nought
from pallas_kernels.mla_decode.gpu_fp8 import convert_latents, convert_rope


class BlackwellAttention(Attention):
    """A computing warpgroup on Blackwell."""

    def fetch(self, block: Array, buffer: Array, slot: Array) -> None:
        owner = self.owner(block)
        if self.plan.scaled:

            @pl.when(block > self.first)
            def _() -> None:
                plgpu.barrier_wait(self.shared.multiplied)

            plgpu.barrier_wait(self.shared.full.at[buffer])
            convert_latents(self, block, buffer, slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.shared.converted.at[owner])

    def scores(self, block: Array, buffer: Array, slot: Array) -> Array:
        shared = self.shared
        if self.plan.scaled:
            convert_rope(self, buffer, slot)
            plgpu.commit_smem()
            plgpu.barrier_wait(shared.converted.at[self.warpgroup])
        else:
            plgpu.barrier_wait(shared.full.at[buffer])

        # A number of steps that the compiler does not know: unrolled, it spills.
        @pl.loop(0, self.plan.pieces + nought(block))
        def _(i: Array) -> None:
            latent = plgpu.transpose_ref(shared.latent.at[slot, i], (1, 0))
            plgpu.tcgen05_mma(shared.score, shared.query.at[i], latent, accumulate=i > 0)

        plgpu.tcgen05_mma(shared.score, shared.query_rope, plgpu.transpose_ref(shared.rope.at[slot], (1, 0)))
        plgpu.tcgen05_commit_arrive(shared.scored.at[self.warpgroup])
        plgpu.barrier_wait(shared.scored.at[self.warpgroup])
        if not self.plan.scaled:
            self.erase(block, slot, 0, self.plan.pieces)
        scores = plgpu.async_load_tmem(shared.score)
        plgpu.wait_load_tmem()
        return scores

    def add(self, block: Array, slot: Array, state: State) -> State:
        shared, owner = self.shared, self.owner(block)

        @pl.when(block > self.first)
        def _() -> None:
            if not self.plan.scaled:
                plgpu.barrier_wait(shared.multiplied)
            self._shrink(block)

        plgpu.barrier_arrive(shared.shrunk.at[owner])

        @pl.when(owner == self.warpgroup)
        def _() -> None:
            plgpu.barrier_wait(shared.shrunk.at[owner])
            for i, accumulator in enumerate(shared.accumulator):
                latent = shared.latent.at[slot, i]
                more = block > self.first
                plgpu.tcgen05_mma(accumulator, shared.rope.at[slot], latent, accumulate=more)
            plgpu.tcgen05_commit_arrive(shared.multiplied)
            if not self.plan.scaled:
                plgpu.tcgen05_commit_arrive(shared.free.at[slot])

        return state

    def _shrink(self, block: Array) -> None:
        """Makes this warpgroup's pieces of the accumulator relative to a block's largest scores."""
        for which in range(2):

            @pl.when(self.warpgroup == which)
            def _(which: int = which) -> None:
                shrink = self.shrink(block)
                for i in range(self.pieces):
                    piece = self.shared.accumulator[which * self.pieces + i]
                    value = plgpu.async_load_tmem(piece)
                    plgpu.wait_load_tmem()
                    plgpu.async_store_tmem(piece, value * shrink)
                plgpu.commit_tmem()

    def initial(self) -> State:
        return ()

    def accumulated(self, state: State, i: int) -> Array:
        if i == 0:

            @pl.when(self.end > self.first)
            def _() -> None:
                plgpu.barrier_wait(self.shared.multiplied)

        pieces = self.shared.accumulator[i], self.shared.accumulator[self.pieces + i]
        loads = [functools.partial(plgpu.async_load_tmem, piece) for piece in pieces]
        value = lax.cond(self.warpgroup == 0, *loads)
        plgpu.wait_load_tmem()
        return value
