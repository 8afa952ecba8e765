import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import bit_patterns
from pallas_kernels.mla_decode import cache_width, combine, mla_decode
from pallas_kernels.mla_prefill import mla_prefill
from tests.kernels.definitions import attention

TOLERANCE = 1e-5  # float32 softmax over up to 700 entries
SCALE = 0.2


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("heads", [1, 2, 16])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("capacity", [40, 700])
def test_decode(heads: int, queries: int, capacity: int) -> None:
    rank, rope, batch, layer = 24, 8, 3, 1
    lengths = np.array([queries, capacity // 2, capacity], np.int32)
    cache = random((2, batch, capacity, cache_width(rank, rope)), 1)
    cache[..., rank + rope :] = 0
    for row, length in enumerate(lengths):
        cache[:, row, length:] = np.nan
    q_latent, q_rope = random((batch, queries, heads, rank), 2), random((batch, queries, heads, rope), 3)
    out, lse = mla_decode(
        *(jnp.asarray(a) for a in (q_latent, q_rope, cache, lengths)), scale=SCALE, layer=layer
    )
    query = np.concatenate([q_latent, q_rope], -1)
    for row, length in enumerate(lengths):
        for i in range(queries):
            seen = cache[layer, row, : length - queries + i + 1]
            for head in range(heads):
                expected, expected_lse = attention(
                    query[row, i, head], seen[:, : rank + rope], seen[:, :rank], SCALE
                )
                np.testing.assert_allclose(np.asarray(out)[row, i, head], expected, atol=TOLERANCE)
                np.testing.assert_allclose(np.asarray(lse)[row, i, head], expected_lse, atol=TOLERANCE)


@pytest.mark.parametrize("page_size", [0, 4, 10, 500])
@pytest.mark.parametrize("patterns", [False, True])
def test_decode_of_float8_and_pages(page_size: int, patterns: bool) -> None:
    """Each token has its own scale; pages lie anywhere, and the table's places out of use hold anything."""
    rank, rope, capacity, heads = 24, 8, 500, 2
    lengths = [300, 0, 7, 1]
    rng = np.random.default_rng(0)
    size = page_size or capacity
    pages_a_row = capacity // size
    table = rng.permutation(len(lengths) * pages_a_row).reshape(len(lengths), -1).astype(np.int32)
    if not page_size:
        table.sort(axis=0)
    shape = (1, len(lengths) * pages_a_row, size)
    values = jnp.asarray(rng.standard_normal((*shape, 128)), jnp.float8_e4m3fn)
    values = values.at[..., rank + rope :].set(0)
    scales = rng.uniform(0.5, 2, (*shape[:2], 1, size)).astype(np.float32)
    rows = (np.asarray(values, np.float32) * scales.swapaxes(-1, -2))[0, table].reshape(4, capacity, 128)
    for row, length in enumerate(lengths):
        table[row, -(-length // size) :] = 1 << 20
    q_latent, q_rope = random((4, 2, heads, rank), 2), random((4, 2, heads, rope), 3)
    out, lse = mla_decode(
        jnp.asarray(q_latent),
        jnp.asarray(q_rope),
        bit_patterns(values) if patterns else values,
        jnp.asarray(lengths, jnp.int32),
        scale=SCALE,
        layer=0,
        cache_scales=jnp.asarray(scales),
        page_table=jnp.asarray(table) if page_size else None,
    )
    for row, length in enumerate(lengths):
        for i in range(2):
            seen = rows[row, : max(length - 1 + i, 0)]
            for head in range(heads):
                got, got_lse = np.asarray(out)[row, i, head], np.asarray(lse)[row, i, head]
                if not len(seen):
                    assert not got.any()
                    assert got_lse == -np.inf
                    continue
                query = np.concatenate([q_latent[row, i, head], q_rope[row, i, head]])
                expected, expected_lse = attention(query, seen[:, : rank + rope], seen[:, :rank], SCALE)
                np.testing.assert_allclose(got, expected, atol=TOLERANCE)
                np.testing.assert_allclose(got_lse, expected_lse, atol=TOLERANCE)


def test_decode_refuses_scales_of_other_types_and_patterns_without() -> None:
    q_latent, q_rope = jnp.zeros((1, 1, 1, 24)), jnp.zeros((1, 1, 1, 8))
    scales = jnp.ones((1, 1, 1, 16))
    for dtype, given in ((jnp.uint8, None), (jnp.float32, scales)):
        with pytest.raises(ValueError, match="scales"):
            mla_decode(
                q_latent,
                q_rope,
                jnp.zeros((1, 1, 16, 128), dtype),
                jnp.ones(1, jnp.int32),
                scale=SCALE,
                layer=0,
                cache_scales=given,
            )


def test_combine() -> None:
    """Attention to a sequence is made of attention to its parts, of which some queries see nothing."""
    q_latent, q_rope = jnp.asarray(random((3, 1, 2, 24), 1)), jnp.asarray(random((3, 1, 2, 8), 2))
    cache = jnp.asarray(random((1, 3, 96, 128), 3)).at[..., 32:].set(0)
    lengths = jnp.asarray([96, 40, 0])

    def attend(first: int, size: int) -> tuple[jax.Array, jax.Array]:
        part = jnp.clip(lengths - first, 0, size)
        return mla_decode(q_latent, q_rope, cache[:, :, first : first + size], part, scale=SCALE, layer=0)

    parts = [attend(first, 32) for first in (0, 32, 64)]
    out, lse = combine(*(jnp.stack(array) for array in zip(*parts, strict=True)))
    expected, expected_lse = attend(0, 96)
    np.testing.assert_allclose(np.asarray(out), np.asarray(expected), atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(expected_lse), atol=TOLERANCE)
    assert not np.asarray(out)[2].any()
    assert np.isneginf(np.asarray(lse)[2]).all()


@pytest.mark.parametrize("length", [1, 255, 256, 257, 520])
def test_prefill(length: int) -> None:
    heads, nope, rope, width, batch, prefix = 2, 6, 4, 5, 2, 3
    start = np.array([0, prefix], np.int32)
    q_nope, q_rope = random((batch, length, heads, nope), 1), random((batch, length, heads, rope), 2)
    keys = length + prefix
    k_nope, k_rope = random((batch, keys, heads, nope), 3), random((batch, keys, rope), 4)
    v = random((batch, keys, heads, width), 5)
    # Row 0 has no prefix: its last keys are unwritten cache.
    k_nope[0, length:] = k_rope[0, length:] = v[0, length:] = np.nan
    arguments = [jnp.asarray(a) for a in (q_nope, q_rope, k_nope, k_rope, v)]
    out = np.asarray(mla_prefill(*arguments, scale=SCALE, start=jnp.asarray(start)))
    for row in range(batch):
        for t in {0, length // 2, length - 1}:
            seen = slice(0, start[row] + t + 1)
            for head in range(heads):
                q = np.concatenate([q_nope[row, t, head], q_rope[row, t, head]])
                k = np.concatenate([k_nope[row, seen, head], k_rope[row, seen]], -1)
                expected, _ = attention(q, k, v[row, seen, head], SCALE)
                np.testing.assert_allclose(out[row, t, head], expected, atol=TOLERANCE)


@pytest.mark.parametrize("lengths", [(3, 4), (1, 150, 170)])
def test_prefill_of_packed_documents(lengths: tuple[int, ...]) -> None:
    """The same as of each document by itself."""
    total = sum(lengths)
    shapes = [(2, 6), (2, 4), (2, 6), (4,), (2, 5)]
    arguments = [jnp.asarray(random((1, total, *shape), i)) for i, shape in enumerate(shapes)]
    segments = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths), jnp.int32)[None]
    packed = mla_prefill(*arguments, scale=SCALE, segment_ids=segments)
    first = 0
    for length in lengths:
        document = slice(first, first + length)
        alone = mla_prefill(*(x[:, document] for x in arguments), scale=SCALE)
        np.testing.assert_allclose(np.asarray(packed[:, document]), np.asarray(alone), atol=TOLERANCE)
        first += length


def test_prefill_gradient() -> None:
    """Blocks of queries against one block: the same derivative."""
    heads, length = 2, 300
    shapes = [(heads, 4), (heads, 2), (heads, 4), (2,), (heads, 3)]
    arguments = tuple(jnp.asarray(random((1, length, *shape), i)) for i, shape in enumerate(shapes))

    def whole(q_nope, q_rope, k_nope, k_rope, v):
        scores = jnp.einsum("bthd,bshd->bhts", q_nope, k_nope) + jnp.einsum("bthd,bsd->bhts", q_rope, k_rope)
        scores = jnp.where(jnp.tri(length, dtype=bool), scores * SCALE, -jnp.inf)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    def loss(function):
        return lambda *args: jnp.sum(jnp.sin(function(*args)))

    got = jax.grad(loss(lambda *args: mla_prefill(*args, scale=SCALE)), range(5))(*arguments)
    expected = jax.grad(loss(whole), range(5))(*arguments)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5 * float(jnp.abs(b).max()))
