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
from pallas_kernels.mla_decode.gpu_shared import RAW_PIECE


def convert_latents(attention: Attention, block: Array, buffer: Array, slot: Array) -> None:
    """Converts a warpgroup's own pieces."""
    shared, parts = attention.shared, attention.plan.piece // RAW_PIECE

    @pl.loop(0, attention.pieces + nought(block))
    def _(i: Array) -> None:
        piece = attention.own(i)
        for j in range(parts):
            columns = pl.ds(j * RAW_PIECE, RAW_PIECE)
            _convert(
                shared.raw_latent.at[buffer, piece * parts + j], shared.latent.at[slot, piece, :, columns]
            )


def convert_rope(attention: Attention, buffer: Array, slot: Array) -> None:
    """Converts the rope keys; the weights of the block before must not be needed any more."""
    _convert(attention.shared.raw_rope.at[buffer], attention.shared.rope.at[slot])


def _convert(source: Any, target: Any) -> None:
    values = load(source, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    values = values.astype(jnp.float32).astype(jnp.bfloat16)
    target[...] = plgpu.layout_cast(values, WGMMA)
