"""The TPU kernel of `mla_decode`, interpreted, against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.chip import CHIPS
from pallas_kernels.mla_decode import mla_decode, tpu

RANK, ROPE, WIDTH = 128, 64, 256
SCALE = 0.1
NOWHERE = 1 << 20
"""A page that does not exist: the interpreter refuses to read it."""

TOLERANCE = {
    "float32": 1e-5,  # the same sums in another order
    # Softmax weights are rounded to bfloat16, an error of 2^-9 of each of up to 4, and so is the result.
    "bfloat16": 2**-6,
    "float8_e4m3fn": 2**-6,
}
LSE_TOLERANCE = 2e-5  # float32 in both, up to 2 * log(2560) large


@dataclasses.dataclass
class Inputs:
    """Arguments of `mla_decode`; whatever a row does not own is NaN, inf or a page that does not exist."""

    q_latent: jax.Array
    q_rope: jax.Array
    cache: jax.Array
    lengths: jax.Array
    options: dict

    def run(self, implementation: str) -> tuple[np.ndarray, np.ndarray]:
        out, lse = mla_decode(
            self.q_latent,
            self.q_rope,
            self.cache,
            self.lengths,
            scale=SCALE,
            layer=1,
            implementation=implementation,
            **self.options,
        )
        return np.asarray(out, np.float32), np.asarray(lse)

    def check(self) -> None:
        expected, expected_lse = self.run("reference")
        assert np.isfinite(expected).all()
        out, lse = self.run("pallas")
        tolerance = TOLERANCE[self.cache.dtype.name]
        np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(lse, expected_lse, atol=LSE_TOLERANCE)


def make_inputs(
    lengths: list[int],
    *,
    heads: int,
    queries: int = 1,
    capacity: int = 256,
    page_size: int = 0,
    cache_dtype: str = "bfloat16",
    query_dtype: str | None = None,
    seed: int = 0,
) -> Inputs:
    rng = np.random.default_rng(seed)
    batch, scaled = len(lengths), cache_dtype == "float8_e4m3fn"
    page_size = page_size or capacity
    pages_a_row = capacity // page_size
    num_pages = batch * pages_a_row + (2 if pages_a_row > 1 else 0)
    cache = np.full((2, num_pages, page_size, WIDTH), np.nan, np.float32)
    scales = np.full((2, num_pages, 1, page_size), np.inf, np.float32)
    table = np.full((batch, pages_a_row), NOWHERE, np.int32)
    places = np.arange(num_pages) if pages_a_row == 1 else rng.permutation(num_pages)
    for row, length in enumerate(lengths):
        for i in range(-(-length // page_size)):
            page, tokens = places[row * pages_a_row + i], min(length - i * page_size, page_size)
            table[row, i] = page
            cache[:, page, :tokens] = rng.standard_normal((2, tokens, WIDTH))
            cache[:, page, :tokens, RANK + ROPE :] = 0
            scales[:, page, 0, :tokens] = rng.uniform(0.5, 2, (2, tokens))
    query_dtype = query_dtype or ("float32" if cache_dtype == "float32" else "bfloat16")
    options = {}
    if pages_a_row > 1:
        options["page_table"] = jnp.asarray(table)
    if scaled:
        options["cache_scales"] = jnp.asarray(scales)
    return Inputs(
        jnp.asarray(rng.standard_normal((batch, queries, heads, RANK)), query_dtype),
        jnp.asarray(rng.standard_normal((batch, queries, heads, ROPE)), query_dtype),
        jnp.asarray(cache).astype(cache_dtype),
        jnp.asarray(lengths, jnp.int32),
        options,
    )


@given(data=st.data())
@settings(max_examples=5, deadline=None, derandomize=True)
def test_short_rows(data: st.DataObject) -> None:
    """Rows of every kind of length, among them empty ones and some shorter than the number of queries."""
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]))
    page = data.draw(st.sampled_from([0, 128] if dtype == "float8_e4m3fn" else [0, 32, 64, 128]))
    edge = page or 128
    length = st.sampled_from([0, 1, 2, edge - 1, edge, edge + 1, 255, 384])
    make_inputs(
        data.draw(st.lists(length, min_size=1, max_size=3)),
        heads=data.draw(st.sampled_from([1, 2, 5, 16])),
        queries=data.draw(st.integers(1, 4)),
        capacity=384,
        page_size=page,
        cache_dtype=dtype,
        seed=data.draw(st.integers(0, 9)),
    ).check()


@pytest.mark.parametrize(
    ("cache_dtype", "page_size"),
    [("float32", 0), ("bfloat16", 384), ("float8_e4m3fn", 0), ("float8_e4m3fn", 128)],
)
def test_many_blocks(cache_dtype: str, page_size: int) -> None:
    """Lengths around multiples of the kernel's blocks; the last query sees tokens that the first does not."""
    lengths = [2049, 0, 4096, 2050]
    make_inputs(
        lengths, heads=2, queries=3, capacity=4224, page_size=page_size, cache_dtype=cache_dtype
    ).check()


