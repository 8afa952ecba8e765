"""One tile of the result on Hopper: copied in steps of 128 of K, multiplied, stored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.block_scaled_matmul.gpu_hopper_plan import WARPGROUP_ROWS
from pallas_kernels.block_scaled_matmul.gpu_hopper_refs import Refs, Shape
from pallas_kernels.block_scaled_matmul.gpu_hopper_walk import Work
from pallas_kernels.gpu_compat import load, register_product, store
from pallas_kernels.gpu_visits import ROW_ALIGNMENT


def copy_tile(refs: Refs, shape: Shape, work: Work, _: Any, step: Any) -> Any:
    plan = shape.plan
    rows = plan.warpgroups * WARPGROUP_ROWS
    first = _first_token(work)

    def copy_step(k: Any, step: Any) -> Any:
        slot = lax.rem(step, plan.stages)

        @pl.when(step >= plan.stages)
        def _() -> None:
            plgpu.barrier_wait(refs.empty.at[slot])

        full = refs.full.at[slot]
        depth, tokens = pl.ds(k * BLOCK, BLOCK), pl.ds(first, plan.tokens)
        for values, tiles in zip(refs.values, refs.tiles, strict=True):
            tile = values.at[refs.layer, work.group, pl.ds(work.column * rows, rows), depth]
            plgpu.copy_gmem_to_smem(tile, tiles.at[slot], full)
        plgpu.copy_gmem_to_smem(refs.x.at[tokens, depth], refs.x_tiles.at[slot], full)
        if shape.quantized:
            tokens = pl.ds(first, plan.scale_tokens)
            plgpu.copy_gmem_to_smem(refs.x_scales.at[k, tokens], refs.x_scale_tiles.at[slot], full)
        return step + 1

    return lax.fori_loop(work.first, work.end, copy_step, step)


def multiply_tile(
    refs: Refs, shape: Shape, warpgroup: Any, work: Work, scales: tuple[Any, ...], step: Any
) -> Any:
    plan = shape.plan
    zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, plan.tokens), jnp.float32), plgpu.Layout.WGMMA)

    def multiply_step(k: Any, carry: Any) -> Any:
        step, scales, sums = carry
        slot = lax.rem(step, plan.stages)
        # Those of the next step, so that none waits for them.
        next_scales = scales_of(refs, shape, warpgroup, work, k + 1)
        plgpu.barrier_wait(refs.full.at[slot])
        x = refs.x_tiles.at[slot].transpose((1, 0))
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        totals = []
        for i, total in enumerate(sums):
            part = _part(refs.tiles[i].at[slot, rows], x, shape)
            if shape.quantized:
                part *= _along_rows(refs.x_scale_tiles.at[slot, pl.ds(0, plan.tokens)], scales[i])
            elif shape.scaled:
                part *= scales[i]
            totals.append(total + part)
        if shape.scaled:
            # What was read by loads and not by wgmma alone has to be ordered before the copy that overwrites it.
            plgpu.commit_smem()
        plgpu.barrier_arrive(refs.empty.at[slot])
        return step + 1, next_scales, tuple(totals)

    carry = step, scales, (zeros,) * shape.num_weights
    step, _, sums = lax.fori_loop(work.first, work.end, multiply_step, carry)
    if plan.splits > 1:
        for i, products in enumerate(sums):
            _store(refs, shape, warpgroup, work, i, products)
        return step
    products = sums[0] if shape.num_weights == 1 else jax.nn.silu(sums[0]) * sums[1]
    if shape.has_row_scale:
        products *= _along_rows(refs.row_scale.at[pl.ds(_first_token(work), plan.tokens)])
    _store(refs, shape, warpgroup, work, 0, products)
    return step


def scales_of(refs: Refs, shape: Shape, warpgroup: Any, work: Work, k: Any) -> tuple[Any, ...]:
    """Of block k of every weight; those of blocks that do not exist are not used."""
    if not shape.scaled:
        return ()
    _, num_groups, row_blocks, depth_blocks = refs.scales[0].shape
    index = (
        refs.layer,
        jnp.minimum(work.group, num_groups - 1),
        jnp.minimum(lax.div(_first_row(shape, warpgroup, work), BLOCK), row_blocks - 1),
        jnp.minimum(k, depth_blocks - 1),
    )
    return tuple(scales[index] for scales in refs.scales)


def _part(tile: Any, x: Any, shape: Shape) -> Array:
    """float32 [64, tokens]: a tile of the weight times x.T."""
    if shape.scaled and not shape.quantized:
        # Exact; there is no instruction from FP8 to bfloat16.
        return register_product(tile[...].astype(jnp.float32).astype(jnp.bfloat16), x)

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, tile, x)
        return accumulator[...]

    return pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, shape.plan.tokens), jnp.float32)
    )


def _along_rows(numbers: Any, scale: Any = 1.0) -> Array:
    """float32 [64, tokens]: one number a row of x, from a reference [tokens], times `scale`."""
    row = load(numbers, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False) * scale
    tile = lax.broadcast_in_dim(row, (WARPGROUP_ROWS, *row.shape), (1,))
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def _store(refs: Refs, shape: Shape, warpgroup: Any, work: Work, which: int, products: Array) -> None:
    """Writes the rows of the group as powers of two, since the size of a copy is static."""
    tile = refs.out_tiles.at[warpgroup]
    columns = pl.ds(_first_row(shape, warpgroup, work), WARPGROUP_ROWS)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    transposed = plgpu.layout_cast(products.astype(tile.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    if shape.swizzled_result:
        tile.transpose((1, 0))[...] = transposed
    else:
        store(tile.transpose((1, 0)), transposed)
    plgpu.commit_smem()
    done, size = 0, 1 << (shape.plan.tokens.bit_length() - 1)
    while size:

        @pl.when(work.rows & size != 0)
        def _(done: Any = done, size: int = size) -> None:
            rows = refs.out.at[work.split, which, pl.ds(work.row + done, size), columns]
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(work.row - _first_token(work) + done, size)], rows)

        done += work.rows & size
        size //= 2


def _first_token(work: Work) -> Any:
    """First row of x in the tile, up to 7 before those of the group: copies of tiles of 8 rows begin at no other."""
    return lax.div(work.row, ROW_ALIGNMENT) * ROW_ALIGNMENT


def _first_row(shape: Shape, warpgroup: Any, work: Work) -> Any:
    """Of the weight's rows, the result's columns, that a warpgroup multiplies."""
    return (work.column * shape.plan.warpgroups + warpgroup) * WARPGROUP_ROWS
