"""`quantize`: activations to FP8 in blocks of 1 x 128, weights in blocks of 128 x 128, and back."""

from typing import Literal

from jax import Array

from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.normalize import Norm
from pallas_kernels.quantize import reference, tpu, tpu_weight
from pallas_kernels.quantize.plan import unsupported

ScaleFormat = Literal["ue8m0"] | None

__all__ = [
    "ScaleFormat",
    "dequantize_activations",
    "dequantize_weight",
    "quantize_activations",
    "quantize_weight",
    "swiglu_quantize",
]


def quantize_activations(
    x: Array,
    *,
    scale_fmt: ScaleFormat = None,
    norm: Norm | None = None,
    layer: Array | int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Quantises every row in blocks of 128 consecutive channels (`act_quant` of the release's kernel.py).

    The scale of a block is max(max|x|, 1e-4) / 448, rounded up to a power of two for "ue8m0"; values are rounded to
    nearest even. A short last block is treated alone. With `norm` x passes an RMSNorm first.

    A compiled TPU kernel divides by multiplying with a reciprocal: float32 scales may be an ulp off the definition, and
    a value whose quotient lies within two ulps of the middle between two FP8 values may take the other one.

    Args:
        x: [..., K], any float type.
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.
        norm: RMSNorm in front; its weight [L, K] with `layer`, [K] without.
        layer: index into the stack of norm weights, a scalar, possibly traced.

    Returns:
        float8_e4m3fn [..., K] and float32 [..., ceil(K / 128)].
    """
    kernel = Kernel(tpu.quantize_activations, lambda: unsupported(x))
    function = choose(
        "quantize_activations", implementation, reference=reference.quantize_activations, tpu=kernel
    )
    return function(x, scale_fmt, norm, layer)


def swiglu_quantize(
    gate: Array, up: Array, *, scale_fmt: ScaleFormat = None, implementation: str | None = None
) -> tuple[Array, Array]:
    """`quantize_activations` of silu(gate) * up, which is taken in float32 and rounded to the type of the inputs.

    Args:
        gate, up: [..., K] of one float type.
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        float8_e4m3fn [..., K] and float32 [..., ceil(K / 128)].
    """
    kernel = Kernel(tpu.swiglu_quantize, lambda: unsupported(gate))
    function = choose("swiglu_quantize", implementation, reference=reference.swiglu_quantize, tpu=kernel)
    return function(gate, up, scale_fmt)


def dequantize_activations(values: Array, scales: Array) -> Array:
    """Inverse of `quantize_activations` up to rounding: float8 [..., K], float32 [..., ceil(K / 128)] -> float32."""
    return reference.dequantize_activations(values, scales)


def quantize_weight(
    weight: Array, *, scale_fmt: ScaleFormat = None, implementation: str | None = None
) -> BlockScaled:
    """Quantises a matrix, or a stack of them, in blocks of 128 x 128; edge blocks are short.

    Args:
        weight: [..., N, K], any float type.
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.
    """
    kernel = Kernel(tpu_weight.quantize_weight, lambda: unsupported(weight))
    function = choose("quantize_weight", implementation, reference=reference.quantize_weight, tpu=kernel)
    return function(weight, scale_fmt)


def dequantize_weight(weight: BlockScaled) -> Array:
    """The matrix that a `BlockScaled` stands for, float32 [..., N, K]."""
    return reference.dequantize_weight(weight)
