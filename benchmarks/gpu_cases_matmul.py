"""Cases of `block_scaled_matmul` and `block_scaled_swiglu` on GPUs: V3's projections and MLPs, whole and an eighth."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import gpu_xla
from benchmarks.gpu_case import GpuCase, Tile
from pallas_kernels.block_scaled import BLOCK, BlockScaled, num_blocks
from pallas_kernels.block_scaled_matmul import ActivationFormat, gpu, gpu_blackwell_plan, gpu_hopper_plan
from pallas_kernels.gpu_chip import gpu_chip

LAYERS = 4
BF16 = jnp.dtype(jnp.bfloat16)
WGMMA = {"none": r"^wgmma\.mma_async.*f32\.bf16\.bf16", "float8": r"^wgmma\.mma_async.*f32\.e4m3\.e4m3"}
TCGEN05 = {"none": r"^tcgen05\.mma.*kind::f16", "float8": r"^tcgen05\.mma.*kind::f8f6f4"}


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of the model.

    Attributes:
        name: for the label.
        rows: M.
        columns: N.
        depth: K.
        weights: 1, or 2 of a SwiGLU pair.
        activations: their format.
    """

    name: str
    rows: int
    columns: int
    depth: int
    weights: int = 1
    activations: ActivationFormat = "none"

    @property
    def label(self) -> str:
        form = "W8A8" if self.activations == "float8" else "FP8 weight"
        return f"{self.name} [{self.columns}, {self.depth}], {form}, M = {self.rows}"

    @property
    def x_bytes(self) -> int:
        """Of an element of x as the kernel reads it."""
        return 1 if self.activations == "float8" else BF16.itemsize


PRODUCTS = (
    Product("q_a_proj", 8, 1536, 7168),
    Product("kv_a_proj", 8, 576, 7168),
    Product("q_b_proj", 8, 24576, 1536),
    Product("o_proj", 8, 7168, 16384),
    Product("o_proj", 64, 7168, 16384),
    Product("o_proj", 4096, 7168, 16384, activations="float8"),
    Product("o_proj, TP 8", 8, 7168, 2048),
    Product("q_b_proj, TP 8", 64, 3072, 1536),
    Product("dense gate and up", 8, 18432, 7168, 2),
    Product("dense gate and up", 4096, 18432, 7168, 2),
    Product("dense gate and up, TP 8", 64, 2304, 7168, 2, "float8"),
    Product("shared gate and up", 8, 2048, 7168, 2, "float8"),
)


def matmul_cases() -> list[GpuCase]:
    """bfloat16 activations and results; the activations' quantisation is XLA's."""
    return [_case(product) for product in PRODUCTS]


def _case(product: Product) -> GpuCase:
    def function(x: Array, layer: Array, *weights: BlockScaled) -> Array:
        return gpu.block_scaled_matmul(
            x, weights, layer, None, None, product.activations, None, jnp.dtype(jnp.bfloat16)
        )

    x = jax.ShapeDtypeStruct((product.rows, product.depth), jnp.bfloat16)
    weight = stack_of(LAYERS, shape=(product.columns, product.depth))
    moved = product.weights * matrix_bytes((product.columns, product.depth))
    return GpuCase(
        kernel="dsv3_block_scaled_" + ("matmul" if product.weights == 1 else "swiglu"),
        label=product.label,
        function=function,
        arguments=(x, jax.ShapeDtypeStruct((), jnp.int32), *[weight] * product.weights),
        instructions=instructions(product.activations),
        ideal_bytes=moved
        + product.rows * (product.depth * product.x_bytes + product.columns * BF16.itemsize),
        flops=2 * product.weights * product.rows * product.columns * product.depth,
        tile=tile_of(product, None, None),
        integers=(LAYERS - 1,),
        xla=gpu_xla.matmul,
    )


def instructions(activations: ActivationFormat) -> dict[str, str]:
    """Chip -> the tensor-core instruction that a product must use."""
    return {"h100": WGMMA[activations], "h200": WGMMA[activations], "b200": TCGEN05[activations]}


def tile_of(product: Product, num_groups: int | None, visits: int | None) -> Tile:
    """Of the plan of the chip in force.

    Args:
        num_groups: matrices that the rows are spread over; None where there is one.
        visits: pairs of a group and a tile of its rows, if there are groups.
    """
    chip = gpu_chip()
    sizes = (product.rows, num_groups, product.columns, product.depth)
    formats = (product.weights, product.x_bytes, 1, BF16.itemsize)
    if chip is not None and chip.generation == "blackwell":
        plan = gpu_blackwell_plan.choose_plan(*sizes, *formats)
        weight_rows = plan.panels * BLOCK
    else:
        plan = gpu_hopper_plan.choose_plan(*sizes, *formats)
        weight_rows = product.weights * plan.warpgroups * gpu_hopper_plan.WARPGROUP_ROWS
    if visits is None:
        visits = -(-product.rows // plan.tokens)
    return Tile(
        bytes=plan.step_bytes,
        flops=2 * weight_rows * plan.tokens * BLOCK,
        stages=plan.stages,
        blocks=min(plan.blocks, visits * plan.columns * plan.splits),
    )


def stack_of(*leading: int, shape: tuple[int, int]) -> BlockScaled:
    """An abstract stack of block-scaled matrices [*leading, N, K]."""
    n, k = shape
    values = jax.ShapeDtypeStruct((*leading, n, k), jnp.float8_e4m3fn)
    scales = jax.ShapeDtypeStruct((*leading, num_blocks(n), num_blocks(k)), jnp.float32)
    return jax.eval_shape(BlockScaled, values, scales)


def matrix_bytes(shape: tuple[int, int]) -> int:
    """FP8 values and float32 scales of one matrix."""
    n, k = shape
    return n * k + num_blocks(n) * num_blocks(k) * 4
