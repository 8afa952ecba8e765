"""Definition of the block-scaled matmul, and its path where there is no kernel: a tile of the weight at a time."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.block_scaled import BlockScaled, Weight
from pallas_kernels.decode import dot_transposed, matrix_tile, tile_rows
from pallas_kernels.normalize import Norm, rms_norm
from pallas_kernels.quantize.reference import dequantize_activations, quantize_activations


def block_scaled_matmul(
    x: Array,
    weights: tuple[Weight, ...],
    layer: Array | int | None,
    norm: Norm | None,
    residual: Array | None,
    activations: str,
    scale_fmt: str | None,
    out_dtype: jnp.dtype,
) -> Array:
    """One weight, or gate and up of SwiGLU; arguments as of the public functions."""
    if norm is not None:
        x = rms_norm(x, norm, layer)
    if not isinstance(weights[0], BlockScaled):
        activations = "none"
    if x.dtype == weights[0].dtype == jnp.bfloat16:
        rows = x.reshape(-1, x.shape[-1])
        products = [_plain_product(rows, weight, layer) for weight in weights]
    else:
        rows = as_rows(x, activations, scale_fmt)
        products = [_product(rows, weight, layer) for weight in weights]
    out = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
    out = out.reshape(*x.shape[:-1], weights[0].shape[-2]).astype(out_dtype)
    return out if residual is None else residual.astype(out_dtype) + out


def as_rows(x: Array, activations: str, scale_fmt: str | None) -> Array:
    """[..., K] -> float32 [M, K], rounded to the values that FP8 activations stand for if they are asked for."""
    rows = x.reshape(-1, x.shape[-1])
    if activations == "float8":
        return dequantize_activations(*quantize_activations(rows, scale_fmt))
    return rows.astype(jnp.float32)


def _plain_product(x: Array, weight: Weight, layer: Array | int | None) -> Array:
    """bfloat16 [M, K] times a bfloat16 matrix: products are exact in float32, so neither is converted."""
    assert not isinstance(weight, BlockScaled)
    matrix = weight if layer is None else lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _product(x: Array, weight: Weight, layer: Array | int | None) -> Array:
    """float32 [M, K] times the transposed matrix, float32 [M, N]."""
    if layer is None and not isinstance(weight, BlockScaled) and weight.dtype == jnp.float32:
        return dot_transposed(x, weight)
    index = () if layer is None else (layer,)
    num_rows, num_columns = weight.shape[-2:]
    tile = tile_rows(num_rows, num_columns)
    whole, rest = divmod(num_rows, tile)
    if whole == 1:
        products = dot_transposed(x, matrix_tile(weight, index, 0, tile))
    else:
        products = _tiled_product(x, weight, index, tile, whole)
    if not rest:
        return products
    last = dot_transposed(x, matrix_tile(weight, index, whole * tile, rest))
    return jnp.concatenate([products, last], axis=1)


def _tiled_product(x: Array, weight: Weight, index: tuple, tile: int, num_tiles: int) -> Array:
    def one_tile(i: Array) -> Array:
        return dot_transposed(x, matrix_tile(weight, index, i * tile, tile))

    products = lax.map(one_tile, jnp.arange(num_tiles, dtype=jnp.int32))
    return products.swapaxes(0, 1).reshape(x.shape[0], num_tiles * tile)
