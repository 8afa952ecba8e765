"""Products by block-scaled FP8 weights on Hopper (sm_90a, wgmma); compiled, not run on a GPU.

The operands are swapped: rows of the weight are the M side of wgmma, 64 for each of two warpgroups, and rows of x
its N side, as few as 8, so that the few tokens of a decode step waste nothing. A third warpgroup copies tiles, always
as many steps ahead as shared memory holds, also across the tiles of the result, which persistent blocks take in
turns. Weight-only products convert FP8 to bfloat16 in registers, exactly, since wgmma takes its M side from there;
W8A8 products read both sides from shared memory. Either way 128 of K are summed in a fresh accumulator, which is then
scaled and added.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK, num_blocks
from pallas_kernels.block_scaled_matmul.gpu_hopper_plan import WARPGROUP_ROWS, HopperPlan, choose_plan
from pallas_kernels.gpu_chip import interpret
from pallas_kernels.gpu_compat import load, register_product, store
from pallas_kernels.gpu_visits import ROW_ALIGNMENT, GpuVisits, plan_gpu_visits

PRODUCER_REGISTERS = 40
SWIZZLE = 128


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
    visits = plan_gpu_visits(group_sizes, num_rows, plan.tokens)
    # Mosaic copies tiles of 8 rows, and the copy engine wants rows of scales of a multiple of 16 bytes.
    padding = -num_rows % ROW_ALIGNMENT
    operands = [
        layer,
        visits.group,
        visits.row,
        visits.rows,
        visits.count,
        jnp.pad(x, ((0, padding), (0, 0))),
    ]
    if x_scales is not None:
        operands.append(jnp.pad(x_scales, ((0, 0), (0, padding))))
    operands += [*values, *scales]
    if row_scale is not None and not partial:
        operands.append(jnp.pad(row_scale.astype(jnp.float32), (0, plan.tokens)))
    shape = _Shape(
        num_weights=len(values),
        quantized=x_scales is not None,
        scaled=bool(scales),
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
        scratch_types=_scratch(shape, x.dtype, values[0].dtype, kernel_dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret(),
        kernel_name=name,
    )(*operands)
    if not partial:
        return out[0, 0]
    products = jnp.sum(out, axis=0)
    whole = products[0] if len(values) == 1 else jax.nn.silu(products[0]) * products[1]
    if row_scale is not None:
        whole *= row_scale[:, None]
    return whole.astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the kernel is traced for.

    Attributes:
        num_weights: 1, or 2 of a SwiGLU pair.
        quantized: x is FP8, with scales.
        scaled: the weights have scales.
        has_row_scale: rows of the result are multiplied.
        swizzled_result: it is written to shared memory without conflicts between banks, which Mosaic can do with whole
            rows of 128 bytes of bfloat16.
        plan: tiles.
    """

    num_weights: int
    quantized: bool
    scaled: bool
    has_row_scale: bool
    swizzled_result: bool
    plan: HopperPlan


