"""Definition of decode attention over the latent cache, a block of entries at a time.

The loop ends with the longest row, so that a step's cost follows the tokens in the cache and not its capacity.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.decode import float8_to_float32, to_float32

KEY_BLOCK = 256


def mla_decode(
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    scale: float,
    layer: Array | int,
    cache_scales: Array | None = None,
    page_table: Array | None = None,
) -> tuple[Array, Array]:
    batch, num_queries, num_heads, rank = q_latent.shape
    width = cache.shape[-1]
    block, read_block = _reader(cache, cache_scales, layer, page_table)
    query = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32) * scale
    query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, width - query.shape[-1])))
    query = query.reshape(batch, num_queries * num_heads, width)
    last_seen = lengths[:, None] - num_queries + jnp.arange(num_queries)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, acc = state
        first, entries = read_block(i)
        position = first + jnp.arange(block)
        fresh = position >= i * block
        exists = fresh & (position < lengths[:, None])
        entries = jnp.where(exists[..., None], entries, 0)
        visible = fresh & (position <= last_seen[..., None])
        scores = _dot(query, entries, (2, 2)).reshape(batch, num_queries, num_heads, block)
        scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        safe_peak = jnp.where(jnp.isinf(new_peak), 0, new_peak)
        probabilities = jnp.exp(scores - safe_peak[..., None])
        shrink = jnp.exp(peak - safe_peak)
        part = _dot(probabilities.reshape(batch, num_queries * num_heads, block), entries, (2, 1))
        acc = acc * shrink.reshape(batch, -1, 1) + part
        return new_peak, total * shrink + probabilities.sum(-1), acc

    shape = (batch, num_queries, num_heads)
    state = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((batch, num_queries * num_heads, width), jnp.float32),
    )
    num_blocks = (jnp.max(lengths) + block - 1) // block
    peak, total, acc = lax.fori_loop(0, num_blocks, step, state)
    out = acc.reshape(*shape, width)[..., :rank] / jnp.where(total > 0, total, 1)[..., None]
    return out.astype(q_latent.dtype), peak + jnp.log(total)


def _reader(
    cache: Array, scales: Array | None, layer: Array | int, page_table: Array | None
) -> tuple[int, Callable[[Array], tuple[Array, Array]]]:
    """Size of a block, and the function that reads block i: its first position and float32 [B, block, W].

    The last block is moved back into the cache or the page table, so that it starts before `i * block`.
    """
    if page_table is None:
        batch, capacity, width = cache.shape[1:]
        block = min(KEY_BLOCK, capacity)

        def read(i: Array) -> tuple[Array, Array]:
            first = jnp.minimum(i * block, capacity - block)
            entries = lax.dynamic_slice(cache, (layer, 0, first, 0), (1, batch, block, width))[0]
            if scales is None:
                return first, _to_float32(entries, None)
            return first, _to_float32(
                entries, lax.dynamic_slice(scales, (layer, 0, 0, first), (1, batch, 1, block))[0]
            )

        return block, read

    batch, pages_a_row = page_table.shape
    page_size, width = cache.shape[2:]
    num_pages = min(max(KEY_BLOCK // page_size, 1), pages_a_row)
    block = num_pages * page_size

    def read_pages(i: Array) -> tuple[Array, Array]:
        first = jnp.minimum(i * num_pages, pages_a_row - num_pages)
        pages = lax.dynamic_slice(page_table, (0, first), (batch, num_pages))
        entries = cache.at[layer, pages].get(mode="clip").reshape(batch, block, width)
        if scales is None:
            return first * page_size, _to_float32(entries, None)
        page_scales = scales.at[layer, pages].get(mode="clip").reshape(batch, 1, block)
        return first * page_size, _to_float32(entries, page_scales)

    return block, read_pages


def _to_float32(entries: Array, scales: Array | None) -> Array:
    """Entries [B, block, W] times the scales [B, 1, block] of their tokens, made once and not where they are used."""
    if scales is None:
        return lax.optimization_barrier(to_float32(entries))
    return lax.optimization_barrier(float8_to_float32(entries, jnp.swapaxes(scales, 1, 2)))


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST)
