"""The Hopper kernel of `mla_decode` for FP8 caches: entries are made bfloat16 in shared memory, which is exact.

The scale of a token multiplies its scores and its weights instead of its entry. Shared memory has room for one block
in bfloat16 beside the queries and two blocks as they come, so a block is converted after the product of the one before.
Each warpgroup converts its own half of the latent's columns, which nobody else reads by then but for the scores.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_compat import load
from pallas_kernels.mla_decode.gpu_hopper_attention import COLUMN, WGMMA, Attention, State, nought
from pallas_kernels.mla_decode.gpu_hopper_shared import RAW_PIECE
from pallas_kernels.mla_decode.gpu_plan import BLOCK


class Float8Attention(Attention):
    """A computing warpgroup of a kernel for float8_e4m3fn caches."""

    def run(self) -> State:
        """Goes through the blocks: conversion, weights, product."""
        self.begin()

        def step(block: Array, state: State) -> State:
            shared = self.shared
            owner, buffer = self.owner(block), self.buffer(block)
            slot = nought(block)
            plgpu.barrier_wait(shared.full.at[buffer])

            @pl.loop(0, self.pieces + nought(block))
            def _(i: Array) -> None:
                for j in range(self.plan.piece // RAW_PIECE):
                    raw = shared.raw_latent.at[buffer, self.own(i) * (self.plan.piece // RAW_PIECE) + j]
                    _convert(raw, shared.latent.at[slot, self.own(i), :, pl.ds(j * RAW_PIECE, RAW_PIECE)])

            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.converted.at[owner])

            @pl.when(owner == self.warpgroup)
            def _() -> None:
                plgpu.barrier_wait(shared.converted.at[owner])
                # The other warpgroup is done with the weights of the block before: it has converted its half.
                _convert(shared.raw_rope.at[buffer], shared.rope.at[slot])
                plgpu.commit_smem()
                scores = self.scores(block, slot)
                token = block * BLOCK + plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=COLUMN)
                scales = load(shared.scales.at[buffer], layout=COLUMN)
                self.weigh(block, slot, scores, jnp.where(token < self.length, scales, 0.0))

            @pl.when(owner != self.warpgroup)
            def _() -> None:
                self.wait_for_weights()

            plgpu.barrier_arrive(shared.free.at[buffer])
            return self.add(block, slot, state)

        return lax.fori_loop(self.first, self.end, step, self.initial())


def _convert(source: Any, target: Any) -> None:
    values = load(source, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    values = values.astype(jnp.float32).astype(jnp.bfloat16)
    target[...] = plgpu.layout_cast(values, WGMMA)