@pytest.mark.parametrize(("heads", "queries"), [(128, 1), (96, 3)])
def test_many_query_rows(heads: int, queries: int) -> None:
    """One group of query rows, and several with padding."""
    make_inputs([1030, 77], heads=heads, queries=queries, capacity=1152, page_size=64).check()


@pytest.mark.parametrize(
    ("query_dtype", "cache_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float8_e4m3fn")],
)
def test_types_of_query_and_cache(query_dtype: str, cache_dtype: str) -> None:
    inputs = make_inputs([250], heads=2, cache_dtype=cache_dtype, query_dtype=query_dtype)
    inputs.check()
    out, lse = jax.eval_shape(
        lambda: mla_decode(
            inputs.q_latent,
            inputs.q_rope,
            inputs.cache,
            inputs.lengths,
            scale=SCALE,
            layer=0,
            implementation="pallas",
            **inputs.options,
        )
    )
    assert (out.dtype, lse.dtype) == (jnp.dtype(query_dtype), jnp.float32)


@pytest.mark.parametrize(
    ("lengths", "page_size"), [([4207], 0), ([0, 2050, 100], 128), ([0, 5, 0, 0, 2060, 0], 0)]
)
def test_two_cores(lengths: list[int], page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, an odd number of rows (tokens are split), an even one (rows are dealt)."""
    monkeypatch.setattr(tpu, "chip", lambda: CHIPS["TPU v5"])
    make_inputs(lengths, heads=2, queries=2, capacity=4224, page_size=page_size).check()


def test_pages_in_use_are_read() -> None:
    """That pages out of use are not is what the other tests show, as long as this one passes."""
    inputs = make_inputs([256], heads=2, page_size=128)
    inputs.options["page_table"] = inputs.options["page_table"].at[0, 1].set(NOWHERE)
    with pytest.raises(Exception, match=r"[Oo]ut-of-bounds"):
        inputs.run("pallas")


def test_scan_over_layers_and_shard_map_over_heads() -> None:
    inputs = make_inputs([100, 3], heads=4)
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))

    def layers(q_latent: jax.Array, q_rope: jax.Array, implementation: str) -> jax.Array:
        def step(carry: None, layer: jax.Array) -> tuple[None, jax.Array]:
            out, _ = mla_decode(
                q_latent,
                q_rope,
                inputs.cache,
                inputs.lengths,
                scale=SCALE,
                layer=layer,
                implementation=implementation,
            )
            return carry, out

        return jax.lax.scan(step, None, jnp.arange(2))[1]

    heads = P(None, None, "tensor")
    sharded = jax.shard_map(
        lambda q, r: layers(q, r, "pallas"),
        mesh=mesh,
        in_specs=(heads, heads),
        out_specs=P(None, None, None, "tensor"),
    )
    got = jax.jit(sharded)(inputs.q_latent, inputs.q_rope)
    expected = layers(inputs.q_latent, inputs.q_rope, "reference")
    tolerance = TOLERANCE["bfloat16"]
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": jnp.zeros((2, 1, 256, WIDTH), jnp.float16)}, "cache of float16"),
        ({"cache": jnp.zeros((2, 1, 256, 192), jnp.bfloat16)}, "192 wide"),
        ({"cache": jnp.zeros((2, 1, 24, WIDTH), jnp.bfloat16)}, "capacity of 24 tokens"),
        ({"q_rope": jnp.zeros((1, 1, 2, ROPE), jnp.float16)}, "q_rope of float16"),
    ],
)
def test_unsupported(change: dict, message: str) -> None:
    inputs = dataclasses.replace(make_inputs([20], heads=2), **change)
    with pytest.raises(ValueError, match=message):
        inputs.run("pallas")
    inputs.run("reference")
