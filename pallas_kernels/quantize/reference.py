"""Definition of block quantisation to FP8 e4m3, in plain `jax.numpy`."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_scaled import BLOCK, BlockScaled, num_blocks
from pallas_kernels.decode import expand_scales, float8_to_float32
from pallas_kernels.normalize import Norm, rms_norm
from pallas_kernels.quantize.rounding import float8_scales, round_to_float8


def quantize_activations(
    x: Array,
    scale_fmt: str | None,
    norm: Norm | None = None,
    layer: Array | int | None = None,
) -> tuple[Array, Array]:
    if norm is not None:
        x = rms_norm(x, norm, layer)
    blocks = _pad_to_blocks(x.astype(jnp.float32), (-1,))
    scales = float8_scales(jnp.max(jnp.abs(blocks), axis=-1), scale_fmt)
    values = round_to_float8(blocks, scales[..., None])
    return values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scales


def swiglu_quantize(gate: Array, up: Array, scale_fmt: str | None) -> tuple[Array, Array]:
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return quantize_activations(hidden.astype(gate.dtype), scale_fmt)


def dequantize_activations(values: Array, scales: Array) -> Array:
    expanded = jnp.repeat(scales, BLOCK, axis=-1)[..., : values.shape[-1]]
    return float8_to_float32(values, expanded)


def quantize_weight(weight: Array, scale_fmt: str | None) -> BlockScaled:
    num_rows, num_columns = weight.shape[-2:]
    blocks = _pad_to_blocks(weight.astype(jnp.float32), (-2, -1))
    scales = float8_scales(jnp.max(jnp.abs(blocks), axis=(-3, -1)), scale_fmt)
    values = round_to_float8(blocks, scales[..., :, None, :, None])
    padded = values.reshape(*weight.shape[:-2], scales.shape[-2] * BLOCK, scales.shape[-1] * BLOCK)
    return BlockScaled(padded[..., :num_rows, :num_columns], scales)


def dequantize_weight(weight: BlockScaled) -> Array:
    num_rows, num_columns = weight.shape[-2:]
    return float8_to_float32(weight.values, expand_scales(weight.scales, num_rows, num_columns))


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
