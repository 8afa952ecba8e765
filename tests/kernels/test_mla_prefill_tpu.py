import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

from pallas_kernels.mla_prefill import blocks, mla_prefill

SCALE = 0.09
FLOAT32 = 2e-5
"""Relative to the largest entry: sums of up to 700 products in float32, in another order than the reference's."""
BFLOAT16 = 2e-2
"""Relative to the largest entry: weights and derivatives of scores are rounded to 8 bits before a product."""


def arguments(
    batch: int, queries: int, keys: int, heads: int, widths: tuple[int, int, int], dtype: str
) -> list[Array]:
    nope, rope, value = widths
    shapes = [
        (batch, queries, heads, nope),
        (batch, queries, heads, rope),
        (batch, keys, heads, nope),
        (batch, keys, rope),
        (batch, keys, heads, value),
    ]
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def plant_nan(arrays: list[Array], end: list[int]) -> list[Array]:
    """NaN in the keys and values of each row from its end on: entries of a cache that nobody has written."""
    beyond = jnp.arange(arrays[2].shape[1]) >= jnp.asarray(end)[:, None]
    return arrays[:2] + [
        jnp.where(beyond.reshape(*beyond.shape, *(1,) * (x.ndim - 2)), jnp.nan, x) for x in arrays[2:]
    ]


