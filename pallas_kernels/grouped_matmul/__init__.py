"""`grouped_matmul`: rows sorted by group, each group times its own matrix; the experts of a mixture."""

from collections.abc import Callable

from jax import Array

from pallas_kernels.block_scaled import Weight
from pallas_kernels.block_scaled_matmul import ActivationFormat
from pallas_kernels.group_rows import Visits
from pallas_kernels.grouped_matmul import gpu, reference, tpu
from pallas_kernels.grouped_matmul.rows import row_tile
from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.quantize import ScaleFormat

__all__ = ["grouped_matmul", "grouped_swiglu", "row_tile"]


def grouped_matmul(
    x: Array,
    weight: Weight,
    group_sizes: Array,
    *,
    visits: Visits | None = None,
    row_scale: Array | None = None,
    layer: Array | int | None = None,
    activations: ActivationFormat = "none",
    scale_fmt: ScaleFormat = None,
    implementation: str | None = None,
) -> Array:
    """Multiplies consecutive groups of rows, each by its own matrix (transposed), accumulated in float32.

    Only matrices of groups that have rows are read. Rows beyond the last group come out as zeros. Gradients flow
    into x, row_scale and plain weights.

    Args:
        x: [M, K], rows of group 0 first, then those of group 1, ...
        weight: [L, E, N, K] with `layer`, [E, N, K] without.
        group_sizes: int32 [E], rows of each group; their sum is at most M.
        visits: `plan_visits` of these sizes and `row_tile(M, E)`, if it is at hand.
        row_scale: float32 [M], multiplies the rows of the result (a router's weights), or None.
        layer: index into the stack, a scalar, possibly traced.
        activations: "float8" quantises x in blocks of 1 x 128 before the product (W8A8), if the weights are FP8.
        scale_fmt: format of the activations' scales.

    Returns:
        [M, N] in x's dtype.
    """
    function = _implementation(implementation, "grouped_matmul", x, (weight,), activations)
    return function(x, (weight,), group_sizes, visits, row_scale, layer, activations, scale_fmt)


def grouped_swiglu(
    x: Array,
    gate: Weight,
    up: Weight,
    group_sizes: Array,
    *,
    visits: Visits | None = None,
    layer: Array | int | None = None,
    activations: ActivationFormat = "none",
    scale_fmt: ScaleFormat = None,
    implementation: str | None = None,
) -> Array:
    """silu(x @ G.T) * (x @ U.T) with a pair of matrices a group; the first half of the experts' MLPs.

    Args:
        x: [M, K], sorted by group as in `grouped_matmul`.
        gate, up: [L, E, N, K] with `layer`, [E, N, K] without.
        group_sizes, visits, layer, activations, scale_fmt: as in `grouped_matmul`.

    Returns:
        [M, N] in x's dtype; rows beyond the last group are zeros.
    """
    function = _implementation(implementation, "grouped_swiglu", x, (gate, up), activations)
    return function(x, (gate, up), group_sizes, visits, None, layer, activations, scale_fmt)


def _implementation(
    name: str | None, operation: str, x: Array, weights: tuple[Weight, ...], activations: str
) -> Callable[..., Array]:
    return choose(
        operation,
        name,
        reference=reference.grouped_matmul,
        tpu=Kernel(tpu.grouped_matmul, lambda: tpu.unsupported(weights[0])),
        gpu=Kernel(gpu.grouped_matmul, lambda: gpu.unsupported(x, weights, activations)),
    )
