"""Grouped matmul on a GPU: the product of `block_scaled_matmul`, of rows that belong to groups."""

import functools

from jax import Array

from pallas_kernels.block_scaled import Weight
from pallas_kernels.block_scaled_matmul.gpu import product, unsupported_product
from pallas_kernels.gradient import with_gradient_of
from pallas_kernels.group_rows import Visits
from pallas_kernels.grouped_matmul import reference


def unsupported(x: Array, weights: tuple[Weight, ...], activations: str) -> str | None:
    """Why the kernels cannot multiply `x` by `weights`, as a phrase; None if they can."""
    return unsupported_product(x, weights, activations, x.dtype)


def grouped_matmul(
    x: Array,
    weights: tuple[Weight, ...],
    group_sizes: Array,
    visits: Visits | None,
    row_scale: Array | None,
    layer: Array | int | None,
    activations: str,
    scale_fmt: str | None,
) -> Array:
    """One matrix a group, or gate and up of SwiGLU; arguments as of the public functions.

    `visits` is not used: its row tiles may have rows of two groups, those of these kernels have rows of one.
    """
    formats = {"activations": activations, "scale_fmt": scale_fmt}
    function = with_gradient_of(
        functools.partial(reference.grouped_matmul, **formats), functools.partial(_forward, **formats)
    )
    return function(x, weights, group_sizes, None, row_scale, layer)


def _forward(
    x: Array,
    weights: tuple[Weight, ...],
    group_sizes: Array,
    visits: Visits | None,
    row_scale: Array | None,
    layer: Array | int | None,
    activations: str,
    scale_fmt: str | None,
) -> Array:
    name = "dsv3_grouped_" + ("matmul" if len(weights) == 1 else "swiglu")
    return product(x, weights, group_sizes, row_scale, layer, activations, scale_fmt, x.dtype, name)
