"""Products by block-scaled FP8 weights on Hopper (sm_90a, wgmma); compiled, not run on a GPU.

The operands are swapped: rows of the weight are the M side of wgmma, 64 for each of two warpgroups, and rows of x
its N side, as few as 8, so that the few tokens of a decode step waste nothing. A third warpgroup copies tiles, always
as many steps ahead as shared memory holds, also across the tiles of the result, which persistent blocks take in
turns. Weight-only products convert FP8 to bfloat16 in registers, exactly, since wgmma takes its M side from there;
W8A8 products read both sides from shared memory. Either way 128 of K are summed in a fresh accumulator, which is then
scaled and added.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_matmul.gpu_hopper_plan import WARPGROUP_ROWS, choose_plan
from pallas_kernels.block_scaled_matmul.gpu_hopper_refs import Refs, Shape, scratch
from pallas_kernels.block_scaled_matmul.gpu_hopper_tile import copy_tile, multiply_tile, scales_of
from pallas_kernels.block_scaled_matmul.gpu_hopper_walk import for_tiles
from pallas_kernels.block_scaled_matmul.gpu_parts import sum_parts
from pallas_kernels.gpu_chip import interpret
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, GpuVisits, plan_gpu_visits

PRODUCER_REGISTERS = 40


def multiply(
    x: Array,
    x_scales: Array | None,
    values: tuple[Array, ...],
    scales: tuple[Array, ...],
    group_sizes: Array | None,
    row_scale: Array | None,
    layer: Array,
    out_dtype: jnp.dtype,
    name: str,
) -> Array:
    """x @ W.T, or silu(x @ G.T) * (x @ U.T) of a pair; each group of rows by its own matrix.

    Args:
        x: [M, K], bfloat16, or float8_e4m3fn with `x_scales`.
        x_scales: float32 [ceil(K / 128), M], or None: products in bfloat16.
        values: one weight or a pair, each [L, E, N, K], float8_e4m3fn with `scales`, bfloat16 without.
        scales: () or as many as values, float32 [L, E, ceil(N / 128), ceil(K / 128)].
        group_sizes: int32 [E], consecutive rows of each matrix; None: E is 1, and has all rows.
        row_scale: float32 [M], multiplies the rows of the result in float32, or None.
        layer: int32 [1], index into L.
        out_dtype: bfloat16 or float32.
        name: of the kernel.

    Returns:
        [M, N] in `out_dtype`; rows beyond the last group are zeros.
    """
    num_rows, depth = x.shape
    _, num_groups, num_columns, _ = values[0].shape
    plan = choose_plan(
        num_rows,
        None if group_sizes is None else num_groups,
        num_columns,
        depth,
        len(values),
        x.dtype.itemsize,
        values[0].dtype.itemsize,
        jnp.dtype(out_dtype).itemsize,
    )
    partial = plan.splits > 1
    kernel_dtype = jnp.dtype(jnp.float32 if partial else out_dtype)
    operands = [layer]
    if group_sizes is not None:
        visits = plan_gpu_visits(group_sizes, num_rows, plan.tokens)
        operands += [visits.group, visits.row, visits.rows, visits.count]
    # Mosaic copies tiles of 8 rows, and the copy engine wants rows of scales of a multiple of 16 bytes.
    padding = -num_rows % ROW_ALIGNMENT
    operands.append(jnp.pad(x, ((0, padding), (0, 0))))
    if x_scales is not None:
        operands.append(jnp.pad(x_scales, ((0, 0), (0, padding))))
    operands += [*values, *scales]
    if row_scale is not None and not partial:
        operands.append(jnp.pad(row_scale.astype(jnp.float32), (0, plan.tokens)))
    shape = Shape(
        num_weights=len(values),
        quantized=x_scales is not None,
        scaled=bool(scales),
        grouped=group_sizes is not None,
        has_row_scale=row_scale is not None and not partial,
        swizzled_result=kernel_dtype.itemsize == 2 and num_columns % WARPGROUP_ROWS == 0,
        plan=plan,
    )
    out = plgpu.kernel(
        functools.partial(_kernel, shape=shape),
        out_type=jax.ShapeDtypeStruct(
            (plan.splits, len(values) if partial else 1, num_rows, num_columns),
            kernel_dtype,
        ),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch(shape, x.dtype, values[0].dtype, kernel_dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret(),
        kernel_name=name,
    )(*operands)
    return sum_parts(out, row_scale, out_dtype) if partial else out[0, 0]


def _kernel(layer: Any, *operands: Any, shape: Shape, **buffers: Any) -> None:
    remaining = list(operands)
    visits = GpuVisits(*(remaining.pop(0) for _ in range(4))) if shape.grouped else None
    x = remaining.pop(0)
    x_scales = remaining.pop(0) if shape.quantized else None
    values = [remaining.pop(0) for _ in range(shape.num_weights)]
    scales = [remaining.pop(0) for _ in range(shape.num_weights)] if shape.scaled else []
    row_scale = remaining.pop(0) if shape.has_row_scale else None
    (out,) = remaining
    refs = Refs(layer[0], visits, x, x_scales, values, scales, row_scale, out, **buffers)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == shape.plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        for_tiles(refs, shape, lambda work: (), functools.partial(copy_tile, refs, shape))

    @pl.when(warpgroup < shape.plan.warpgroups)
    def _() -> None:
        registers = (512 - PRODUCER_REGISTERS) // shape.plan.warpgroups // 8 * 8
        plgpu.set_max_registers(registers, action="increase")
        for_tiles(
            refs,
            shape,
            lambda work: scales_of(refs, shape, warpgroup, work, work.first),
            functools.partial(multiply_tile, refs, shape, warpgroup),
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
