"""Cases of `quantize`: activations of V3's widths, alone and behind RMSNorm or SwiGLU, and an expert's weight."""

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.tpu_case import Case
from pallas_kernels.block_scaled import num_blocks
from pallas_kernels.normalize import Norm
from pallas_kernels.quantize import ScaleFormat, quantize_activations, quantize_weight, swiglu_quantize

ROWS = (8, 128, 4096)
HIDDEN, INTERMEDIATE, LAYERS = 7168, 2048, 61
EXPERTS = 3
"""Of a stack of weights: as many as fit any chip."""


def quantize_cases() -> list[Case]:
    """All of them in bfloat16."""
    return [
        *(_plain(rows, depth, None) for rows in ROWS for depth in (HIDDEN, INTERMEDIATE)),
        *(_plain(rows, HIDDEN, "ue8m0") for rows in ROWS),
        *(_normed(rows) for rows in ROWS),
        *(_swiglu(rows, depth) for rows in ROWS for depth in (INTERMEDIATE, 18432)),
        _weight(),
    ]


def _abstract(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _bytes(rows: int, depth: int, inputs: int = 1) -> int:
    """Read once in bfloat16, written in FP8 with float32 scales."""
    return rows * (depth * (2 * inputs + 1) + 4 * num_blocks(depth))


def _plain(rows: int, depth: int, scale_fmt: ScaleFormat) -> Case:
    def call(x: Array) -> tuple[Array, Array]:
        return quantize_activations(x, scale_fmt=scale_fmt, implementation="pallas")

    return Case(
        kernel="dsv3_quantize_activations",
        label=f"[{rows}, {depth}], {scale_fmt or 'float32'} scales",
        function=call,
        arguments=(_abstract(rows, depth),),
        ideal_bytes=_bytes(rows, depth),
    )


def _normed(rows: int) -> Case:
    def call(x: Array, weight: Array, layer: Array) -> tuple[Array, Array]:
        return quantize_activations(
            x, scale_fmt=None, norm=Norm(weight, 1e-6), layer=layer, implementation="pallas"
        )

    return Case(
        kernel="dsv3_quantize_rms_norm",
        label=f"[{rows}, {HIDDEN}], RMSNorm in front",
        function=call,
        arguments=(_abstract(rows, HIDDEN), _abstract(LAYERS, HIDDEN), _abstract(dtype="int32")),
        ideal_bytes=_bytes(rows, HIDDEN) + HIDDEN * 2,
    )


def _swiglu(rows: int, depth: int) -> Case:
    def call(gate: Array, up: Array) -> tuple[Array, Array]:
        return swiglu_quantize(gate, up, scale_fmt=None, implementation="pallas")

    return Case(
        kernel="dsv3_quantize_swiglu",
        label=f"[{rows}, {depth}], SwiGLU in front",
        function=call,
        arguments=(_abstract(rows, depth), _abstract(rows, depth)),
        ideal_bytes=_bytes(rows, depth, inputs=2),
    )


def _weight() -> Case:
    def call(weight: Array) -> tuple[Array, Array]:
        quantized = quantize_weight(weight, implementation="pallas")
        return quantized.values, quantized.scales

    scales = num_blocks(INTERMEDIATE) * num_blocks(HIDDEN)
    return Case(
        kernel="dsv3_quantize_weight",
        label=f"[{EXPERTS}, {INTERMEDIATE}, {HIDDEN}]",
        function=call,
        arguments=(_abstract(EXPERTS, INTERMEDIATE, HIDDEN),),
        ideal_bytes=EXPERTS * (3 * INTERMEDIATE * HIDDEN + 4 * scales),
    )
