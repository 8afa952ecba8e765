"""The per-head products on a GPU: a kernel for each half of kv_b_proj, which XLA would make bfloat16 in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight
from pallas_kernels.gpu_chip import of_generation
from pallas_kernels.mla_heads import gpu_blackwell, gpu_hopper
from pallas_kernels.mla_heads.gpu_weights import KeyValueWeights
from pallas_kernels.rotary import rotate
from pallas_kernels.stack import float_values

if TYPE_CHECKING:
    from pallas_kernels.mla_heads import HeadDims

ROPE_MULTIPLE = 8
"""Heads that begin at multiples of 16 bytes."""


def unsupported(x: Array, kv_b: Weight, dims: HeadDims) -> str | None:
    """Why the kernels cannot take these queries (or this context) and weights; None if they can."""
    if x.dtype != jnp.bfloat16:
        return f"activations of {x.dtype} (expected bfloat16)"
    expected = jnp.float8_e4m3fn if isinstance(kv_b, BlockScaled) else jnp.bfloat16
    if float_values(kv_b).dtype != expected:
        return f"a weight of {float_values(kv_b).dtype} (expected bfloat16, or float8_e4m3fn in blocks)"
    rank = kv_b.shape[-1]
    if (dims.qk_nope_head_dim, dims.v_head_dim) != (BLOCK, BLOCK) or rank % BLOCK:
        return (
            f"heads of {dims.qk_nope_head_dim} and {dims.v_head_dim} dims over a latent of {rank} "
            f"(expected {BLOCK} and {BLOCK}, and a multiple of {BLOCK})"
        )
    if rank > gpu_blackwell.MAX_RANK:
        return f"a latent of {rank} dims (expected at most {gpu_blackwell.MAX_RANK})"
    if dims.qk_rope_head_dim % ROPE_MULTIPLE:
        return f"{dims.qk_rope_head_dim} rotary dims (expected a multiple of {ROPE_MULTIPLE})"
    return None


def absorb_queries(
    q: Array, rope: Array, kv_b: Weight, dims: HeadDims, layer: Array | int | None
) -> tuple[Array, Array]:
    num_rows, head_width = q.shape[0], dims.qk_nope_head_dim + dims.qk_rope_head_dim
    weights = KeyValueWeights.of(kv_b, layer)
    q_latent = (
        of_generation(gpu_hopper, gpu_blackwell)
        .absorb(q, weights, head_width)
        .reshape(num_rows, weights.heads, weights.rank)
    )
    q_rope = q.reshape(num_rows, weights.heads, head_width)[:, :, dims.qk_nope_head_dim :]
    return q_latent, rotate(q_rope, rope[:, None])


def head_values(context: Array, kv_b: Weight, dims: HeadDims, layer: Array | int | None) -> Array:
    return of_generation(gpu_hopper, gpu_blackwell).values(context, KeyValueWeights.of(kv_b, layer))
