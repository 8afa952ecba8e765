"""Products of `mla_decode` by wgmma: both warpgroups issue their own, and accumulate in registers."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_compat import accumulate
from pallas_kernels.mla_decode.gpu_attention import WGMMA, Attention, State, nought
from pallas_kernels.mla_decode.gpu_fp8 import convert_latents, convert_rope
from pallas_kernels.mla_decode.gpu_plan import BLOCK, TILE_ROWS


class HopperAttention(Attention):
    """A computing warpgroup on Hopper."""

    def fetch(self, block: Array, buffer: Array, slot: Array) -> None:
        plgpu.barrier_wait(self.shared.full.at[buffer])
        if self.plan.scaled:
            # Nobody else reads these pieces by now: the scores that did are behind.
            convert_latents(self, block, buffer, slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.shared.converted.at[self.owner(block)])

    def scores(self, block: Array, buffer: Array, slot: Array) -> Array:
        shared = self.shared
        if self.plan.scaled:
            plgpu.barrier_wait(shared.converted.at[self.warpgroup])
            convert_rope(self, buffer, slot)
            plgpu.commit_smem()

        def multiply(scores: Any) -> Array:
            # A number of steps that the compiler does not know: unrolled, it spills.
            @pl.loop(0, self.plan.pieces + nought(block))
            def _(i: Array) -> None:
                latent = plgpu.transpose_ref(shared.latent.at[slot, i], (1, 0))
                plgpu.wgmma(scores, shared.query.at[i], latent)

            plgpu.wgmma(scores, shared.query_rope, plgpu.transpose_ref(shared.rope.at[slot], (1, 0)))
            return scores[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE_ROWS, BLOCK), jnp.float32))

    def add(self, block: Array, slot: Array, state: State) -> State:
        if not self.plan.scaled:
            self.erase(block, slot, self.own(0), self.pieces)
        shrink = self.shrink(block)

        def multiply(*pieces: Any) -> None:
            for i, piece in enumerate(pieces):
                plgpu.wgmma(piece, self.shared.rope.at[slot], self.shared.latent.at[slot, self.own(i)])

        state = accumulate(tuple(piece * shrink for piece in state), multiply)
        if not self.plan.scaled:
            plgpu.barrier_arrive(self.shared.free.at[slot])
        return state

    def initial(self) -> State:
        zero = plgpu.layout_cast(jnp.zeros((TILE_ROWS, self.plan.piece), jnp.float32), WGMMA)
        return (zero,) * self.pieces

    def accumulated(self, state: State, i: int) -> Array:
        return state[i]
