"""The GPU kernels of `mla_decode`: interpreted on a CPU, and run on a GPU where there is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu_chip
from pallas_kernels.gpu_chip import GpuChip
from pallas_kernels.mla_decode import gpu, mla_decode
from tests.kernels.gpu_matmul import interpreted, on_gpu
from tests.kernels.test_mla_decode_tpu import LSE_TOLERANCE, ROPE, SCALE, TOLERANCE, Inputs, make_inputs

GENERATIONS = ("hopper", "blackwell")


def check(inputs: Inputs, layer: int = 1) -> None:
    """The kernel against the reference, with the tolerances of the TPU's kernel: the same roundings, at most."""
    options = {"cache_scales": None, "page_table": None} | inputs.options
    arguments = (inputs.q_latent, inputs.q_rope, inputs.cache, inputs.lengths)
    assert gpu.unsupported(inputs.q_latent, inputs.q_rope, inputs.cache, options["page_table"]) is None
    out, lse = jax.jit(lambda layer: gpu.mla_decode(*arguments, SCALE, layer, **options))(jnp.int32(layer))
    expected, expected_lse = mla_decode(
        *arguments, scale=SCALE, layer=layer, implementation="reference", **inputs.options
    )
    assert (out.dtype, out.shape, lse.shape) == (inputs.q_latent.dtype, expected.shape, expected_lse.shape)
    tolerance = TOLERANCE[inputs.cache.dtype.name]
    out, expected = (np.asarray(array, np.float32) for array in (out, expected))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(expected_lse), atol=LSE_TOLERANCE)


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The generation in force, with 4 SMs: a row or two have their tokens split."""
    monkeypatch.setattr(gpu_chip, "_KINDS", ((".*", GpuChip(request.param, 4)),))
    monkeypatch.setattr(gpu_chip, "target", lambda: ("gpu", "of the test"))
    return request.param


@interpreted
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("lengths", "heads", "queries", "page_size", "layer"),
    [
        ([0, 1, 65, 200, 384], 5, 3, 0, 0),  # rows shorter than the queries are many
        ([64, 127], 16, 2, 128, 1),
        ([129, 3], 24, 1, 32, 0),  # pages smaller than a block
    ],
)
def test_short_rows(
    generation: str,
    lengths: list[int],
    heads: int,
    queries: int,
    page_size: int,
    layer: int,
    cache_dtype: str,
) -> None:
    """Empty rows, one token, ends of blocks and pages; whatever lies beyond is NaN."""
    check(
        make_inputs(
            lengths, heads=heads, queries=queries, capacity=384, page_size=page_size, cache_dtype=cache_dtype
        ),
        layer,
    )


@interpreted
@pytest.mark.parametrize(("lengths", "page_size"), [([1027], 0), ([65, 1000], 64)])
def test_split_rows(generation: str, lengths: list[int], page_size: int) -> None:
    """Rows whose tokens several thread blocks share, some of which get none."""
    check(make_inputs(lengths, heads=4, queries=2, capacity=1152, page_size=page_size))


@interpreted
@pytest.mark.parametrize(("heads", "queries"), [(128, 1), (48, 4)])
def test_many_query_rows(generation: str, heads: int, queries: int) -> None:
    """Several tiles of query rows; tiles with rows of several queries."""
    check(make_inputs([70], heads=heads, queries=queries, capacity=128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": jnp.zeros((2, 1, 256, 256), jnp.float32)}, "cache of float32"),
        ({"q_latent": jnp.zeros((1, 1, 2, 128), jnp.float32)}, "q_latent of float32"),
        ({"q_latent": jnp.zeros((1, 1, 2, 96), jnp.bfloat16)}, "a latent 96 wide"),
        ({"q_rope": jnp.zeros((1, 1, 2, 96), jnp.bfloat16)}, "rope keys 96 wide"),
        ({"cache": jnp.zeros((2, 1, 256, 144), jnp.bfloat16)}, "a cache 144 wide"),
        ({"cache": jnp.zeros((2, 1, 20, 256), jnp.bfloat16)}, "a capacity of 20 tokens"),
        ({"q_latent": jnp.zeros((1, 9, 2, 128), jnp.bfloat16)}, "9 queries a row"),
    ],
)
def test_unsupported(change: dict, message: str) -> None:
    inputs = dataclasses.replace(make_inputs([20], heads=2), **change)
    reason = gpu.unsupported(inputs.q_latent, inputs.q_rope, inputs.cache, None)
    assert reason is not None
    assert message in reason


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "capacity", "page_size", "cache_dtype"),
    [
        pytest.param(8, 128, 1, 4096, 0, "bfloat16", marks=on_gpu),
        pytest.param(8, 16, 2, 4096, 64, "bfloat16", marks=on_gpu),
        pytest.param(64, 128, 2, 2048, 64, "bfloat16", marks=on_gpu),
        pytest.param(8, 128, 1, 4096, 0, "float8_e4m3fn", marks=on_gpu),
        pytest.param(1, 16, 4, 131072, 64, "float8_e4m3fn", marks=on_gpu),
    ],
)
def test_on_a_gpu(
    batch: int, heads: int, queries: int, capacity: int, page_size: int, cache_dtype: str
) -> None:
    """V3's shapes, rows of mixed lengths."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    page = page_size or capacity
    pages = batch * capacity // page
    lengths = jax.random.randint(next(keys), (batch,), 1, capacity + 1).at[0].set(capacity)
    cache = jax.random.normal(next(keys), (2, pages, page, 640)).astype(cache_dtype).at[..., 576:].set(0)
    q_latent = jax.random.normal(next(keys), (batch, queries, heads, 512), jnp.bfloat16)
    q_rope = jax.random.normal(next(keys), (batch, queries, heads, ROPE), jnp.bfloat16)
    options = {}
    if page_size:
        table = jax.random.permutation(next(keys), pages).reshape(batch, -1)
        options["page_table"] = table.astype(jnp.int32)
    if cache_dtype == "float8_e4m3fn":
        options["cache_scales"] = jnp.full((2, pages, 1, page), 0.75, jnp.float32)
    got, expected = (
        mla_decode(
            q_latent, q_rope, cache, lengths, scale=0.04, layer=1, implementation=implementation, **options
        )
        for implementation in ("pallas", "reference")
    )
    tolerance = TOLERANCE[cache_dtype]
    np.testing.assert_allclose(
        np.asarray(got[0], np.float32), np.asarray(expected[0], np.float32), atol=tolerance, rtol=tolerance
    )
    # Scores are some 25 large here, and the kernel's exponentials and logarithm are approximate.
    np.testing.assert_allclose(np.asarray(got[1]), np.asarray(expected[1]), atol=1e-3)
