import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.block_scaled_matmul import (
    block_scaled_matmul,
    block_scaled_swiglu,
)
from pallas_kernels.decode import bit_patterns
from pallas_kernels.quantize import quantize_weight
from tests.kernels.definitions import dequantise, fp8_gemm, silu

# float32 sums of up to 300 terms in any order: error of about sqrt(300) * 2^-24 of the terms' size.
RTOL = 1e-5


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantised(shape: tuple[int, ...], seed: int) -> tuple[BlockScaled, np.ndarray, np.ndarray]:
    weight = quantize_weight(jnp.asarray(random(shape, seed)))
    return weight, np.asarray(weight.values), np.asarray(weight.scales)


def assert_close(got: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, atol=RTOL * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("activations", ["none", "float8"])
@settings(max_examples=10, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 300), k=st.integers(1, 300), layer=st.integers(0, 2))
def test_stacked_float8(activations: str, m: int, n: int, k: int, layer: int) -> None:
    weight, values, scales = quantised((3, n, k), 1)
    x = random((m, k), 2)
    got = block_scaled_matmul(jnp.asarray(x), weight, layer=layer, activations=activations)
    if activations == "none":
        expected = x.astype(np.float64) @ dequantise(values[layer], scales[layer], 128).T
    else:
        expected = fp8_gemm(x, values[layer], scales[layer], None)
    assert_close(got, expected)


def test_w8a8_with_power_of_two_scales() -> None:
    weight, values, scales = quantised((200, 260), 1)
    x = random((5, 260), 2)
    got = block_scaled_matmul(jnp.asarray(x), weight, activations="float8", scale_fmt="ue8m0")
    assert_close(got, fp8_gemm(x, values, scales, "ue8m0"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("stacked", [True, False])
def test_plain_weights(dtype: type, m: int, stacked: bool) -> None:
    weight = random((2, 70, 50), 1).astype(dtype)
    x = random((m, 50), 2)
    expected = x.astype(np.float64) @ weight[1].astype(np.float64).T
    for array in (jnp.asarray(weight), *bit_patterns([jnp.asarray(weight)])):
        got = block_scaled_matmul(
            jnp.asarray(x), array if stacked else array[1], layer=1 if stacked else None
        )
        assert_close(got, expected)


def test_weight_of_several_tiles_and_a_rest() -> None:
    # 2 Mi elements a tile: with 8192 columns tiles of 256 rows, two of them and 100 rows.
    weight, values, scales = quantised((612, 8192), 1)
    x = random((3, 8192), 2)
    expected = x.astype(np.float64) @ dequantise(values, scales, 128).T
    assert_close(block_scaled_matmul(jnp.asarray(x), weight), expected)


def test_bit_patterns_give_the_same_bits() -> None:
    weight, _, _ = quantised((130, 140), 1)
    x = jnp.asarray(random((2, 140), 2))
    np.testing.assert_array_equal(
        np.asarray(block_scaled_matmul(x, weight)), np.asarray(block_scaled_matmul(x, bit_patterns(weight)))
    )


@pytest.mark.parametrize("activations", ["none", "float8"])
def test_swiglu(activations: str) -> None:
    gate, gate_values, gate_scales = quantised((2, 150, 140), 1)
    up, up_values, up_scales = quantised((2, 150, 140), 3)
    x = random((4, 140), 2)
    got = block_scaled_swiglu(jnp.asarray(x), gate, up, layer=1, activations=activations)
    if activations == "none":
        products = [
            x.astype(np.float64) @ dequantise(v[1], s[1], 128).T
            for v, s in ((gate_values, gate_scales), (up_values, up_scales))
        ]
    else:
        products = [
            fp8_gemm(x, v[1], s[1], None) for v, s in ((gate_values, gate_scales), (up_values, up_scales))
        ]
    assert_close(got, silu(products[0]) * products[1])


def test_leading_dimensions_and_dtype_are_kept() -> None:
    weight, values, scales = quantised((30, 40), 1)
    x = random((2, 3, 40), 2).astype(ml_dtypes.bfloat16)
    got = block_scaled_matmul(jnp.asarray(x), weight)
    assert got.shape == (2, 3, 30)
    assert got.dtype == jnp.bfloat16
    expected = x.astype(np.float64) @ dequantise(values, scales, 128).T
    # One rounding to bfloat16, of 8 significant bits.
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_scaled_matmul: no implementation 'nonsense'.*'reference'"):
        block_scaled_matmul(jnp.ones((1, 4)), jnp.ones((3, 4)), implementation="nonsense")
