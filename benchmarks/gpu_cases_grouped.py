"""Cases of `grouped_matmul` and `grouped_swiglu` on GPUs: V3's 256 experts, whole and an eighth of each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import gpu_xla
from benchmarks.gpu_case import GpuCase
from benchmarks.gpu_cases_matmul import BF16, Product, instructions, matrix_bytes, stack_of, tile_of
from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.block_scaled_matmul import ActivationFormat
from pallas_kernels.grouped_matmul import gpu

EXPERTS, TOP_K = 256, 8
CHOSEN = {8: 57, 128: 252, 4096: 256}
"""Tokens -> experts that have any, about what uniform routing gives."""
PAIR, DOWN = (2048, 7168), (7168, 2048)
"""N, K of gate and up, and of down_proj; with TP 8, an eighth of the 2048."""
PAIR_EIGHTH, DOWN_EIGHTH = (256, 7168), (7168, 256)


def grouped_cases() -> list[GpuCase]:
    """Weight-only and W8A8; one layer of experts is as much as any chip holds."""
    return [
        *_pair_and_down(8, "", PAIR, DOWN, "none"),
        *_pair_and_down(8, "", PAIR, DOWN, "float8"),
        *_pair_and_down(4096, "", PAIR, DOWN, "none"),
        *_pair_and_down(4096, "", PAIR, DOWN, "float8"),
        *_pair_and_down(8, ", TP 8", PAIR_EIGHTH, DOWN_EIGHTH, "none"),
        *_pair_and_down(128, ", TP 8", PAIR_EIGHTH, DOWN_EIGHTH, "none"),
    ]


def _pair_and_down(
    tokens: int, tp: str, pair: tuple[int, int], down: tuple[int, int], activations: ActivationFormat
) -> list[GpuCase]:
    rows = tokens * TOP_K
    return [
        _case(Product(f"gate and up{tp}", rows, *pair, 2, activations)),
        _case(Product(f"down{tp}", rows, *down, 1, activations)),
    ]


def route_uniformly(num_tokens: int) -> np.ndarray:
    """Rows of each expert, int32 [EXPERTS], when tokens choose at random: `CHOSEN` of them have any."""
    for seed in itertools.count():
        scores = np.random.default_rng(seed).random((num_tokens, EXPERTS))
        sizes = np.bincount(np.argsort(scores, axis=1)[:, :TOP_K].ravel(), minlength=EXPERTS)
        if np.count_nonzero(sizes) == CHOSEN[num_tokens]:
            return sizes.astype(np.int32)
    raise AssertionError("unreachable")


def _case(product: Product) -> GpuCase:
    def function(
        x: Array, sizes: Array, row_scale: Array | None, layer: Array, *weights: BlockScaled
    ) -> Array:
        return gpu.grouped_matmul(x, weights, sizes, None, row_scale, layer, product.activations, None)

    abstract = jax.ShapeDtypeStruct
    weight = stack_of(1, EXPERTS, shape=(product.columns, product.depth))
    tokens = product.rows // TOP_K
    moved = product.weights * CHOSEN[tokens] * matrix_bytes((product.columns, product.depth))
    return GpuCase(
        kernel="dsv3_grouped_" + ("matmul" if product.weights == 1 else "swiglu"),
        label=f"{product.label}, {CHOSEN[tokens]} of {EXPERTS} experts",
        function=function,
        arguments=(
            abstract((product.rows, product.depth), jnp.bfloat16),
            abstract((EXPERTS,), jnp.int32),
            abstract((product.rows,), jnp.float32) if product.weights == 1 else None,
            abstract((), jnp.int32),
            *[weight] * product.weights,
        ),
        instructions=instructions(product.activations),
        ideal_bytes=moved
        + product.rows * (product.depth * product.x_bytes + product.columns * BF16.itemsize),
        flops=2 * product.weights * product.rows * product.columns * product.depth,
        tile=tile_of(product, EXPERTS, CHOSEN[tokens]),
        integers=(route_uniformly(tokens), 0),
        xla=gpu_xla.grouped,
    )
