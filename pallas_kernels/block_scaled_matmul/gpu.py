"""Block-scaled matmul on a GPU: what surrounds the kernels of the two generations, and is left to XLA.

RMSNorm and the residual are XLA's, which fuses each into a kernel or two; activations are quantised by a kernel of
their own, or by XLA where their shape does not fit that. The product itself is `multiply` of `gpu_hopper` or
`gpu_blackwell`, for this operation and for the grouped matmul.
"""

import functools

import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight
from pallas_kernels.block_scaled_matmul import gpu_blackwell, gpu_hopper, reference
from pallas_kernels.gpu_chip import of_generation
from pallas_kernels.gradient import with_gradient_of
from pallas_kernels.normalize import Norm, rms_norm
from pallas_kernels.quantize import gpu as quantize_gpu
from pallas_kernels.quantize.reference import quantize_activations
from pallas_kernels.stack import float_values, layer_index, stacked

TILE_ROWS = 8
"""Matrices lie in shared memory as tiles of 8 rows and 128 bytes, and Mosaic cuts none at the edge of an array."""


def unsupported_product(
    x: Array, weights: tuple[Weight, ...], activations: str, out_dtype: jnp.dtype
) -> str | None:
    """Why the kernels cannot multiply `x` by `weights`, as a phrase; None if they can."""
    scaled = isinstance(weights[0], BlockScaled)
    dtype = float_values(weights[0]).dtype
    if dtype != (jnp.float8_e4m3fn if scaled else jnp.bfloat16):
        return f"a {dtype.name} weight"
    quantized = scaled and activations == "float8"
    if not quantized and x.dtype != jnp.bfloat16:
        return f"{x.dtype.name} activations"
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"a {jnp.dtype(out_dtype).name} result"
    if x.size == 0:
        return "no rows"
    num_columns, depth = weights[0].shape[-2:]
    if depth % BLOCK:
        return f"a depth of {depth}, no multiple of {BLOCK}"
    if num_columns % TILE_ROWS:
        return f"{num_columns} columns, no multiple of {TILE_ROWS}"
    return None


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
    formats = {"activations": activations, "scale_fmt": scale_fmt, "out_dtype": out_dtype}
    function = with_gradient_of(
        functools.partial(reference.block_scaled_matmul, **formats), functools.partial(_forward, **formats)
    )
    return function(x, weights, layer, norm, residual)


def _forward(
    x: Array,
    weights: tuple[Weight, ...],
    layer: Array | int | None,
    norm: Norm | None,
    residual: Array | None,
    activations: str,
    scale_fmt: str | None,
    out_dtype: jnp.dtype,
) -> Array:
    if norm is not None:
        x = rms_norm(x, norm, layer)
    rows = x.reshape(-1, x.shape[-1])
    name = "dsv3_block_scaled_" + ("matmul" if len(weights) == 1 else "swiglu")
    out = product(rows, weights, None, None, layer, activations, scale_fmt, out_dtype, name)
    out = out.reshape(*x.shape[:-1], out.shape[-1])
    return out if residual is None else residual.astype(out_dtype) + out


def product(
    rows: Array,
    weights: tuple[Weight, ...],
    group_sizes: Array | None,
    row_scale: Array | None,
    layer: Array | int | None,
    activations: str,
    scale_fmt: str | None,
    out_dtype: jnp.dtype,
    name: str,
) -> Array:
    """Rows times one weight, or SwiGLU of a pair, by the kernel of the chip's generation.

    Args:
        rows: [M, K].
        weights: [L, E, N, K] or, without `layer`, [E, N, K]; without `group_sizes`, no dimension E.
        group_sizes: int32 [E], rows of each matrix; None where there is one for all rows.
        row_scale: float32 [M], multiplies the rows of the result, or None.
        name: of the kernel.

    Returns:
        [M, N] in `out_dtype`; rows beyond the last group are zeros.
    """
    row_scales = None
    if activations == "float8" and isinstance(weights[0], BlockScaled):
        rows, row_scales = _quantize(rows, scale_fmt)

    def matrices(array: Array) -> Array:
        if group_sizes is not None:
            return stacked(array, layer, 4)
        return stacked(array, layer, 3)[:, None]

    return of_generation(gpu_hopper, gpu_blackwell).multiply(
        rows,
        row_scales,
        tuple(matrices(float_values(weight)) for weight in weights),
        tuple(matrices(weight.scales) for weight in weights if isinstance(weight, BlockScaled)),
        group_sizes,
        row_scale,
        layer_index(layer),
        out_dtype,
        name,
    )


def _quantize(rows: Array, scale_fmt: str | None) -> tuple[Array, Array]:
    """float8_e4m3fn [M, K] and float32 scales [ceil(K / 128), M]."""
    if quantize_gpu.unsupported(rows) is None:
        return quantize_gpu.quantize_rows(rows, scale_fmt)
    values, scales = quantize_activations(rows, scale_fmt)
    return values, scales.T
