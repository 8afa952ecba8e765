"""Definition of prefill attention, a block of queries at a time so that memory does not grow with T * S."""

import jax
import jax.numpy as jnp
from jax import Array, lax

QUERY_BLOCK = 256


def mla_prefill(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    scale: float,
    start: Array | None,
    segment_ids: Array | None,
) -> Array:
    batch, length = q_nope.shape[:2]
    keys = (k_nope, k_rope, v)
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    last = start + length - 1
    if length <= QUERY_BLOCK:
        return _attend(q_nope, q_rope, segment_ids, keys, segment_ids, scale, start, last)
    padding = -length % QUERY_BLOCK
    q_nope, q_rope = (_blocks(jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))) for q in (q_nope, q_rope))
    segments = segment_ids
    if segment_ids is not None:
        # A padded query stands where the last one does, so it has to see a key there.
        segments = _blocks(jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge"))

    def block(args: tuple[Array, Array, Array, Array | None]) -> Array:
        i, q_nope, q_rope, segments = args
        first = start + i * QUERY_BLOCK
        return _attend(q_nope, q_rope, segments, keys, segment_ids, scale, first, last)

    num_blocks = (length + padding) // QUERY_BLOCK
    blocks = (jnp.arange(num_blocks, dtype=jnp.int32), q_nope, q_rope, segments)
    out = lax.map(jax.checkpoint(block), blocks)
    return out.swapaxes(0, 1).reshape(batch, length + padding, *out.shape[3:])[:, :length]


def _blocks(q: Array) -> Array:
    """[B, T, ...] -> [T / 256, B, 256, ...]."""
    batch, length, *rest = q.shape
    return q.reshape(batch, length // QUERY_BLOCK, QUERY_BLOCK, *rest).swapaxes(0, 1)


def _attend(
    q_nope: Array,
    q_rope: Array,
    segments: Array | None,
    keys: tuple[Array, Array, Array],
    key_segments: Array | None,
    scale: float,
    start: Array,
    last: Array,
) -> Array:
    """Queries from position `start` on; none sees beyond `last`, that of the last query that is no padding."""
    dtype = keys[2].dtype
    q_nope, q_rope, k_nope, k_rope, v = (a.astype(jnp.float32) for a in (q_nope, q_rope, *keys))
    precision = lax.Precision.HIGHEST
    scores = jnp.einsum("bthd,bshd->bhts", q_nope, k_nope, precision=precision)
    scores += jnp.einsum("bthd,bsd->bhts", q_rope, k_rope, precision=precision)
    position = jnp.minimum(start[:, None] + jnp.arange(q_nope.shape[1]), last[:, None])
    before = jnp.arange(k_nope.shape[1]) <= position[..., None]
    visible = before
    if segments is not None and key_segments is not None:
        beyond = k_nope.shape[1] - key_segments.shape[1]
        visible &= segments[..., None] == jnp.pad(key_segments, ((0, 0), (0, beyond)))[:, None]
    probabilities = jax.nn.softmax(jnp.where(visible[:, None], scores * scale, -jnp.inf), axis=-1)
    # 0 * NaN is NaN: what stands in unwritten cache entries must not reach an output.
    v = jnp.where(before[:, -1, :, None, None], v, 0)
    return jnp.einsum("bhts,bshd->bthd", probabilities, v, precision=precision).astype(dtype)
