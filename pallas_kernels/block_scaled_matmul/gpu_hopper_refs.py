"""What the kernels of Hopper's products are traced for, and the memory that they use."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.block_scaled_matmul.gpu_hopper_plan import WARPGROUP_ROWS, HopperPlan
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, GpuVisits

SWIZZLE = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is traced for.

    Attributes:
        num_weights: 1, or 2 of a SwiGLU pair.
        quantized: x is FP8, with scales.
        scaled: the weights have scales.
        grouped: rows belong to groups, which visits say.
        has_row_scale: rows of the result are multiplied.
        swizzled_result: it is written to shared memory without conflicts between banks, which Mosaic can do with whole
            rows of 128 bytes of bfloat16.
        plan: tiles.
    """

    num_weights: int
    quantized: bool
    scaled: bool
    grouped: bool
    has_row_scale: bool
    swizzled_result: bool
    plan: HopperPlan


@dataclasses.dataclass(frozen=True)
class Refs:
    """The kernel's references by name, see `multiply` and `scratch`; `layer` is the number itself, read once."""

    layer: Any
    visits: GpuVisits | None
    x: Any
    x_scales: Any
    values: list[Any]
    scales: list[Any]
    row_scale: Any
    out: Any
    x_tiles: Any
    x_scale_tiles: Any
    tiles: list[Any]
    out_tiles: Any
    full: Any
    empty: Any


def scratch(shape: Shape, x_dtype: Any, weight_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    plan = shape.plan
    rows = plan.warpgroups * WARPGROUP_ROWS
    copies = 1 + shape.quantized + shape.num_weights
    return {
        "x_tiles": plgpu.SMEM((plan.stages, plan.tokens, BLOCK), x_dtype, transforms=_tile(x_dtype)),
        "x_scale_tiles": plgpu.SMEM((plan.stages, plan.scale_tokens), jnp.float32)
        if shape.quantized
        else None,
        "tiles": [
            plgpu.SMEM((plan.stages, rows, BLOCK), weight_dtype, transforms=_tile(weight_dtype))
            for _ in range(shape.num_weights)
        ],
        "out_tiles": plgpu.SMEM(
            (plan.warpgroups, plan.tokens, WARPGROUP_ROWS),
            out_dtype,
            transforms=_tile(out_dtype, 1) if shape.swizzled_result else (),
        ),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
    }


def _tile(dtype: Any, rows: int = ROW_ALIGNMENT) -> tuple[Any, ...]:
    """How rows lie in shared memory: for wgmma in tiles of 8."""
    return plgpu.TilingTransform((rows, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(
        SWIZZLE
    )
