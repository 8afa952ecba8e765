import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.checkpoint import fp8

FINITE_CODES = [code for code in range(256) if code not in (0x7F, 0xFF)]


def blocks_of(shape: tuple[int, int]):
    """(block row, block column, slices) of every block of 128x128, short ones at the edges."""
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            yield row // 128, column // 128, (slice(row, row + 128), slice(column, column + 128))


@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_quantize_is_the_definition_block_by_block(rows, columns, ue8m0, seed):
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** rng.integers(-8, 4, (rows, columns))
    values = (rng.normal(size=(rows, columns)) * magnitudes).astype(np.float32)
    quantized, scale_inv = fp8.quantize(values, ue8m0=ue8m0)
    assert quantized.shape == values.shape
    assert scale_inv.shape == fp8.scale_shape(values.shape)
    for row, column, place in blocks_of(values.shape):
        block = values[place]
        scale = np.float32(max(np.abs(block).max(), np.float32(1e-4))) / np.float32(448)
        if ue8m0:
            scale = np.float32(2.0) ** int(np.ceil(np.log2(np.float64(scale))))
        assert scale_inv[row, column] == scale
        expected = np.clip(block / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(quantized[place].view(np.uint8), expected.view(np.uint8))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_dequantize_multiplies_every_block_by_its_scale(rows, columns, seed):
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.array(FINITE_CODES, np.uint8), (rows, columns))
    scale_inv = rng.uniform(1e-5, 1, fp8.scale_shape(codes.shape)).astype(np.float32)
    values = fp8.dequantize(codes, scale_inv)
    for row, column, place in blocks_of(codes.shape):
        expected = codes[place].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_inv[row, column]
        np.testing.assert_array_equal(values[place], expected)


def test_quantize_of_a_band_is_a_part_of_the_whole():
    values = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    whole, scales = fp8.quantize(values)
    band, band_scales = fp8.quantize(values[128:300])
    np.testing.assert_array_equal(band.view(np.uint8), whole[128:].view(np.uint8))
    np.testing.assert_array_equal(band_scales, scales[1:])


def test_zero_block_has_the_smallest_scale_and_zeros():
    quantized, scale_inv = fp8.quantize(np.zeros((128, 128), np.float32))
    assert scale_inv == np.float32(1e-4) / np.float32(448)
    assert not quantized.view(np.uint8).any()
    _, power_of_two = fp8.quantize(np.zeros((128, 128), np.float32), ue8m0=True)
    assert power_of_two == 2.0**-22


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_shows_in_the_scale_of_its_block_only(bad):
    values = np.ones((256, 256), np.float32)
    values[200, 3] = bad
    _, scale_inv = fp8.quantize(values)
    np.testing.assert_array_equal(np.isfinite(scale_inv), [[True, True], [False, True]])


def test_round_up_keeps_powers_of_two_and_doubles_one_ulp_above():
    powers = (2.0 ** np.arange(-120, 121)).astype(np.float32)
    np.testing.assert_array_equal(fp8.round_up_to_power_of_two(powers), powers)
    above = np.nextafter(powers, np.float32(np.inf))
    np.testing.assert_array_equal(fp8.round_up_to_power_of_two(above), 2 * powers)
    below = np.nextafter(powers, np.float32(0))
    np.testing.assert_array_equal(fp8.round_up_to_power_of_two(below), powers)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [0, 1, 262143, 262144, 999_999])
def test_has_nan_finds_one_code_anywhere(code, place):
    codes = np.resize(np.array(FINITE_CODES, np.uint8), 1_000_000)
    assert not fp8.has_nan(codes)
    codes[place] = code
    assert fp8.has_nan(codes)
