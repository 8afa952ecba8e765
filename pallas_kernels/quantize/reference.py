"""Definition of block quantisation to FP8 e4m3, in plain `jax.numpy`."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_scaled import BLOCK, BlockScaled, num_blocks
from pallas_kernels.decode import expand_scales, float8_to_float32

FLOAT8_MAX = 448.0
AMAX_FLOOR = 1e-4


def quantize_activations(x: Array, scale_fmt: str | None) -> tuple[Array, Array]:
    blocks = _pad_to_blocks(x.astype(jnp.float32), (-1,))
    scales = _scales(jnp.max(jnp.abs(blocks), axis=-1), scale_fmt)
    values = _round(blocks, scales[..., None])
    return values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scales


def dequantize_activations(values: Array, scales: Array) -> Array:
    expanded = jnp.repeat(scales, BLOCK, axis=-1)[..., : values.shape[-1]]
    return float8_to_float32(values, expanded)


def quantize_weight(weight: Array, scale_fmt: str | None) -> BlockScaled:
    num_rows, num_columns = weight.shape[-2:]
    blocks = _pad_to_blocks(weight.astype(jnp.float32), (-2, -1))
    scales = _scales(jnp.max(jnp.abs(blocks), axis=(-3, -1)), scale_fmt)
    values = _round(blocks, scales[..., :, None, :, None])
    padded = values.reshape(*weight.shape[:-2], scales.shape[-2] * BLOCK, scales.shape[-1] * BLOCK)
    return BlockScaled(padded[..., :num_rows, :num_columns], scales)


def dequantize_weight(weight: BlockScaled) -> Array:
    num_rows, num_columns = weight.shape[-2:]
    return float8_to_float32(weight.values, expand_scales(weight.scales, num_rows, num_columns))


def round_up_to_power_of_two(x: Array) -> Array:
    """Least power of two that is not below x, for positive normal float32 x.

    By exponent and mantissa bits: neither log2 nor exp2 is exact on every platform.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _scales(amax: Array, scale_fmt: str | None) -> Array:
    scales = _divide(jnp.maximum(amax, AMAX_FLOOR), FLOAT8_MAX)
    return round_up_to_power_of_two(scales) if scale_fmt == "ue8m0" else scales


def _round(x: Array, scales: Array) -> Array:
    # Casts of |x| > 464 differ between platforms, and a quotient may exceed 448 by an ulp.
    return jnp.clip(_divide(x, scales), -FLOAT8_MAX, FLOAT8_MAX).astype(jnp.float8_e4m3fn)


def _divide(x: Array, divisor: Array | float) -> Array:
    """x / divisor, rounded once: newer XLA multiplies by the reciprocal of what is broadcast, an ulp off."""
    return x / lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(divisor, x.dtype), x.shape))


def _pad_to_blocks(x: Array, axes: tuple[int, ...]) -> Array:
    """Zero-pads the given trailing axes to multiples of 128 and splits each into (blocks, 128)."""
    padding = [(0, 0)] * x.ndim
    shape: list[int] = []
    for axis, size in enumerate(x.shape):
        if axis - x.ndim in axes:
            padding[axis] = (0, num_blocks(size) * BLOCK - size)
            shape += [num_blocks(size), BLOCK]
        else:
            shape.append(size)
    return jnp.pad(x, padding).reshape(shape)
