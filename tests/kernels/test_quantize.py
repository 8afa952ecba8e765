import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decode import bit_patterns, float8_to_float32, to_float32
from pallas_kernels.quantize import (
    dequantize_activations,
    dequantize_weight,
    quantize_activations,
    quantize_weight,
)
from pallas_kernels.quantize.rounding import round_up_to_power_of_two
from tests.kernels.definitions import dequantise, power_of_two_above, quantise_rows


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_activations_bit_for_bit(scale_fmt: str | None, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-6, 5)).astype(np.float32)
    x[0, : columns // 2] = 0
    values, scales = quantize_activations(jnp.asarray(x), scale_fmt=scale_fmt)
    expected_values, expected_scales = quantise_rows(x, scale_fmt)
    np.testing.assert_array_equal(np.asarray(scales), expected_scales)
    np.testing.assert_array_equal(np.asarray(values), expected_values)
    back = dequantize_activations(values, scales)
    np.testing.assert_allclose(np.asarray(back), dequantise(expected_values, expected_scales, 1), rtol=1e-7)


def test_zeros_have_the_smallest_scale() -> None:
    values, scales = quantize_activations(jnp.zeros((1, 128)), scale_fmt="ue8m0")
    assert float(scales[0, 0]) == 2.0**-22
    assert not np.asarray(values, np.float32).any()


def test_power_of_two_is_exact_at_and_beside_powers() -> None:
    powers = np.float32(2.0) ** np.arange(-100, 100, dtype=np.float32)
    above = np.nextafter(powers, np.float32(np.inf))
    np.testing.assert_array_equal(np.asarray(round_up_to_power_of_two(jnp.asarray(powers))), powers)
    np.testing.assert_array_equal(np.asarray(round_up_to_power_of_two(jnp.asarray(above))), powers * 2)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (2, 3, 200, 129)])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_weight_blocks(shape: tuple[int, ...], scale_fmt: str | None) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    quantised = quantize_weight(jnp.asarray(weight), scale_fmt=scale_fmt)
    rows, columns = shape[-2:]
    assert quantised.scales.shape == (*shape[:-2], -(-rows // 128), -(-columns // 128))
    amax = np.abs(weight[..., -1 - (rows - 1) % 128 :, -1 - (columns - 1) % 128 :]).max((-2, -1))
    last = np.asarray(quantised.scales)[..., -1, -1]
    expected = [power_of_two_above(value, scale_fmt) for value in np.ravel(amax)]
    np.testing.assert_array_equal(np.ravel(last), expected)
    # e4m3 has 4 significant bits: half a unit in the last place is 1/16 of the value, or of a subnormal's 2^-9.
    error = np.abs(np.asarray(dequantize_weight(quantised)) - weight)
    largest = np.asarray(quantised.scales).max()
    assert (error <= np.maximum(np.abs(weight) / 16 * 1.0001, largest * 2.0**-10 * 1.0001)).all()


def test_every_float8_value_is_decoded_exactly() -> None:
    codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    values = codes.view(ml_dtypes.float8_e4m3fn)
    for array in (jnp.asarray(values), jnp.asarray(codes)):
        decoded = float8_to_float32(array, jnp.float32(1))
        np.testing.assert_array_equal(np.asarray(decoded), values.astype(np.float32))


def test_bit_patterns_share_memory_and_keep_values() -> None:
    array = jnp.asarray(np.linspace(-3, 3, 4096).reshape(64, 64).astype(ml_dtypes.bfloat16))
    (pattern,) = bit_patterns([array])
    assert pattern.dtype == jnp.uint16
    assert pattern.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(np.asarray(to_float32(pattern)), np.asarray(array, np.float32))
