"""The TPU kernel, interpreted, against the reference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_scaled_matmul import block_scaled_matmul, block_scaled_swiglu
from pallas_kernels.normalize import Norm
from pallas_kernels.quantize import quantize_weight

# float32 sums of at most 700 products in another order, and float32 scales applied to partial sums instead of weights.
TOLERANCE = 1e-5
# The result is rounded to 8 bits: sums that differ by little may fall on either side.
ONE_BFLOAT16 = 2**-7


def array(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def compare(function: Callable[[str], jax.Array], tolerance: float = TOLERANCE) -> None:
    expected, got = (
        np.asarray(jax.jit(lambda i=i: function(i))(), np.float64) for i in ("reference", "pallas")
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@settings(max_examples=10, derandomize=True)
@given(
    m=st.one_of(st.integers(1, 40), st.sampled_from([127, 129, 300])),
    n=st.integers(1, 700),
    k=st.integers(1, 400),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    normed=st.booleans(),
    added=st.booleans(),
)
def test_matmul(m: int, n: int, k: int, dtype: str, normed: bool, added: bool) -> None:
    weight, x = quantize_weight(array(1, 2, n, k)), array(2, m, k).astype(dtype)
    norm = Norm(array(3, 2, k).astype(dtype), 1e-6) if normed else None
    residual = array(4, m, n).astype(dtype) if added else None
    compare(
        lambda i: block_scaled_matmul(
            x, weight, layer=jnp.int32(1), norm=norm, residual=residual, implementation=i
        ),
        TOLERANCE if dtype == "float32" else ONE_BFLOAT16,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("m", [1, 130])
def test_plain_weights_and_float32_results(dtype: str, m: int) -> None:
    weight, x = array(1, 300, 140).astype(dtype), array(2, m, 140).astype(dtype)
    norm = Norm(array(3, 140), 1e-6)
    compare(
        lambda i: block_scaled_matmul(x, weight, norm=norm, out_dtype=jnp.float32, implementation=i),
        # XLA's CPU backend does not round between norm and product.
        TOLERANCE if dtype == "float32" else ONE_BFLOAT16,
    )


@settings(max_examples=6, derandomize=True)
@given(m=st.integers(1, 150), n=st.integers(1, 300), k=st.integers(1, 300))
def test_swiglu(m: int, n: int, k: int) -> None:
    gate, up, x = quantize_weight(array(1, n, k)), quantize_weight(array(2, n, k)), array(3, m, k)
    compare(lambda i: block_scaled_swiglu(x, gate, up, implementation=i))


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("normed", [False, True])
def test_float8_activations(scale_fmt: str | None, normed: bool) -> None:
    weight, x = quantize_weight(array(1, 3, 200, 300)), array(2, 20, 300)
    norm = Norm(array(3, 3, 300), 1e-6) if normed else None
    compare(
        lambda i: block_scaled_matmul(
            x, weight, layer=2, activations="float8", scale_fmt=scale_fmt, norm=norm, implementation=i
        )
    )


def test_more_rows_than_stay_in_vmem() -> None:
    weight, x = quantize_weight(array(1, 2, 140, 130)), array(2, 1030, 130)
    norm = Norm(array(3, 2, 130), 1e-6)
    compare(lambda i: block_scaled_matmul(x, weight, layer=1, norm=norm, implementation=i))


def test_rows_and_padding_do_not_mix() -> None:
    # Zero scales times NaN would be NaN: what lies beyond the edge of a weight must not be multiplied into a result.
    weight = quantize_weight(array(1, 600, 130))
    x = array(2, 20, 130).at[3].set(jnp.inf)
    got = np.asarray(block_scaled_matmul(x, weight, implementation="pallas"))
    assert got.shape == (20, 600)
    assert np.isfinite(np.delete(got, 3, axis=0)).all()


def test_layers_of_a_scan() -> None:
    weight, x = quantize_weight(array(1, 3, 130, 130)), array(2, 4, 130)

    def chain(implementation: str) -> jax.Array:
        def layer(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            return block_scaled_matmul(x, weight, layer=index, implementation=implementation) / 11, None

        return jax.lax.scan(layer, x, jnp.arange(3))[0]

    compare(chain)


def test_gradients_are_those_of_the_reference() -> None:
    gate, up, down = array(1, 40, 30), array(2, 40, 30), quantize_weight(array(3, 20, 40))
    x, norm, residual = array(4, 6, 30), array(5, 30), array(6, 6, 20)

    def loss(x, gate, norm, residual, implementation):
        hidden = block_scaled_swiglu(x, gate, up, norm=Norm(norm, 1e-6), implementation=implementation)
        out = block_scaled_matmul(hidden, down, residual=residual, implementation=implementation)
        return jnp.sum(out**2)

    expected, got = (
        jax.grad(lambda *args, i=i: loss(*args, i), argnums=(0, 1, 2, 3))(x, gate, norm, residual)
        for i in ("reference", "pallas")
    )
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * np.abs(a).max())


def test_float16_weights_are_refused_by_name() -> None:
    weight = jnp.zeros((128, 128), jnp.float16)
    with pytest.raises(
        ValueError, match="block_scaled_matmul: the Pallas kernel does not take a float16 weight"
    ):
        block_scaled_matmul(jnp.ones((1, 128)), weight, implementation="pallas")
