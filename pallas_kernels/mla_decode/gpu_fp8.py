"""FP8 entries made bfloat16 in shared memory, which is exact.

The scale of a token multiplies its scores and its weights instead of its entry. Shared memory has room for one block
in bfloat16 beside the queries and two blocks as they come, so a block is converted after the product of the one before.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_compat import load
from pallas_kernels.mla_decode.gpu_attention import WGMMA, Attention, nought
from pallas_kernels.mla_decode.gpu_plan import BLOCK
from pallas_kernels.mla_decode.gpu_shared import RAW_PIECE


def convert_latents(attention: Attention, block: Array, buffer: Array, slot: Array) -> None:
    """Converts a warpgroup's own pieces; tokens that do not exist become zeros, since 0 times NaN is NaN."""
    shared, parts = attention.shared, attention.plan.piece // RAW_PIECE
    rest = attention.length - block * BLOCK

    @pl.loop(0, attention.pieces + nought(block))
    def _(i: Array) -> None:
        piece = attention.own(i)
        exists = plgpu.broadcasted_iota(jnp.int32, (BLOCK, RAW_PIECE), 0, layout=WGMMA) < rest
        for j in range(parts):
            values = _bfloat16(shared.raw_latent.at[buffer, piece * parts + j])
            target = shared.latent.at[slot, piece, :, pl.ds(j * RAW_PIECE, RAW_PIECE)]
            target[...] = jnp.where(exists, values, jnp.zeros_like(values))


def convert_rope(attention: Attention, buffer: Array, slot: Array) -> None:
    """Converts the rope keys; the weights of the block before must not be needed any more."""
    attention.shared.rope[slot] = _bfloat16(attention.shared.raw_rope.at[buffer])


def _bfloat16(source: Any) -> Array:
    values = load(source, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    return plgpu.layout_cast(values.astype(jnp.float32).astype(jnp.bfloat16), WGMMA)