def close(got: Array, expected: Array, tolerance: float) -> None:
    wanted = np.asarray(expected, np.float32)
    atol = tolerance * float(np.abs(wanted).max())
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=atol, rtol=0)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    queries=st.sampled_from([1, 5, 127, 128, 129, 200]),
    prefixes=st.lists(st.integers(0, 150), min_size=1, max_size=2),
    spare=st.integers(0, 40),
    heads=st.sampled_from([1, 2, 3, 16]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_chunk_behind_a_prefix(
    queries: int, prefixes: list[int], spare: int, heads: int, dtype: str
) -> None:
    keys = max(prefixes) + queries + spare
    arrays = arguments(len(prefixes), queries, keys, heads, (128, 64, 128), dtype)
    arrays = plant_nan(arrays, [prefix + queries for prefix in prefixes])
    start = jnp.asarray(prefixes, jnp.int32)
    expected = mla_prefill(*arrays, scale=SCALE, start=start, implementation="reference")
    got = jax.jit(lambda *x: mla_prefill(*x, scale=SCALE, start=start, implementation="pallas"))(*arrays)
    assert got.dtype == expected.dtype
    close(got, expected, FLOAT32 if dtype == "float32" else BFLOAT16)


def test_more_queries_and_keys_than_a_block_holds() -> None:
    arrays = plant_nan(arguments(1, 520, 700, 2, (128, 64, 128), "float32"), [660])
    start = jnp.asarray([140], jnp.int32)
    expected = mla_prefill(*arrays, scale=SCALE, start=start, implementation="reference")
    close(mla_prefill(*arrays, scale=SCALE, start=start, implementation="pallas"), expected, FLOAT32)


def test_128_heads() -> None:
    arrays = arguments(1, 3, 3, 128, (128, 64, 128), "float32")
    expected = mla_prefill(*arrays, scale=SCALE, implementation="reference")
    close(mla_prefill(*arrays, scale=SCALE, implementation="pallas"), expected, FLOAT32)


def documents(length: int) -> Array:
    """Two rows of packed documents: one in order, one whose segments return."""
    return jnp.stack([jnp.arange(length) // 70, jnp.arange(length) // 40 % 3]).astype(jnp.int32)


@pytest.mark.parametrize(
    "queries, heads, widths, packed, dtype",
    [
        (140, 2, (128, 64, 128), False, "bfloat16"),
        (200, 1, (128, 64, 128), True, "float32"),
        (9, 3, (24, 8, 40), False, "float32"),
    ],
)
def test_derivatives(
    queries: int, heads: int, widths: tuple[int, int, int], packed: bool, dtype: str
) -> None:
    segments = documents(queries) if packed else None
    batch = 2 if packed else 1
    arrays = arguments(batch, queries, queries, heads, widths, dtype)
    cotangent = arguments(batch, queries, queries, heads, widths, dtype)[4]
    results = []
    for implementation in ("pallas", "reference"):

        def run(*x: Array, implementation: str = implementation) -> tuple[Array, ...]:
            def attend(*y: Array) -> Array:
                return mla_prefill(*y, scale=SCALE, segment_ids=segments, implementation=implementation)

            out, pull_back = jax.vjp(attend, *x)
            return (out, *pull_back(cotangent))

        results.append(jax.jit(run)(*arrays))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        close(got, expected, FLOAT32 if dtype == "float32" else BFLOAT16)


def test_derivatives_behind_a_prefix_are_zero_where_no_query_looks() -> None:
    queries, prefix, keys = 130, 150, 330
    start = jnp.asarray([prefix], jnp.int32)
    clean = arguments(1, queries, keys, 2, (128, 64, 128), "float32")
    spoilt = plant_nan(clean, [prefix + queries])

    def gradient(implementation: str, arrays: list[Array]) -> tuple[Array, ...]:
        def loss(*x: Array) -> Array:
            out = mla_prefill(*x, scale=SCALE, start=start, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, range(5)))(*arrays)

    for got, expected in zip(gradient("pallas", spoilt), gradient("reference", clean), strict=True):
        close(got, expected, FLOAT32)


def test_under_shard_map_with_heads_split() -> None:
    """Every device has some heads; the keys that all heads share get the sum of their derivatives."""
    mesh = jax.make_mesh((len(jax.devices()),), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = arguments(1, 4, 4, 2 * len(jax.devices()), (128, 64, 128), "float32")
    by_head, shared = jax.P(None, None, "tensor"), jax.P()

    def gradient(implementation: str, check: bool) -> tuple[Array, ...]:
        def attend(*x: Array) -> Array:
            return mla_prefill(*x, scale=SCALE, implementation=implementation)

        specs = (by_head, by_head, by_head, shared, by_head)
        sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=check)
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(sharded(*x))), range(5)))(*arrays)

    for got, expected in zip(gradient("pallas", False), gradient("reference", True), strict=True):
        close(got, expected, FLOAT32)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 700),
    prefixes=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    packed=st.booleans(),
    held=st.sampled_from([128, 256]),
    data=st.data(),
)
def test_chunks_that_are_skipped_hold_nothing_that_is_seen(
    queries: int, prefixes: list[int], packed: bool, held: int, data: st.DataObject
) -> None:
    batch = len(prefixes)
    prefixes = [0] * batch if packed else prefixes
    keys = queries + max(prefixes) + data.draw(st.integers(0, 200))
    position = np.asarray(prefixes)[:, None] + np.arange(queries)
    seen = np.arange(keys) <= position[..., None]
    segments = None
    if packed:
        lengths = data.draw(st.lists(st.integers(1, 300), min_size=3, max_size=3))
        segment = np.resize(np.repeat([0, 1, 2], lengths), queries)
        seen[:, :, :queries] &= segment[:, None] == segment
        segments = jnp.broadcast_to(jnp.asarray(segment, jnp.int32), (batch, 1, queries))
    start = jnp.asarray(prefixes, jnp.int32)
    sizes = blocks.Sizes(held, 256, 128, 128)
    first, full, last = blocks.key_chunks(start, segments, queries, keys, sizes).reshape(3, batch, -1)
    for row, i, chunk in np.ndindex(batch, first.shape[1], -(-keys // 128)):
        part = seen[row, i * held : (i + 1) * held, chunk * 128 : (chunk + 1) * 128]
        assert first[row, i] <= chunk < last[row, i] or not part.any()
        assert not first[row, i] <= chunk < full[row, i] or (part.all() and part.shape[1] == 128)
    first, full, last = blocks.query_chunks(start, segments, queries, keys, sizes).reshape(3, batch, -1)
    for row, i, chunk in np.ndindex(batch, first.shape[1], -(-queries // 128)):
        part = seen[row, chunk * 128 : (chunk + 1) * 128, i * held : (i + 1) * held]
        assert first[row, i] <= chunk < last[row, i] or not part.any()
        assert not full[row, i] <= chunk < last[row, i] or (part.all() and part.shape[1] == held)
        assert first[row, i] <= full[row, i] <= last[row, i]


def test_a_block_above_the_diagonal_is_not_fetched() -> None:
    sizes = blocks.Sizes(256, 256, 128, 128)
    first, _, last = blocks.key_chunks(jnp.zeros(1, jnp.int32), None, 1024, 1024, sizes).reshape(3, -1)
    fetched = [[int(blocks.fetched_block(j, first[i], last[i], 2)) for j in range(4)] for i in range(4)]
    assert fetched == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]]


def test_start_and_segments_exclude_each_other() -> None:
    x = arguments(1, 4, 4, 2, (8, 4, 8), "float32")
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="at most one of start and segment_ids"):
        mla_prefill(*x, scale=SCALE, start=jnp.zeros(1, jnp.int32), segment_ids=ids)


def test_mixed_dtypes_are_refused() -> None:
    x = arguments(1, 4, 4, 2, (8, 4, 8), "float32")
    x[0] = x[0].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="does not take arrays of bfloat16 and float32"):
        mla_prefill(*x, scale=SCALE, implementation="pallas")
