"""Cases of `absorb_queries` and `head_values` on GPUs: the halves of V3's kv_b_proj, all 128 heads and an eighth."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import gpu_xla
from benchmarks.gpu_case import GpuCase, Tile
from pallas_kernels.block_scaled import BLOCK, BlockScaled
from pallas_kernels.gpu_chip import gpu_chip
from pallas_kernels.mla_heads import HeadDims, gpu, gpu_blackwell, gpu_hopper
from pallas_kernels.mla_heads.gpu_weights import Plan

LAYERS, RANK = 61, 512
DIMS = HeadDims(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
ROWS, HEADS = (8, 128, 512), (128, 16)
BF16 = jnp.dtype(jnp.bfloat16).itemsize
WGMMA, TCGEN05 = r"^wgmma\.mma_async.*f32\.bf16\.bf16", r"^tcgen05\.mma.*kind::f16"
INSTRUCTIONS = {"h100": WGMMA, "h200": WGMMA, "b200": TCGEN05}


def mla_heads_cases() -> list[GpuCase]:
    """bfloat16 activations, FP8 weights."""
    return [case for heads in HEADS for rows in ROWS for case in _cases(rows, heads)]


def _cases(rows: int, heads: int) -> Iterator[GpuCase]:
    def absorb(q: Array, rope: Array, layer: Array, kv_b: BlockScaled) -> tuple[Array, Array]:
        return gpu.absorb_queries(q, rope, kv_b, DIMS, layer)

    def values(context: Array, layer: Array, kv_b: BlockScaled) -> Array:
        return gpu.head_values(context, kv_b, DIMS, layer)

    abstract: Any = jax.ShapeDtypeStruct
    layer = abstract((), jnp.int32)
    shape = (LAYERS, heads * 2 * BLOCK, RANK)
    kv_b = BlockScaled(
        abstract(shape, jnp.float8_e4m3fn),
        abstract((LAYERS, heads * 2, RANK // BLOCK), jnp.float32),
    )
    rope_width = DIMS.qk_rope_head_dim
    head_width = BLOCK + rope_width
    absorb_plan, values_plan = _plans(rows, heads)
    label = f"{heads} heads, FP8 weight, M = {rows}"
    yield GpuCase(
        kernel="dsv3_absorb_queries",
        label=label,
        function=absorb,
        arguments=(
            abstract((rows, heads * head_width), jnp.bfloat16),
            abstract((rows, rope_width), jnp.float32),
            layer,
            kv_b,
        ),
        instructions=INSTRUCTIONS,
        ideal_bytes=_half_bytes(heads)
        + rows * (heads * (head_width + RANK + rope_width) * BF16 + rope_width * 4),
        flops=_flops(rows, heads),
        tile=_tile(absorb_plan, rows, heads * RANK // absorb_plan.width, stages=1),
        integers=(LAYERS - 1,),
        xla=gpu_xla.absorb_queries,
    )
    yield GpuCase(
        kernel="dsv3_head_values",
        label=label,
        function=values,
        arguments=(abstract((rows, heads, RANK), jnp.bfloat16), layer, kv_b),
        instructions=INSTRUCTIONS,
        ideal_bytes=_half_bytes(heads) + rows * heads * (RANK + BLOCK) * BF16,
        flops=_flops(rows, heads),
        tile=_tile(values_plan, rows, heads * BLOCK // values_plan.width, stages=RANK // BLOCK),
        integers=(LAYERS - 1,),
        xla=gpu_xla.head_values,
    )


def _plans(rows: int, heads: int) -> tuple[Plan, Plan]:
    chip = gpu_chip()
    if chip is not None and chip.generation == "blackwell":
        return gpu_blackwell.absorb_plan(rows), gpu_blackwell.values_plan(rows, heads)
    return gpu_hopper.absorb_plan(rows), gpu_hopper.values_plan()


def _tile(plan: Plan, rows: int, blocks: int, stages: int) -> Tile:
    """A step multiplies a tile of tokens by a block of 128 of the weights' rows or columns.

    Its copies are those of the first tile of tokens, which the weights come with; all blocks of weights are under way
    at once.
    """
    return Tile(
        bytes=BLOCK * plan.width + min(rows, plan.rows) * BLOCK * BF16,
        flops=2 * plan.rows * plan.width * BLOCK,
        stages=stages,
        blocks=blocks,
    )


def _flops(rows: int, heads: int) -> int:
    return 2 * rows * heads * BLOCK * RANK


def _half_bytes(heads: int) -> int:
    """FP8 values and float32 scales of the key rows, or of the value rows, of kv_b_proj."""
    return heads * (BLOCK * RANK + RANK // BLOCK * 4)
