"""Causal attention on a CPU: one head of one sequence at a time, recomputed in the backward pass.

XLA's batched dots run at a tenth of the speed of plain matrix products on a CPU when heads are as small as tiny's,
and a [B, H, T, T] array of scores falls out of the cache; a loop over (sequence, head) does neither.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

MIN_QUERY_BLOCK = 64
MAX_QUERY_BLOCKS = 8


MAX_LENGTH = 4096
"""Longer sequences would make blocks of scores that no cache holds; `reference.py` bounds them better."""


def mla_prefill_by_head(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    scale: float,
    start: None,
    segment_ids: None,
) -> Array:
    """`mla_prefill` of whole sequences, computed in float32; keys are the queries' own positions."""
    batch, length, heads = q_nope.shape[:3]
    dtype = v.dtype
    q_nope, q_rope, k_nope, k_rope, v = (a.astype(jnp.float32) for a in (q_nope, q_rope, k_nope, k_rope, v))
    q = jnp.concatenate([q_nope, q_rope], axis=-1) * scale
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    k = jnp.concatenate([k_nope, shared], axis=-1)
    out = lax.map(jax.checkpoint(_one_head), tuple(_by_head(x) for x in (q, k, v)))
    return out.reshape(batch, heads, length, -1).swapaxes(1, 2).astype(dtype)


def _by_head(x: Array) -> Array:
    """[B, T, H, D] -> [B * H, T, D]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _one_head(qkv: tuple[Array, Array, Array]) -> Array:
    """Attention of float32 [T, D], [T, D], [T, Dv], a block of queries at a time to the keys that it sees."""
    length = qkv[0].shape[0]
    size = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    return jnp.concatenate([_one_block(*qkv, start, size) for start in range(0, length, size)])


def _one_block(q: Array, k: Array, v: Array, start: int, size: int) -> Array:
    q, k, v = q[start : start + size], k[: start + size], v[: start + size]
    scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    visible = jnp.arange(k.shape[0]) <= start + jnp.arange(q.shape[0])[:, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return jnp.dot(weights, v, precision=lax.Precision.HIGHEST) / weights.sum(axis=-1, keepdims=True)
