"""`mla_cache`: the entries of new tokens are made and written into the latent cache, in place."""

from jax import Array

from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.mla_cache import plan, reference, tpu
from pallas_kernels.normalize import Norm

__all__ = ["write_entries"]


def write_entries(
    cache: Array,
    compressed: Array,
    *,
    norm: Norm,
    rope: Array,
    start: Array,
    counts: Array,
    layer: Array | int,
    norm_layer: Array | int | None = None,
    cache_scales: Array | None = None,
    page_table: Array | None = None,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Normalises, rotates and stores what later tokens attend to (`kv_norm`, `k_pe`; MLA of the release's model.py).

    The entry of a token is [RMSNorm(compressed[:rank]) ; rotate(compressed[rank:]) ; 0], in the cache's type. The
    tokens of row b stand at start[b], start[b] + 1, ...; all other entries keep their bits. Donate the cache, or carry
    it through a scan: then a TPU moves the tiles around the new tokens, and nothing else.

    Args:
        cache: [L, B, S, W]: bfloat16, float32 or float8_e4m3fn; or [L, P, page_size, W] with `page_table`.
        compressed: [B, Q, kv_lora_rank + Dr], the output of kv_a_proj_with_mqa, not longer than W.
        norm: RMSNorm of the latent; its weight [Ln, kv_lora_rank] with `norm_layer`, [kv_lora_rank] without.
        rope: float32 [B, Q, Dr], cosines of the tokens' positions, then sines.
        start: int32 [B], position of each row's first token; not negative.
        counts: int32 [B], tokens of each row that are written: the first so many of Q. Padding is on the right.
        layer: index into the cache, a scalar, possibly traced.
        norm_layer: index into the stack of norm weights, likewise.
        cache_scales: float32 [L, B, 1, S], or [L, P, 1, page_size]; an FP8 cache needs them. A stored value stands
            for value * scale, and the scale of a token is max(max|entry|, 1e-4) / 448.
        page_table: int32 [B, pages], the page that holds a row's positions i * page_size ...; no page twice among
            those written. Tokens beyond the capacity are dropped, and so are those whose page is not in 0 ... P - 1.

    Returns:
        The cache; with `cache_scales` the pair of both.

    Raises:
        ValueError: scales without an FP8 cache or the other way round.
    """
    if (cache.dtype.itemsize == 1) != (cache_scales is not None):
        raise ValueError(f"write_entries: cache_scales belong to a float8 cache; the cache is {cache.dtype}")
    # A prompt's many tokens are written by XLA in any case.
    is_step = compressed.shape[1] <= plan.MAX_TOKENS
    kernel = Kernel(tpu.write_entries, lambda: plan.unsupported(cache, compressed, page_table))
    function = choose(
        "write_entries",
        implementation,
        reference=reference.write_entries,
        tpu=kernel if is_step else Kernel(reference.write_entries),
    )
    new_cache, new_scales = function(
        cache,
        compressed,
        norm.weight,
        norm.eps,
        rope,
        start,
        counts,
        layer,
        norm_layer,
        cache_scales,
        page_table,
    )
    return new_cache if new_scales is None else (new_cache, new_scales)
