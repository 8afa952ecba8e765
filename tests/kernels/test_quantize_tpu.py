import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.normalize import Norm
from pallas_kernels.quantize import quantize_activations, quantize_weight, swiglu_quantize
from tests.kernels.definitions import quantise_rows, silu

few = settings(max_examples=6, deadline=None, derandomize=True)
SIZES = st.sampled_from([1, 5, 127, 128, 129, 300, 1024, 1100])


def floats(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-5, 4, (*shape[:-1], 1))
    x[..., : shape[-1] // 3] *= rng.random() < 0.5
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@few
@given(rows=st.sampled_from([1, 7, 32, 70]), columns=SIZES, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_activations_bit_for_bit(scale_fmt: str | None, rows: int, columns: int, dtype: str) -> None:
    x = floats(rows + columns, (rows, columns), dtype)
    values, scales = quantize_activations(x, scale_fmt=scale_fmt, implementation="pallas")
    expected_values, expected_scales = quantise_rows(np.asarray(x, np.float32), scale_fmt)
    np.testing.assert_array_equal(np.asarray(scales), expected_scales)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), expected_values.view(np.uint8))


def test_every_tie_goes_to_even() -> None:
    # The middles between all neighbouring FP8 values, below a 448 that makes the scale one.
    codes = np.arange(0x7F, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    positive = np.concatenate([middles, [448, 0]])
    values, scales = quantize_activations(
        jnp.asarray([positive, -positive]), scale_fmt=None, implementation="pallas"
    )
    assert (np.asarray(scales) == 1).all()
    bits = np.asarray(values).view(np.uint8)[:, :126]
    np.testing.assert_array_equal(bits & 0x7F, [np.arange(1, 127) // 2 * 2] * 2)
    np.testing.assert_array_equal(bits >> 7, [[0] * 126, [1] * 126])


@few
@given(rows=st.sampled_from([1, 9, 40]), columns=SIZES, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_norm_in_front(rows: int, columns: int, dtype: str) -> None:
    x = floats(columns, (rows, columns), dtype)
    weight = floats(rows, (10, columns), "float32").astype(dtype)

    def quantized(implementation: str) -> tuple[np.ndarray, np.ndarray]:
        values, scales = quantize_activations(
            x,
            norm=Norm(weight, 1e-5),
            layer=jnp.int32(9),
            scale_fmt=None,
            implementation=implementation,
        )
        return np.asarray(values, np.float32), np.asarray(scales)

    (expected, expected_scales), (actual, scales) = quantized("reference"), quantized("pallas")
    # The sum of squares is taken in another order: an ulp of the norm's result, at most bfloat16's 2^-7, enters the
    # scale. A value then moves to the neighbouring FP8 value at most, an eighth of it or a subnormal's 2^-9.
    np.testing.assert_allclose(scales, expected_scales, rtol=2.0**-7)
    np.testing.assert_allclose(actual, expected, rtol=0.126, atol=2.0**-9)
    assert (actual != expected).mean() <= 0.1


@few
@given(rows=st.sampled_from([1, 9, 40]), columns=SIZES, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_swiglu_in_front(rows: int, columns: int, dtype: str) -> None:
    gate, up = floats(1, (rows, columns), dtype), floats(2, (rows, columns), dtype)
    values, scales = swiglu_quantize(gate, up, scale_fmt="ue8m0", implementation="pallas")
    hidden = silu(np.asarray(gate, np.float64).clip(-80)) * np.asarray(up, np.float64)
    back = np.asarray(values, np.float64) * np.asarray(scales).repeat(128, 1)[:, :columns]
    # Half a unit of FP8's 4 bits, or of a subnormal's 2^-9, and bfloat16's own rounding.
    tolerance = (
        np.abs(hidden) * (1 / 16 + 2.0**-8) + np.asarray(scales).repeat(128, 1)[:, :columns] * 2.0**-10
    )
    assert (np.abs(back - hidden) <= tolerance * 1.01).all()
    expected = swiglu_quantize(gate, up, scale_fmt="ue8m0", implementation="reference")
    assert (np.asarray(values) != np.asarray(expected[0])).mean() <= 0.01


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (2, 3, 200, 129), (40, 300)])
def test_weight_bit_for_bit(shape: tuple[int, ...], scale_fmt: str | None) -> None:
    weight = floats(shape[-1], shape, "float32")
    expected = quantize_weight(weight, scale_fmt=scale_fmt, implementation="reference")
    actual = quantize_weight(weight, scale_fmt=scale_fmt, implementation="pallas")
    np.testing.assert_array_equal(np.asarray(actual.scales), np.asarray(expected.scales))
    np.testing.assert_array_equal(
        np.asarray(actual.values).view(np.uint8), np.asarray(expected.values).view(np.uint8)
    )


def test_layers_of_a_scan_and_leading_dimensions() -> None:
    x, weight = floats(0, (2, 3, 256), "bfloat16"), floats(1, (3, 256), "bfloat16")

    def layer(carry: int, index: jax.Array) -> tuple[int, tuple[jax.Array, jax.Array]]:
        return carry, quantize_activations(
            x, scale_fmt=None, norm=Norm(weight, 1e-6), layer=index, implementation="pallas"
        )

    _, (values, scales) = jax.jit(lambda: jax.lax.scan(layer, 0, jnp.arange(3)))()
    assert values.shape == (3, 2, 3, 256)
    assert scales.shape == (3, 2, 3, 2)
    for i in range(3):
        _, expected = quantize_activations(
            x, scale_fmt=None, norm=Norm(weight[i], 1e-6), implementation="reference"
        )
        np.testing.assert_allclose(np.asarray(scales[i]), np.asarray(expected), rtol=2.0**-7)


def test_other_types_are_left_to_the_reference() -> None:
    with pytest.raises(ValueError, match="does not take float16"):
        quantize_activations(jnp.ones((1, 128), jnp.float16), scale_fmt=None, implementation="pallas")
