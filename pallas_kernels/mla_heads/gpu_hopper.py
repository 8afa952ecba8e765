"""The per-head products on Hopper: compiled for sm_90a, not run on a GPU.

A block of 128 threads owns a part of one head's output columns and reads the weights for them once. It makes them
bfloat16 in shared memory, which is exact, and multiplies tiles of 64 tokens by them with wgmma. Blocks are small
enough for two on an SM: one waits for memory while the other computes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK
from pallas_kernels.gpu_chip import interpret
from pallas_kernels.mla_heads.gpu_weights import KeyValueWeights, Plan, convert, tiled

ROWS = 64
"""Tokens of a tile, the rows of a wgmma."""


def absorb_plan(num_tokens: int) -> Plan:
    """Tiles of `absorb`."""
    return Plan(rows=ROWS, width=BLOCK, slots=min(pl.cdiv(num_tokens, ROWS), 2))


def values_plan() -> Plan:
    """Tiles of `values`; half a head a block, so that an SM holds two."""
    return Plan(rows=ROWS, width=64, slots=3)


def absorb(q: Array, weights: KeyValueWeights, head_width: int) -> Array:
    """Products of the first 128 dims of every head with its key rows: [M, H * R].

    Args:
        q: bfloat16 [M, H * head_width].
    """
    plan = absorb_plan(q.shape[0])
    kernel = plgpu.kernel(
        functools.partial(_absorb, head_width=head_width, scaled=weights.scales is not None),
        out_type=jax.ShapeDtypeStruct((q.shape[0], weights.heads * weights.rank), q.dtype),
        grid=(weights.heads, weights.rank // BLOCK),
        grid_names=("head", "column"),
        scratch_types={
            "stored": tiled((BLOCK, BLOCK), weights.values.dtype),
            "weight": tiled((BLOCK, BLOCK), q.dtype),
            "tokens": tiled((plan.slots, ROWS, BLOCK), q.dtype),
            "result": tiled((ROWS, BLOCK), q.dtype),
            "weight_here": plgpu.Barrier(),
            "tokens_here": plgpu.Barrier(num_barriers=plan.slots),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="dsv3_absorb_queries",
        interpret=interpret(),
    )
    return kernel(*weights.operands, q)


def _absorb(
    layer: Any,
    scales: Any,
    values: Any,
    q: Any,
    out: Any,
    *,
    stored: Any,
    weight: Any,
    tokens: Any,
    result: Any,
    weight_here: Any,
    tokens_here: Any,
    head_width: int,
    scaled: bool,
) -> None:
    head, column = lax.axis_index("head"), lax.axis_index("column")
    tiles, slots = pl.cdiv(q.shape[0], ROWS), tokens.shape[0]
    columns = pl.ds(column * BLOCK, BLOCK)
    rows = values.at[layer[0], pl.ds(head * 2 * BLOCK, BLOCK)]
    plgpu.copy_gmem_to_smem(rows.at[:, columns], stored if scaled else weight, weight_here)

    def fetch(tile: Any) -> None:
        source = q.at[pl.ds(tile * ROWS, ROWS), pl.ds(head * head_width, BLOCK)]
        slot = lax.rem(tile, slots)
        plgpu.copy_gmem_to_smem(source, tokens.at[slot], tokens_here.at[slot])

    for tile in range(slots):
        fetch(jnp.int32(tile))
    factor = scales[layer[0], 2 * head, column] if scaled else None
    plgpu.barrier_wait(weight_here)
    if scaled:
        convert(stored, weight)
        plgpu.commit_smem()

    @pl.loop(0, tiles)
    def _(tile: Any) -> None:
        slot = lax.rem(tile, slots)
        plgpu.barrier_wait(tokens_here.at[slot])
        product = _product(tokens.at[slot], weight)
        pl.when(tile + slots < tiles)(lambda: fetch(tile + slots))
        out_columns = pl.ds(head * values.shape[2] + column * BLOCK, BLOCK)
        _store(product if factor is None else product * factor, result, out, tile, out_columns)

    plgpu.wait_smem_to_gmem(0)


def values(context: Array, weights: KeyValueWeights) -> Array:
    """Products of every head's latent with its value rows: [M, H * 128].

    Args:
        context: bfloat16 [M, H, R].
    """
    blocks, plan = weights.rank // BLOCK, values_plan()
    kernel = plgpu.kernel(
        functools.partial(_values, scaled=weights.scales is not None),
        out_type=jax.ShapeDtypeStruct((context.shape[0], weights.heads * BLOCK), context.dtype),
        grid=(weights.heads, BLOCK // plan.width),
        grid_names=("head", "part"),
        scratch_types={
            "stored": tiled((blocks, plan.width, BLOCK), weights.values.dtype),
            "weight": tiled((plan.width, BLOCK), context.dtype),
            "tokens": tiled((plan.slots, ROWS, BLOCK), context.dtype),
            "result": tiled((ROWS, plan.width), context.dtype),
            "weight_here": plgpu.Barrier(num_barriers=blocks),
            "tokens_here": plgpu.Barrier(num_barriers=plan.slots),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="dsv3_head_values",
        interpret=interpret(),
    )
    return kernel(*weights.operands, context.reshape(context.shape[0], -1))


def _values(
    layer: Any,
    scales: Any,
    values: Any,
    context: Any,
    out: Any,
    *,
    stored: Any,
    weight: Any,
    tokens: Any,
    result: Any,
    weight_here: Any,
    tokens_here: Any,
    scaled: bool,
) -> None:
    head, part = lax.axis_index("head"), lax.axis_index("part")
    tiles, slots = pl.cdiv(context.shape[0], ROWS), tokens.shape[0]
    blocks, width = stored.shape[:2]
    rows = values.at[layer[0], pl.ds((2 * head + 1) * BLOCK + part * width, width)]
    for block in range(blocks):
        source = rows.at[:, block * BLOCK : (block + 1) * BLOCK]
        plgpu.copy_gmem_to_smem(source, stored.at[block], weight_here.at[block])

    def fetch(step: Any) -> None:
        tile, block = lax.div(step, blocks), lax.rem(step, blocks)
        columns = pl.ds(head * values.shape[2] + block * BLOCK, BLOCK)
        slot = lax.rem(step, slots)
        source = context.at[pl.ds(tile * ROWS, ROWS), columns]
        plgpu.copy_gmem_to_smem(source, tokens.at[slot], tokens_here.at[slot])

    factors = [scales[layer[0], 2 * head + 1, block] for block in range(blocks)] if scaled else []
    for step in range(min(slots, tiles * blocks)):
        fetch(jnp.int32(step))

    @pl.loop(0, tiles)
    def _(tile: Any) -> None:
        total = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
        for block in range(blocks):
            step = tile * blocks + block
            slot = lax.rem(step, slots)
            pl.when(tile == 0)(functools.partial(plgpu.barrier_wait, weight_here.at[block]))
            if scaled:
                convert(stored.at[block], weight)
                plgpu.commit_smem()
            plgpu.barrier_wait(tokens_here.at[slot])
            held = weight if scaled else stored.at[block]
            product = _product(tokens.at[slot], held.transpose((1, 0)))
            pl.when(step + slots < tiles * blocks)(functools.partial(fetch, step + slots))
            total += product * factors[block] if scaled else product
        _store(total, result, out, tile, pl.ds(head * BLOCK + part * width, width))

    plgpu.wait_smem_to_gmem(0)


def _product(a: Any, b: Any) -> Array:
    """a @ b in float32, both in shared memory."""

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def _store(tile_result: Array, staging: Any, out: Any, tile: Any, columns: Any) -> None:
    """Rows beyond the last token are not written."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = tile_result.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out.at[pl.ds(tile * ROWS, ROWS), columns])
