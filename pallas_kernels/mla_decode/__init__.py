"""`mla_decode`: attention of a few new tokens to the latent cache, in the absorbed form."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.mla_decode import gpu, reference, tpu
from pallas_kernels.mla_decode.combine import combine
from pallas_kernels.mla_decode.plan import unsupported

__all__ = ["cache_width", "combine", "mla_decode"]


def cache_width(kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Width of a cache entry: latent, rope key, and zeros up to a multiple of 128 (the lane tile of a TPU).

    A last dimension that is no multiple of it makes the TPU compiler copy the whole cache at every call.
    """
    return -(-(kv_lora_rank + qk_rope_head_dim) // 128) * 128


def mla_decode(
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    *,
    scale: float,
    layer: Array | int,
    cache_scales: Array | None = None,
    page_table: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Attention over latent entries (`attn_impl = "absorb"` of the release's model.py; paper section 2.1.1).

    With entry j = [c_j ; k_j ; 0]: scores = scale * (q_latent . c_j + q_rope . k_j), softmax in float32, result
    sum_j p_j c_j. The Q new tokens of a row are its last Q entries; query i sees the entries 0 ... lengths - Q + i.

    Args:
        q_latent: [B, Q, H, kv_lora_rank], queries multiplied by the key half of kv_b_proj.
        q_rope: [B, Q, H, Dr], rotated.
        cache: [L, B, S, W], W = `cache_width(kv_lora_rank, Dr)`, or with a page table [L, P, page_size, W]; the new
            tokens are in it already. bfloat16, float32 or float8_e4m3fn.
        lengths: int32 [B], entries of each row that count, the new ones included; 0 for a row that is not in use.
            Entries beyond do not enter the result, whatever they hold; the kernel does not even read their pages.
        scale: factor of the scores.
        layer: index into the cache, a scalar, possibly traced.
        cache_scales: float32 [L, B, 1, S], or [L, P, 1, page_size], for a float8_e4m3fn cache: the value of an
            entry is what the cache holds times the scale of its token.
        page_table: int32 [B, pages_a_row]: token t of row b is entry t % page_size of page
            `page_table[b, t // page_size]`. Elements beyond a row's tokens may hold anything.
        implementation: "pallas", "reference", or None for the platform's own.

    Returns:
        [B, Q, H, kv_lora_rank] in q_latent's dtype, and the scores' log-sum-exp, float32 [B, Q, H], by which parts
        of a sequence are combined (`combine`). A query that sees no entry has result 0 and log-sum-exp -inf.

    Raises:
        ValueError: the implementation does not exist here or does not take these arguments, or the cache is not
            of a type that has scales.
    """
    if cache_scales is not None and cache.dtype not in (jnp.float8_e4m3fn, jnp.uint8):
        raise ValueError(f"mla_decode: scales for a cache of {cache.dtype}; expected float8_e4m3fn")
    if cache_scales is None and cache.dtype == jnp.uint8:
        raise ValueError("mla_decode: a cache of bit patterns of float8_e4m3fn without scales")
    function = choose(
        "mla_decode",
        implementation,
        reference=reference.mla_decode,
        tpu=Kernel(tpu.mla_decode, lambda: unsupported(q_latent, q_rope, cache, page_table)),
        gpu=Kernel(gpu.mla_decode, lambda: gpu.unsupported(q_latent, q_rope, cache, page_table)),
    )
    return function(q_latent, q_rope, cache, lengths, scale, layer, cache_scales, page_table)