def _tile(dtype: Any, rows: int = ROW_ALIGNMENT) -> tuple[Any, ...]:
    """How rows lie in shared memory: for wgmma in tiles of 8."""
    return plgpu.TilingTransform((rows, SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(
        SWIZZLE
    )


def _scratch(shape: _Shape, x_dtype: Any, weight_dtype: Any, out_dtype: Any) -> dict[str, Any]:
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


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The kernel's references by name; see `multiply` and `_scratch`."""

    layer: Any
    visits: GpuVisits
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


def _kernel(
    layer: Any, group: Any, row: Any, rows: Any, count: Any, *operands: Any, shape: _Shape, **scratch: Any
) -> None:
    remaining = list(operands)
    x = remaining.pop(0)
    x_scales = remaining.pop(0) if shape.quantized else None
    values = [remaining.pop(0) for _ in range(shape.num_weights)]
    scales = [remaining.pop(0) for _ in range(shape.num_weights)] if shape.scaled else []
    row_scale = remaining.pop(0) if shape.has_row_scale else None
    (out,) = remaining
    visits = GpuVisits(group, row, rows, count)
    refs = _Refs(layer, visits, x, x_scales, values, scales, row_scale, out, **scratch)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == shape.plan.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _for_tiles(refs, shape, lambda work: (), functools.partial(_copy_tile, refs, shape))

    @pl.when(warpgroup < shape.plan.warpgroups)
    def _() -> None:
        registers = (512 - PRODUCER_REGISTERS) // shape.plan.warpgroups // 8 * 8
        plgpu.set_max_registers(min(registers, 248), action="increase")
        _for_tiles(
            refs,
            shape,
            lambda work: _scales(refs, shape, warpgroup, work, work.first),
            functools.partial(_multiply_tile, refs, shape, warpgroup),
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Work:
    """One tile of the result.

    Attributes:
        group: of its rows; the number of groups for rows beyond the last.
        row: of x, the first of the group in the tile.
        rows: of the group in the tile.
        column: which tile of columns.
        split: which part of K.
        first: block of 128 of K, and
        end: of those that the tile sums.
    """

    group: Any
    row: Any
    rows: Any
    column: Any
    split: Any
    first: Any
    end: Any


def _for_tiles(refs: _Refs, shape: _Shape, ahead: Any, tile: Any) -> None:
    """Walks along the tiles of this block, and reads what they need from memory while the one before is at work.

    Args:
        ahead: work -> what `tile` needs at once.
        tile: (work, of `ahead`, step) -> step, which counts the stages used.
    """
    plan = shape.plan
    visits = refs.visits
    count = visits.count[0]
    total = count * (plan.columns * plan.splits)
    block = lax.axis_index("block")
    num_groups = refs.values[0].shape[1]

    def work_at(turn: Any) -> _Work:
        rest, column = _divide(jnp.minimum(turn * plan.blocks + block, total - 1), plan.columns_together)
        rest, visit = _divide(rest, count)
        part, split = _divide(rest, plan.splits)
        group = visits.group[visit]
        first = split * plan.depth_blocks
        end = jnp.minimum(first + plan.depth_blocks, num_blocks(refs.x.shape[1]))
        return _Work(
            group=group,
            row=visits.row[visit],
            rows=visits.rows[visit],
            column=part * plan.columns_together + column,
            split=split,
            first=first,
            end=jnp.where(group < num_groups, end, first),
        )

    def body(turn: Any, carry: Any) -> Any:
        step, work, needed, next_work = carry
        work_after_next = work_at(turn + 2)
        next_needed = ahead(next_work)
        return tile(work, needed, step), next_work, next_needed, work_after_next

    turns = lax.div(total - block + plan.blocks - 1, plan.blocks)
    work = work_at(0)
    lax.fori_loop(0, turns, body, (jnp.int32(0), work, ahead(work), work_at(1)))


def _divide(number: Any, divisor: Any) -> tuple[Any, Any]:
    divisor = jnp.asarray(divisor, jnp.int32)
    return lax.div(number, divisor), lax.rem(number, divisor)


def _first_token(work: _Work) -> Any:
    """First row of x in the tile, up to 7 before those of the group: copies of tiles of 8 rows begin at no other."""
    return lax.div(work.row, ROW_ALIGNMENT) * ROW_ALIGNMENT


def _copy_tile(refs: _Refs, shape: _Shape, work: _Work, _: Any, step: Any) -> Any:
    plan = shape.plan
    rows = plan.warpgroups * WARPGROUP_ROWS
    layer = refs.layer[0]
    first = _first_token(work)

    def copy_step(k: Any, step: Any) -> Any:
        slot = lax.rem(step, plan.stages)

        @pl.when(step >= plan.stages)
        def _() -> None:
            plgpu.barrier_wait(refs.empty.at[slot])

        full = refs.full.at[slot]
        depth, tokens = pl.ds(k * BLOCK, BLOCK), pl.ds(first, plan.tokens)
        for values, tiles in zip(refs.values, refs.tiles, strict=True):
            tile = values.at[layer, work.group, pl.ds(work.column * rows, rows), depth]
            plgpu.copy_gmem_to_smem(tile, tiles.at[slot], full)
        plgpu.copy_gmem_to_smem(refs.x.at[tokens, depth], refs.x_tiles.at[slot], full)
        if shape.quantized:
            tokens = pl.ds(first, plan.scale_tokens)
            plgpu.copy_gmem_to_smem(refs.x_scales.at[k, tokens], refs.x_scale_tiles.at[slot], full)
        return step + 1

    return lax.fori_loop(work.first, work.end, copy_step, step)


def _first_row(shape: _Shape, warpgroup: Any, work: _Work) -> Any:
    """Of the weight's rows, the result's columns, that a warpgroup multiplies."""
    return (work.column * shape.plan.warpgroups + warpgroup) * WARPGROUP_ROWS


def _scales(refs: _Refs, shape: _Shape, warpgroup: Any, work: _Work, k: Any) -> tuple[Any, ...]:
    """Of block k of every weight; those of blocks that do not exist are not used."""
    if not shape.scaled:
        return ()
    _, num_groups, row_blocks, depth_blocks = refs.scales[0].shape
    index = (
        refs.layer[0],
        jnp.minimum(work.group, num_groups - 1),
        jnp.minimum(lax.div(_first_row(shape, warpgroup, work), BLOCK), row_blocks - 1),
        jnp.minimum(k, depth_blocks - 1),
    )
    return tuple(scales[index] for scales in refs.scales)


def _multiply_tile(
    refs: _Refs, shape: _Shape, warpgroup: Any, work: _Work, scales: tuple[Any, ...], step: Any
) -> Any:
    plan = shape.plan
    zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, plan.tokens), jnp.float32), plgpu.Layout.WGMMA)

    def multiply_step(k: Any, carry: Any) -> Any:
        step, scales, sums = carry
        slot = lax.rem(step, plan.stages)
        # Those of the next step, so that none waits for them.
        next_scales = _scales(refs, shape, warpgroup, work, k + 1)
        plgpu.barrier_wait(refs.full.at[slot])
        x = refs.x_tiles.at[slot].transpose((1, 0))
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        totals = []
        for i, total in enumerate(sums):
            part = _part(refs.tiles[i].at[slot, rows], x, shape)
            if shape.quantized:
                part *= _along_rows(refs.x_scale_tiles.at[slot, pl.ds(0, plan.tokens)])
            totals.append(total + (part * scales[i] if shape.scaled else part))
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


def _along_rows(numbers: Any) -> Array:
    """float32 [64, tokens]: one number a row of x, from a reference [tokens]."""
    row = load(numbers, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    tile = lax.broadcast_in_dim(row, (WARPGROUP_ROWS, *row.shape), (1,))
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)


def _part(tile: Any, x: Any, shape: _Shape) -> Array:
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


def _store(refs: _Refs, shape: _Shape, warpgroup: Any, work: _Work, which: int, products: Array) -> None:
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
