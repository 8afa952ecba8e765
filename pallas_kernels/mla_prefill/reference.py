"""Definition of prefill attention, a block of queries at a time so that memory does not grow with T * S."""

import jax
import jax.numpy as jnp
from jax import Array, lax

QUERY_BLOCK = 256


def mla_prefill(
    q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array, scale: float, start: Array | None
) -> Array:
    batch, length = q_nope.shape[:2]
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    last = start + length - 1
    if length <= QUERY_BLOCK:
        return _attend(q_nope, q_rope, k_nope, k_rope, v, scale, start, last)
    padding = -length % QUERY_BLOCK
    q_nope, q_rope = (_blocks(jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))) for q in (q_nope, q_rope))

    def block(args: tuple[Array, Array, Array]) -> Array:
        i, q_nope, q_rope = args
        return _attend(q_nope, q_rope, k_nope, k_rope, v, scale, start + i * QUERY_BLOCK, last)

    num_blocks = (length + padding) // QUERY_BLOCK
    out = lax.map(jax.checkpoint(block), (jnp.arange(num_blocks, dtype=jnp.int32), q_nope, q_rope))
    return out.swapaxes(0, 1).reshape(batch, length + padding, *out.shape[3:])[:, :length]


def _blocks(q: Array) -> Array:
    """[B, T, H, D] -> [T / 256, B, 256, H, D]."""
    batch, length, *rest = q.shape
    return q.reshape(batch, length // QUERY_BLOCK, QUERY_BLOCK, *rest).swapaxes(0, 1)


def _attend(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    scale: float,
    start: Array,
    last: Array,
) -> Array:
    """Queries from position `start` on; none sees beyond `last`, that of the last query that is no padding."""
    dtype = v.dtype
    q_nope, q_rope, k_nope, k_rope, v = (a.astype(jnp.float32) for a in (q_nope, q_rope, k_nope, k_rope, v))
    precision = lax.Precision.HIGHEST
    scores = jnp.einsum("bthd,bshd->bhts", q_nope, k_nope, precision=precision)
    scores += jnp.einsum("bthd,bsd->bhts", q_rope, k_rope, precision=precision)
    position = jnp.minimum(start[:, None] + jnp.arange(q_nope.shape[1]), last[:, None])
    visible = jnp.arange(k_nope.shape[1]) <= position[..., None]
    probabilities = jax.nn.softmax(jnp.where(visible[:, None], scores * scale, -jnp.inf), axis=-1)
    # 0 * NaN is NaN: what stands in unwritten cache entries must not reach an output.
    v = jnp.where(visible[:, -1, :, None, None], v, 0)
    return jnp.einsum("bhts,bshd->bthd", probabilities, v, precision=precision).astype(dtype)
