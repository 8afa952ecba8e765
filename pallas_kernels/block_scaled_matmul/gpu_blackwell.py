"""Products by block-scaled FP8 weights on Blackwell (sm_100a, tcgen05); compiled, not run on a GPU.

The operands are swapped: 128 rows of the weight are the M side of tcgen05.mma, and rows of x its N side, as few as 16,
so that the few tokens of a decode step waste little. Persistent blocks take the tiles of the result in turns; their
warpgroups work in a chain, each as far ahead of the next as buffers allow, also across tiles:

- one warp copies steps of 128 of K to shared memory, another issues the products;
- converters turn FP8 into bfloat16, exactly, on its way from shared memory to tensor memory, from where
  weight-only products take their M side; W8A8 products read both sides from shared memory and need none;
- finishers take the product of a step, summed in a fresh accumulator, scale it, add it up, and store.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.block_scaled_matmul.gpu_blackwell_finish import finish
from pallas_kernels.block_scaled_matmul.gpu_blackwell_plan import BlackwellPlan, choose_plan
from pallas_kernels.block_scaled_matmul.gpu_blackwell_refs import Refs, Shape, for_items, num_items
from pallas_kernels.block_scaled_matmul.gpu_parts import sum_parts
from pallas_kernels.gpu_chip import interpret
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, GpuVisits, plan_gpu_visits

SWIZZLE = 128
COPY_WARP, MULTIPLY_WARP = 0, 1
_REGISTERS = {(2, 1): (40, 112, 232), (1, 2): (40, 104, 184), (0, 2): (40, 0, 232)}
"""Converters, finishers -> registers of a thread that copies or multiplies, converts, finishes."""


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
    """Products by one weight or a pair; arguments and result are those of `gpu_hopper.multiply`."""
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
    shape = Shape(
        num_weights=len(values),
        quantized=x_scales is not None,
        scaled=bool(scales),
        has_row_scale=row_scale is not None and not partial,
        grouped=group_sizes is not None,
        num_rows=num_rows,
        plan=plan,
    )
    operands = [layer]
    if group_sizes is not None:
        visits = plan_gpu_visits(group_sizes, num_rows, plan.tokens)
        filled = jnp.sum(visits.group < num_groups, dtype=jnp.int32, keepdims=True)
        operands += [visits.group, visits.row, visits.rows, jnp.concatenate([filled, visits.count])]
    # Mosaic copies tiles of 8 rows, and the copy engine wants scales of a multiple of 16 bytes.
    operands.append(jnp.pad(x, ((0, -num_rows % ROW_ALIGNMENT), (0, 0))))
    if x_scales is not None:
        operands.append(jnp.pad(x_scales, ((0, 0), (0, -num_rows % ROW_ALIGNMENT))))
    operands += [*values, *scales]
    if row_scale is not None and shape.has_row_scale:
        operands.append(jnp.pad(row_scale.astype(jnp.float32), (0, plan.tokens)))
    tile_dtype = jnp.dtype(jnp.float32 if partial else out_dtype)
    out = plgpu.kernel(
        functools.partial(_kernel, shape=shape),
        out_type=jax.ShapeDtypeStruct(
            (plan.splits, len(values) if partial else 1, num_rows, num_columns), tile_dtype
        ),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=1 + plan.converters + plan.finishers,
        thread_name="warpgroup",
        scratch_types=_scratch(shape, x.dtype, values[0].dtype, tile_dtype),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret(),
        kernel_name=name,
    )(*operands)
    return sum_parts(out, row_scale, out_dtype) if partial else out[0, 0]


def _scratch(shape: Shape, x_dtype: Any, weight_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    plan = shape.plan

    def tile(dtype: Any, rows: int = 8) -> tuple[Any, ...]:
        tiling = plgpu.TilingTransform((rows, SWIZZLE // jnp.dtype(dtype).itemsize))
        return tiling, plgpu.SwizzleTransform(SWIZZLE)

    def ordered(arrivals: int, barriers: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=barriers, orders_tensor_core=True)

    panels = plan.stages * plan.panels
    # Warpgroups that read a stage themselves: of two converters and one panel either takes every other step.
    readers = plan.finishers if shape.quantized else min(plan.converters, plan.panels)
    out_shape = plan.finishers, plan.tokens // plan.finishers, BLOCK
    return {
        "x_tiles": plgpu.SMEM((plan.stages, plan.tokens, BLOCK), x_dtype, transforms=tile(x_dtype)),
        "x_scale_tiles": plgpu.SMEM((plan.stages, plan.scale_tokens), jnp.float32)
        if shape.quantized
        else None,
        "tiles": plgpu.SMEM((panels, BLOCK, BLOCK), weight_dtype, transforms=tile(weight_dtype)),
        # Tiles of one row, since any number of rows is copied from it.
        "out_tiles": plgpu.SMEM(out_shape, out_dtype, transforms=tile(out_dtype, rows=1)),
        "converted": plgpu.TMEM((BLOCK, plan.ring * BLOCK), jnp.bfloat16, packed=True)
        if plan.converters
        else None,
        "products": plgpu.TMEM((BLOCK, plan.ring * plan.tokens), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=1 + plan.panels + shape.quantized, num_barriers=plan.stages),
        "multiplied_from": ordered(1, plan.stages),
        "read": plgpu.Barrier(num_arrivals=readers, num_barriers=plan.stages) if readers else None,
        "ready": ordered(1, plan.ring) if plan.converters else None,
        "multiplied": ordered(1, plan.ring),
        "free": ordered(plan.finishers, plan.ring),
    }


def _kernel(layer: Any, *operands: Any, shape: Shape, **scratch: Any) -> None:
    remaining = list(operands)
    visits = GpuVisits(*(remaining.pop(0) for _ in range(4))) if shape.grouped else None
    x = remaining.pop(0)
    x_scales = remaining.pop(0) if shape.quantized else None
    values = [remaining.pop(0) for _ in range(shape.num_weights)]
    scales = [remaining.pop(0) for _ in range(shape.num_weights)] if shape.scaled else []
    row_scale = remaining.pop(0) if shape.has_row_scale else None
    (out,) = remaining
    block = lax.axis_index("block")
    refs = Refs(block, layer, visits, x, x_scales, values, scales, row_scale, out, **scratch)
    plan = shape.plan
    steps = num_items(refs, shape) * plan.depth_blocks
    warpgroup = lax.axis_index("warpgroup")

    def move() -> None:
        _limit_registers(plan, 0)

        @plgpu.warp_map
        def _(warp: Any) -> None:
            pl.when(warp == COPY_WARP)(lambda: _copy(refs, shape))
            pl.when(warp == MULTIPLY_WARP)(lambda: _multiply(refs, shape, steps))

    def convert_tiles() -> None:
        _limit_registers(plan, 1)
        _convert(refs, shape, steps, warpgroup - 1)

    def finish_tiles() -> None:
        _limit_registers(plan, 2)
        finish(refs, shape, warpgroup - 1 - plan.converters)

    # One branch within the other: what finishers need is then not kept for them while others work.
    def compute() -> None:
        if plan.converters:
            lax.cond(warpgroup <= plan.converters, convert_tiles, finish_tiles)
        else:
            finish_tiles()

    lax.cond(warpgroup == 0, move, compute)


def _limit_registers(plan: BlackwellPlan, role: int) -> None:
    registers = _REGISTERS.get((plan.converters, plan.finishers))
    if registers is not None:
        launched = (1 << 16) // (128 * (1 + plan.converters + plan.finishers)) // 8 * 8
        more = registers[role] > launched
        plgpu.set_max_registers(registers[role], action="increase" if more else "decrease")


def _copy(refs: Refs, shape: Shape) -> None:
    plan = shape.plan
    layer = refs.layer[0]

    def copy_item(work: Any, first_step: Any) -> None:
        def copy_step(k: Any, carry: None) -> None:
            step = first_step + k
            slot = lax.rem(step, plan.stages)

            @pl.when(step >= plan.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.multiplied_from.at[slot])
                if refs.read is not None:
                    plgpu.barrier_wait(refs.read.at[slot])

            full = refs.full.at[slot]
            depth = pl.ds((work.first_block + k) * BLOCK, BLOCK)
            for panel in range(plan.panels):
                which, row = shape.panel(work.column, panel)
                tile = refs.values[which].at[layer, work.group, pl.ds(row, BLOCK), depth]
                plgpu.copy_gmem_to_smem(tile, refs.tiles.at[slot * plan.panels + panel], full)
            tokens = pl.ds(work.begin, plan.tokens)
            plgpu.copy_gmem_to_smem(refs.x.at[tokens, depth], refs.x_tiles.at[slot], full)
            if shape.quantized:
                tokens = pl.ds(work.begin, plan.scale_tokens)
                numbers = refs.x_scales.at[work.first_block + k, tokens]
                plgpu.copy_gmem_to_smem(numbers, refs.x_scale_tiles.at[slot], full)

        lax.fori_loop(0, plan.depth_blocks, copy_step, None)

    for_items(refs, shape, copy_item)


def _multiply(refs: Refs, shape: Shape, steps: Any) -> None:
    plan = shape.plan

    def multiply_step(step: Any, carry: None) -> None:
        slot = lax.rem(step, plan.stages)
        plgpu.barrier_wait(refs.full.at[slot])
        x = refs.x_tiles.at[slot].transpose((1, 0))
        for panel in range(plan.panels):
            unit = step * plan.panels + panel
            r = lax.rem(unit, plan.ring)
            if plan.converters:
                # The converters have waited for the accumulator too.
                plgpu.barrier_wait(refs.ready.at[r])
                tile = refs.converted.at[:, pl.ds(r * BLOCK, BLOCK)]
            else:
                plgpu.barrier_wait(refs.free.at[r])
                tile = refs.tiles.at[slot * plan.panels + panel]
            product = refs.products.at[:, pl.ds(r * plan.tokens, plan.tokens)]
            plgpu.tcgen05_mma(product, tile, x, refs.multiplied.at[r], accumulate=False)
        plgpu.tcgen05_commit_arrive(refs.multiplied_from.at[slot])

    lax.fori_loop(0, steps, multiply_step, None)


def _convert(refs: Refs, shape: Shape, steps: Any, index: Any) -> None:
    """Converts every panel, or one of two, or with one panel every other step.

    A converter waits for the same barriers every time: `stages` and `ring` are even.
    """
    plan = shape.plan
    alternate = plan.converters > plan.panels
    stride, first = (plan.converters, index) if alternate else (1, 0)
    panels = [index] if plan.converters == plan.panels else range(plan.panels)

    def convert_step(turn: Any, carry: None) -> None:
        step = first + turn * stride
        slot = lax.rem(step, plan.stages)
        plgpu.barrier_wait(refs.full.at[slot])
        for i, panel in enumerate(panels):
            unit = step * plan.panels + panel
            r = lax.rem(unit, plan.ring)
            tile = refs.tiles[slot * plan.panels + panel]
            tile = plgpu.layout_cast(tile, plgpu.Layout.TCGEN05_TMEM_NATIVE(16))
            if i == len(panels) - 1:
                # The copy engine may only overwrite what has been read before a fence.
                plgpu.commit_smem()
                plgpu.barrier_arrive(refs.read.at[slot])
            # There is no instruction from FP8 to bfloat16 that all versions of ptxas know.
            tile = tile.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)
            tile = plgpu.layout_cast(tile, plgpu.Layout.TCGEN05_TMEM_NATIVE(2))
            plgpu.barrier_wait(refs.free.at[r])
            plgpu.async_store_tmem(refs.converted.at[:, pl.ds(r * BLOCK, BLOCK)], tile)
            plgpu.commit_tmem()
            plgpu.barrier_arrive(refs.ready.at[r])

    lax.fori_loop(0, lax.div(steps - first + stride - 1, stride), convert_step, None)
