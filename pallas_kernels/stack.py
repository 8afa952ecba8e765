"""Stacks of weights with a layer index, as the TPU kernels take them."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

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


ROW_GROUP = 8
"""Layers of a stack of vectors that are read with the one in use: XLA would copy a stack of single rows first."""


def vector_spec(stack: Array) -> pl.BlockSpec:
    """Block of a stack [L, K] that holds the row of the layer; kernels take it out with `row_of_layer`.

    Its index map ignores all grid positions and expects the layer index as the only prefetched scalar.
    """
    rows = min(ROW_GROUP, stack.shape[0])
    return pl.BlockSpec((rows, stack.shape[1]), lambda *indices: (indices[-1][0] // rows, 0))


def row_of_layer(group: Any, layer: Array) -> Array:
    """float32 [1, K]: the row of `layer` in a block of `vector_spec`, as a sum, since packed rows have no address."""
    rows = group[...].astype(jnp.float32)
    is_it = lax.broadcasted_iota(jnp.int32, rows.shape, 0) == layer % rows.shape[0]
    return jnp.sum(jnp.where(is_it, rows, 0), axis=0, keepdims=True)


def float_values(weight: Weight) -> Array:
    """The weight's numbers in their own type; unsigned integers stand for the bit patterns of floats on a CPU."""
    values = weight.values if isinstance(weight, BlockScaled) else weight
    floats = {jnp.dtype(jnp.uint8): jnp.float8_e4m3fn, jnp.dtype(jnp.uint16): jnp.bfloat16}
    dtype = floats.get(values.dtype)
    return values if dtype is None else lax.bitcast_convert_type(values, dtype)
