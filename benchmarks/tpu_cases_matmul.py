"""Cases of `block_scaled_matmul` and `block_scaled_swiglu`: V3's projections, dense MLP and shared expert."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.tpu_case import Case
from pallas_kernels.block_scaled import BlockScaled, num_blocks
from pallas_kernels.block_scaled_matmul import ActivationFormat, block_scaled_matmul, block_scaled_swiglu

ROWS: dict[ActivationFormat, tuple[int, ...]] = {
    "none": (1, 16, 64, 128, 512, 4096),
    "float8": (16, 128, 4096),
}
"""Format of the activations -> M."""
MIN_STACK_BYTES = 1 << 29
"""A smaller stack of layers the compiler might move into VMEM as a whole, and a larger one fits any chip."""
PRODUCTS = {
    "expert, half of a pair": (2048, 7168),
    "q_a_proj": (1536, 7168),
    "q_b_proj": (24576, 1536),
    "kv_a_proj": (576, 7168),
    "o_proj": (7168, 16384),
    "dense down_proj": (7168, 18432),
    "shared down_proj": (7168, 2048),
}
"""Name -> N, K."""
PAIRS = {"dense gate and up": (18432, 7168), "shared gate and up": (2048, 7168)}


def stack_of(*leading: int, shape: tuple[int, int]) -> BlockScaled:
    """An abstract stack of block-scaled matrices [*leading, N, K]."""
    n, k = shape
    scales = (*leading, num_blocks(n), num_blocks(k))
    return jax.eval_shape(
        lambda: BlockScaled(jnp.zeros((*leading, n, k), jnp.float8_e4m3fn), jnp.zeros(scales, jnp.float32))
    )


def matrix_bytes(shape: tuple[int, int]) -> int:
    """FP8 values and float32 scales of one matrix."""
    n, k = shape
    return n * k + num_blocks(n) * num_blocks(k) * 4


def matmul_cases() -> list[Case]:
    """Every product with bfloat16 activations, weight-only and W8A8."""
    return [
        case
        for activations in ROWS
        for rows in ROWS[activations]
        for case in (*_products(rows, activations), *_pairs(rows, activations))
    ]


def _label(name: str, shape: tuple[int, int], rows: int, activations: ActivationFormat) -> str:
    n, k = shape
    return f"{name} [{n}, {k}], {'W8A8' if activations == 'float8' else 'FP8 weight'}, M = {rows}"


def _arguments(shape: tuple[int, int], rows: int, num_weights: int) -> tuple:
    x, layer = jax.ShapeDtypeStruct((rows, shape[1]), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.int32)
    layers = MIN_STACK_BYTES // matrix_bytes(shape) + 1
    return (x, layer, *[stack_of(layers, shape=shape)] * num_weights)


def _products(rows: int, activations: ActivationFormat) -> Iterator[Case]:
    def product(x: Array, layer: Array, weight: BlockScaled) -> Array:
        return block_scaled_matmul(x, weight, layer=layer, activations=activations, implementation="pallas")

    for name, (n, k) in PRODUCTS.items():
        yield Case(
            kernel="dsv3_block_scaled_matmul",
            label=_label(name, (n, k), rows, activations),
            function=product,
            arguments=_arguments((n, k), rows, 1),
            ideal_bytes=matrix_bytes((n, k)) + rows * (n + k) * 2,
        )


def _pairs(rows: int, activations: ActivationFormat) -> Iterator[Case]:
    def pair(x: Array, layer: Array, gate: BlockScaled, up: BlockScaled) -> Array:
        return block_scaled_swiglu(x, gate, up, layer=layer, activations=activations, implementation="pallas")

    for name, (n, k) in PAIRS.items():
        yield Case(
            kernel="dsv3_block_scaled_swiglu",
            label=_label(name, (n, k), rows, activations),
            function=pair,
            arguments=_arguments((n, k), rows, 2),
            ideal_bytes=2 * matrix_bytes((n, k)) + rows * (n + k) * 2,
        )
