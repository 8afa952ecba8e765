"""Definition of decode attention over the latent cache, a block of entries at a time.

The loop ends with the longest row, so that a step's cost follows the tokens in the cache and not its capacity.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.decode import to_float32

KEY_BLOCK = 256


def mla_decode(
    q_latent: Array, q_rope: Array, cache: Array, lengths: Array, scale: float, layer: Array | int
) -> tuple[Array, Array]:
    batch, num_queries, num_heads, rank = q_latent.shape
    capacity, width = cache.shape[2:]
    block = min(KEY_BLOCK, capacity)
    query = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32) * scale
    query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, width - query.shape[-1])))
    query = query.reshape(batch, num_queries * num_heads, width)
    last_seen = lengths[:, None] - num_queries + jnp.arange(num_queries)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, acc = state
        # The last block is moved back into the cache; entries seen before are masked.
        first = jnp.minimum(i * block, capacity - block)
        entries = lax.dynamic_slice(cache, (layer, 0, first, 0), (1, batch, block, width))[0]
        entries = lax.optimization_barrier(to_float32(entries))
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
    out = acc.reshape(*shape, width)[..., :rank] / total[..., None]
    return out.astype(q_latent.dtype), peak + jnp.log(total)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST)
