"""XLA's own best at what the GPU kernels do, of the same arguments: what `gpu_kernels.py` times beside them.

Weights are widened to bfloat16 in front of a product that cuBLAS or Triton makes; XLA has none that scales blocks.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_scaled import BLOCK, BlockScaled
from pallas_kernels.decode import expand_scales
from pallas_kernels.rotary import rotate


def widened(weight: BlockScaled, layer: Array) -> Array:
    """bfloat16 [..., N, K], one layer of a stack."""
    values, scales = (
        lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (weight.values, weight.scales)
    )
    factors = expand_scales(scales, *values.shape[-2:])
    return (values.astype(jnp.float32) * factors).astype(jnp.bfloat16)


def combined(products: list[Array]) -> Array:
    """One float32 product, or the SwiGLU of two, in bfloat16."""
    out = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
    return out.astype(jnp.bfloat16)


def matmul(x: Array, layer: Array, *weights: BlockScaled) -> Array:
    """[M, K] times one matrix, or two of a pair."""
    contract = (((1,), (1,)), ((), ()))
    return combined(
        [
            lax.dot_general(x, widened(weight, layer), contract, preferred_element_type=jnp.float32)
            for weight in weights
        ]
    )


def grouped(x: Array, sizes: Array, row_scale: Array | None, layer: Array, *weights: BlockScaled) -> Array:
    """Sorted rows times the matrices of their groups, by `ragged_dot`."""
    out = combined(
        [
            lax.ragged_dot(
                x, widened(weight, layer).swapaxes(1, 2), sizes, preferred_element_type=jnp.float32
            )
            for weight in weights
        ]
    )
    return out if row_scale is None else (out * row_scale[:, None]).astype(out.dtype)


def absorb_queries(q: Array, rope: Array, layer: Array, kv_b: BlockScaled) -> tuple[Array, Array]:
    """Of heads of 128 + 64 dims, and 128 of values."""
    halves = _halves(kv_b, layer)
    heads = q.reshape(q.shape[0], halves.shape[0], -1)
    q_latent = jnp.einsum("mhn,hnr->mhr", heads[..., :BLOCK], halves[:, 0])
    return q_latent, rotate(heads[..., BLOCK:], rope[:, None])


def head_values(context: Array, layer: Array, kv_b: BlockScaled) -> Array:
    """[M, H * 128] of [M, H, R]."""
    values = jnp.einsum("mhr,hvr->mhv", context, _halves(kv_b, layer)[:, 1])
    return values.reshape(context.shape[0], -1)


def causal_attention(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array) -> Array:
    """cuDNN's, of whole sequences: it wants keys for every head, and values as wide as keys."""
    rotary = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    q, k = jnp.concatenate([q_nope, q_rope], axis=-1), jnp.concatenate([k_nope, rotary], axis=-1)
    padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - v.shape[-1])))
    out = jax.nn.dot_product_attention(q, k, padded, is_causal=True, implementation="cudnn")
    return out[..., : v.shape[-1]]


def _halves(kv_b: BlockScaled, layer: Array) -> Array:
    """bfloat16 [H, 2, 128, R]."""
    matrix = widened(kv_b, layer)
    return matrix.reshape(-1, 2, BLOCK, matrix.shape[-1])
