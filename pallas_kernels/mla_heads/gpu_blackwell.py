"""The per-head products on Blackwell: compiled for sm_100a, not run on a GPU.

As on Hopper, a block of 128 threads owns a part of one head's output columns, reads their weights once and makes them
bfloat16 in shared memory; tcgen05 multiplies tiles of 64 or 128 tokens by them. `values` keeps the products with
blocks of weights that differ in scale side by side in tensor memory and adds them up, scaled, at the end of a tile.
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

SLOTS = 2
"""Tiles of bfloat16 weights in `values`: one is converted while the other is multiplied by."""
PIECE = 64 * 128
"""Numbers of a result that are in registers at once."""
MANY_HEADS = 64
MAX_RANK = 512
"""Tensor memory has 512 columns for the products of `values`."""


def absorb_plan(num_tokens: int) -> Plan:
    """Tiles of `absorb`; small enough for two blocks on an SM."""
    return Plan(rows=64 if num_tokens <= 64 else 128, width=BLOCK, slots=1)


def values_plan(num_tokens: int, heads: int) -> Plan:
    """Tiles of `values`; whole heads a block where there are enough of them to occupy most SMs.

    tcgen05 has no tile of 64 tokens by 64 columns.
    """
    if heads < MANY_HEADS:
        return Plan(rows=128, width=BLOCK // 2, slots=2)
    return Plan(rows=64, width=BLOCK, slots=4) if num_tokens <= 64 else Plan(rows=128, width=BLOCK, slots=2)


def absorb(q: Array, weights: KeyValueWeights, head_width: int) -> Array:
    """Products of the first 128 dims of every head with its key rows: [M, H * R].

    Args:
        q: bfloat16 [M, H * head_width].
    """
    plan = absorb_plan(q.shape[0])
    rows = plan.rows
    kernel = plgpu.kernel(
        functools.partial(_absorb, head_width=head_width, scaled=weights.scales is not None),
        out_type=jax.ShapeDtypeStruct((q.shape[0], weights.heads * weights.rank), q.dtype),
        grid=(weights.heads, weights.rank // BLOCK),
        grid_names=("head", "column"),
        scratch_types={
            "stored": tiled((BLOCK, BLOCK), weights.values.dtype),
            "weight": tiled((BLOCK, BLOCK), q.dtype),
            "tokens": tiled((rows, BLOCK), q.dtype),
            "result": tiled((rows, PIECE // rows), q.dtype),
            "product": plgpu.TMEM((rows, BLOCK), jnp.float32),
            "weight_here": plgpu.Barrier(),
            "tokens_here": plgpu.Barrier(),
            "done": plgpu.Barrier(orders_tensor_core=True),
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
    product: Any,
    weight_here: Any,
    tokens_here: Any,
    done: Any,
    head_width: int,
    scaled: bool,
) -> None:
    head, column = lax.axis_index("head"), lax.axis_index("column")
    rows, piece = result.shape
    tiles = pl.cdiv(q.shape[0], rows)
    key_rows = values.at[layer[0], pl.ds(head * 2 * BLOCK, BLOCK)]
    source = key_rows.at[:, pl.ds(column * BLOCK, BLOCK)]
    plgpu.copy_gmem_to_smem(source, stored if scaled else weight, weight_here)

    def fetch(tile: Any) -> None:
        source = q.at[pl.ds(tile * rows, rows), pl.ds(head * head_width, BLOCK)]
        plgpu.copy_gmem_to_smem(source, tokens, tokens_here)

    fetch(jnp.int32(0))
    factor = scales[layer[0], 2 * head, column] if scaled else None
    plgpu.barrier_wait(weight_here)
    if scaled:
        convert(stored, weight)
        plgpu.commit_smem()

    @pl.loop(0, tiles)
    def _(tile: Any) -> None:
        plgpu.barrier_wait(tokens_here)
        plgpu.tcgen05_mma(product, tokens, weight, done, accumulate=False)
        plgpu.barrier_wait(done)
        pl.when(tile + 1 < tiles)(lambda: fetch(tile + 1))
        for start in range(0, BLOCK, piece):
            part = _load(product.at[:, start : start + piece], factor)
            columns = pl.ds(head * values.shape[2] + column * BLOCK + start, piece)
            _store(part, result, out, tile, columns)

    plgpu.wait_smem_to_gmem(0)


def values(context: Array, weights: KeyValueWeights) -> Array:
    """Products of every head's latent with its value rows: [M, H * 128].

    Args:
        context: bfloat16 [M, H, R], R at most 512.
    """
    plan = values_plan(context.shape[0], weights.heads)
    rows, width, blocks = plan.rows, plan.width, weights.rank // BLOCK
    kernel = plgpu.kernel(
        functools.partial(_values, scaled=weights.scales is not None),
        out_type=jax.ShapeDtypeStruct((context.shape[0], weights.heads * BLOCK), context.dtype),
        grid=(weights.heads, BLOCK // width),
        grid_names=("head", "part"),
        scratch_types={
            "stored": tiled((blocks, width, BLOCK), weights.values.dtype),
            "weight": tiled((SLOTS, width, BLOCK), context.dtype),
            "tokens": tiled((plan.slots, rows, BLOCK), context.dtype),
            "result": tiled((rows, min(PIECE // rows, width)), context.dtype),
            "products": [plgpu.TMEM((rows, width), jnp.float32)] * blocks,
            "weight_here": plgpu.Barrier(num_barriers=blocks),
            "tokens_here": plgpu.Barrier(num_barriers=plan.slots),
            "done": plgpu.Barrier(num_barriers=SLOTS, orders_tensor_core=True),
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
    products: Any,
    weight_here: Any,
    tokens_here: Any,
    done: Any,
    scaled: bool,
) -> None:
    head, part = lax.axis_index("head"), lax.axis_index("part")
    blocks, width = stored.shape[:2]
    token_slots, rows = tokens.shape[:2]
    tiles = pl.cdiv(context.shape[0], rows)
    value_rows = values.at[layer[0], pl.ds((2 * head + 1) * BLOCK + part * width, width)]
    for block in range(blocks):
        source = value_rows.at[:, block * BLOCK : (block + 1) * BLOCK]
        plgpu.copy_gmem_to_smem(source, stored.at[block], weight_here.at[block])

    def fetch(tile: Any, block: int) -> None:
        slot = block % token_slots
        columns = pl.ds(head * values.shape[2] + block * BLOCK, BLOCK)
        source = context.at[pl.ds(tile * rows, rows), columns]
        plgpu.copy_gmem_to_smem(source, tokens.at[slot], tokens_here.at[slot])

    for block in range(min(token_slots, blocks)):
        fetch(jnp.int32(0), block)
    factors = (
        [scales[layer[0], 2 * head + 1, block] for block in range(blocks)] if scaled else [None] * blocks
    )

    @pl.loop(0, tiles)
    def _(tile: Any) -> None:
        def finish(block: int) -> None:
            """Waits for the product with a block; its tile of tokens makes room for the next that needs the slot."""
            plgpu.barrier_wait(done.at[block % SLOTS])
            if block + token_slots < blocks:
                fetch(tile, block + token_slots)
            elif (again := block % token_slots) < blocks:
                pl.when(tile + 1 < tiles)(functools.partial(fetch, tile + 1, again))

        for block in range(blocks):
            slot = block % SLOTS
            if block >= SLOTS:
                finish(block - SLOTS)
            pl.when(tile == 0)(functools.partial(plgpu.barrier_wait, weight_here.at[block]))
            if scaled:
                convert(stored.at[block], weight.at[slot])
                plgpu.commit_smem()
            token_slot = block % token_slots
            plgpu.barrier_wait(tokens_here.at[token_slot])
            held = weight.at[slot] if scaled else stored.at[block]
            plgpu.tcgen05_mma(
                products[block],
                tokens.at[token_slot],
                held.transpose((1, 0)),
                done.at[slot],
                accumulate=False,
            )
        for block in range(max(blocks - SLOTS, 0), blocks):
            finish(block)
        piece = result.shape[1]
        for start in range(0, width, piece):
            columns = slice(start, start + piece)
            parts = (
                _load(product.at[:, columns], factor)
                for product, factor in zip(products, factors, strict=True)
            )
            total = functools.reduce(jnp.add, parts)
            _store(total, result, out, tile, pl.ds(head * BLOCK + part * width + start, piece))

    plgpu.wait_smem_to_gmem(0)


def _load(product: Any, factor: Array | None) -> Array:
    """Part of a product from tensor memory, times its weights' scale."""
    layout = plgpu.Layout.WGMMA if product.shape[0] == 64 else plgpu.Layout.TCGEN05
    part = plgpu.async_load_tmem(product, layout=layout)
    return part if factor is None else part * factor


def _store(part: Array, staging: Any, out: Any, tile: Any, columns: Any) -> None:
    """Rows beyond the last token are not written."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = part.astype(staging.dtype)
    plgpu.wait_load_tmem()
    plgpu.commit_smem()
    rows = staging.shape[0]
    plgpu.copy_smem_to_gmem(staging, out.at[pl.ds(tile * rows, rows), columns])
