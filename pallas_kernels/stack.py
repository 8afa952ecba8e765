"""Stacks of weights with a layer index, as the TPU kernels take them."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_scaled import BlockScaled, Weight


def layer_index(layer: Array | int | None) -> Array:
    """The prefetched scalar int32 [1] of a kernel's index maps; 0 for a weight without layers."""
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)


def stacked(array: Array, layer: Array | int | None, ndim: int) -> Array:
    """`array` with a leading dimension of layers: `ndim` dimensions."""
    whole = array[None] if layer is None else array
    if whole.ndim != ndim:
        raise ValueError(f"expected {ndim - 1} dimensions and one of layers, got shape {array.shape}")
    return whole


def float_values(weight: Weight) -> Array:
    """The weight's numbers in their own type; unsigned integers stand for the bit patterns of floats on a CPU."""
    values = weight.values if isinstance(weight, BlockScaled) else weight
    floats = {jnp.dtype(jnp.uint8): jnp.float8_e4m3fn, jnp.dtype(jnp.uint16): jnp.bfloat16}
    dtype = floats.get(values.dtype)
    return values if dtype is None else lax.bitcast_convert_type(values, dtype)
