"""`block_scaled_matmul`: activations times one weight of a stack, block-scaled FP8 or plain."""

from typing import Literal

from jax import Array

from pallas_kernels.block_scaled import Weight
from pallas_kernels.block_scaled_matmul import reference
from pallas_kernels.implementation import choose
from pallas_kernels.quantize import ScaleFormat

ActivationFormat = Literal["none", "float8"]

__all__ = ["ActivationFormat", "block_scaled_head_matmul", "block_scaled_matmul", "block_scaled_swiglu"]


def block_scaled_matmul(
    x: Array,
    weight: Weight,
    *,
    layer: Array | int | None = None,
    activations: ActivationFormat = "none",
    scale_fmt: ScaleFormat = None,
    implementation: str | None = None,
) -> Array:
    """x @ W.T for one matrix W of a stack, accumulated in float32 (`fp8_gemm` of the release's kernel.py).

    The whole stack goes in with a layer index, so that a `lax.scan` over layers copies no weight. Gradients flow
    into x and into plain weights.

    Args:
        x: [..., K].
        weight: [L, N, K] with `layer`, [N, K] without.
        layer: index into the stack, a scalar, possibly traced.
        activations: "float8" quantises x in blocks of 1 x 128 before the product (W8A8).
        scale_fmt: format of the activations' scales.

    Returns:
        [..., N] in x's dtype.
    """
    function = choose("block_scaled_matmul", implementation, {"reference": reference.block_scaled_matmul})
    return function(x, weight, layer, activations, scale_fmt)


def block_scaled_swiglu(
    x: Array,
    gate: Weight,
    up: Weight,
    *,
    layer: Array | int | None = None,
    activations: ActivationFormat = "none",
    scale_fmt: ScaleFormat = None,
    implementation: str | None = None,
) -> Array:
    """silu(x @ G.T) * (x @ U.T): the first half of the MLP, x read and quantised once.

    Args:
        x: [..., K].
        gate, up: [L, N, K] with `layer`, [N, K] without.
        layer, activations, scale_fmt: as in `block_scaled_matmul`.

    Returns:
        [..., N] in x's dtype; the activation function is computed in float32.
    """
    function = choose("block_scaled_swiglu", implementation, {"reference": reference.block_scaled_swiglu})
    return function(x, gate, up, layer, activations, scale_fmt)


def block_scaled_head_matmul(
    x: Array,
    weight: Weight,
    *,
    rows: tuple[int, int],
    transpose: bool,
    layer: Array | int | None = None,
    implementation: str | None = None,
) -> Array:
    """Every head's vectors times a part of its own rows of a matrix: the absorbed halves of MLA's kv_b_proj.

    The matrix has R = N / H rows a head. With W_h the rows `rows` of head h, the result is x_h @ W_h, or x_h @ W_h.T
    with `transpose`; accumulated in float32, inputs not quantised (as in the release's `attn_impl = "absorb"`).

    Args:
        x: [..., H, D], D = rows[1] - rows[0]; with `transpose` [..., H, K].
        weight: [L, N, K] with `layer`, [N, K] without; N a multiple of H.
        rows: first and end of the part, within a head.
        layer: index into the stack, a scalar, possibly traced.

    Returns:
        [..., H, K], with `transpose` [..., H, D], in x's dtype.
    """
    function = choose(
        "block_scaled_head_matmul", implementation, {"reference": reference.block_scaled_head_matmul}
    )
    return function(x, weight, rows, transpose, layer)
