"""`mla_decode`: attention of a few new tokens to the latent cache, in the absorbed form."""

from jax import Array

from pallas_kernels.implementation import choose
from pallas_kernels.mla_decode import reference

__all__ = ["cache_width", "mla_decode"]


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
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Attention over latent entries (`attn_impl = "absorb"` of the release's model.py; paper section 2.1.1).

    With entry j = [c_j ; k_j ; 0]: scores = scale * (q_latent . c_j + q_rope . k_j), softmax in float32, result
    sum_j p_j c_j. The Q new tokens of a row are its last Q entries; query i sees the entries 0 ... lengths - Q + i.

    Args:
        q_latent: [B, Q, H, kv_lora_rank], queries multiplied by the key half of kv_b_proj.
        q_rope: [B, Q, H, Dr], rotated.
        cache: [L, B, S, W], W = `cache_width(kv_lora_rank, Dr)`; the new tokens are in it already.
        lengths: int32 [B], entries of each row that count, the new ones included; at least Q. Rows beyond are not
            read into the result, whatever they hold.
        scale: factor of the scores.
        layer: index into the cache, a scalar, possibly traced.

    Returns:
        [B, Q, H, kv_lora_rank] in q_latent's dtype, and the scores' log-sum-exp, float32 [B, Q, H], by which parts
        of a sequence are combined.
    """
    function = choose("mla_decode", implementation, {"reference": reference.mla_decode})
    return function(q_latent, q_rope, cache, lengths, scale, layer)
