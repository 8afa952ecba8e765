"""`block_scaled_matmul`: activations times one weight of a stack, block-scaled FP8 or plain."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.block_scaled import BlockScaled, Weight
from pallas_kernels.block_scaled_matmul import gpu, reference, tpu
from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.normalize import Norm
from pallas_kernels.quantize import ScaleFormat

ActivationFormat = Literal["none", "float8"]

__all__ = ["ActivationFormat", "block_scaled_matmul", "block_scaled_swiglu"]


def block_scaled_matmul(
    x: Array,
    weight: Weight,
    *,
    layer: Array | int | None = None,
    activations: ActivationFormat = "none",
    scale_fmt: ScaleFormat = None,
    norm: Norm | None = None,
    residual: Array | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    """x @ W.T for one matrix W of a stack, accumulated in float32 (`fp8_gemm` of the release's kernel.py).

    The whole stack goes in with a layer index, so that a `lax.scan` over layers copies no weight. Gradients flow
    into x and into plain weights where the reference runs.

    Args:
        x: [..., K].
        weight: [L, N, K] with `layer`, [N, K] without.
        layer: index into the stack, a scalar, possibly traced.
        activations: "float8" quantises x in blocks of 1 x 128 before the product (W8A8), if the weight is FP8.
        scale_fmt: format of the activations' scales.
        norm: RMSNorm that x passes first; its weight is stacked as `weight` is.
        residual: [..., N], added to the product after that is rounded to the result's type.
        out_dtype: type of the result; x's if None.

    Returns:
        [..., N].
    """
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    function = _implementation(implementation, "block_scaled_matmul", x, (weight,), layer, activations, dtype)
    return function(x, (weight,), layer, norm, residual, activations, scale_fmt, dtype)


def block_scaled_swiglu(
    x: Array,
    gate: Weight,
    up: Weight,
    *,
    layer: Array | int | None = None,
    activations: ActivationFormat = "none",
    scale_fmt: ScaleFormat = None,
    norm: Norm | None = None,
    implementation: str | None = None,
) -> Array:
    """silu(x @ G.T) * (x @ U.T): the first half of the MLP, x read and quantised once.

    Args:
        x: [..., K].
        gate, up: [L, N, K] with `layer`, [N, K] without.
        layer, activations, scale_fmt, norm: as in `block_scaled_matmul`.

    Returns:
        [..., N] in x's dtype; the activation function is computed in float32.
    """
    function = _implementation(
        implementation, "block_scaled_swiglu", x, (gate, up), layer, activations, x.dtype
    )
    return function(x, (gate, up), layer, norm, None, activations, scale_fmt, x.dtype)


def _implementation(
    name: str | None,
    operation: str,
    x: Array,
    weights: tuple[Weight, ...],
    layer: Array | int | None,
    activations: str,
    out_dtype: jnp.dtype,
) -> Callable[..., Array]:
    on_gpu: Kernel[Callable[..., Array]] = Kernel(
        gpu.block_scaled_matmul, lambda: gpu.unsupported_product(x, weights, activations, out_dtype)
    )
    # On a GPU, XLA multiplies by a plain matrix as fast as a kernel would, but copies it out of a stack first.
    plain = not isinstance(weights[0], BlockScaled) and layer is None
    return choose(
        operation,
        name,
        reference=reference.block_scaled_matmul,
        tpu=Kernel(tpu.block_scaled_matmul, lambda: tpu.unsupported(weights[0])),
        gpu=None if plain else on_gpu,
    )
