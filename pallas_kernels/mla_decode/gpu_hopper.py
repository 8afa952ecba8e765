"""`mla_decode` on Hopper (sm_90a, wgmma). Compiled for sm_90a, not run on a GPU.

A thread block has a tile of 64 query rows of one batch row, and a split of its tokens. Two warpgroups compute
(`gpu_hopper_attention.py`), a third starts copies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chip import gpu_chip, interpret
from pallas_kernels.mla_decode.combine import combine
from pallas_kernels.mla_decode.gpu_hopper_attention import Attention
from pallas_kernels.mla_decode.gpu_hopper_fp8 import Float8Attention
from pallas_kernels.mla_decode.gpu_hopper_shared import (
    BUFFERS,
    RAW_PIECE,
    TILE_ROWS,
    Shared,
    scratch,
    shared_refs,
)
from pallas_kernels.mla_decode.gpu_plan import BLOCK, ROPE_COLUMNS, GpuPlan, make_plan, query_rows
from pallas_kernels.stack import layer_index

COPY_THREAD = 2
COPY_REGISTERS, COMPUTE_REGISTERS = 24, 240


def mla_decode(
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    scale: float,
    layer: Array | int,
    cache_scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array]:
    """Arguments as of the public function; bfloat16 queries, a bfloat16 or float8_e4m3fn cache."""
    chip = gpu_chip()
    assert chip is not None
    plan = make_plan(q_latent.shape, q_rope.shape[-1], cache, page_table, TILE_ROWS, chip)
    operands = [lengths, layer_index(layer)] + ([] if page_table is None else [page_table])
    operands += [query_rows(q_latent, plan, plan.rank), query_rows(q_rope, plan, ROPE_COLUMNS)]
    operands += [cache] + ([] if cache_scales is None else [cache_scales])
    out_dtype = q_latent.dtype if plan.splits == 1 else jnp.float32
    out, lse = plgpu.kernel(
        functools.partial(_body, plan=plan, scale=scale, out_dtype=out_dtype),
        out_type=[
            jax.ShapeDtypeStruct((plan.splits, plan.batch, plan.padded_rows, plan.rank), out_dtype),
            jax.ShapeDtypeStruct((plan.splits, plan.batch, plan.tiles * TILE_ROWS), jnp.float32),
        ],
        scratch_types=scratch(plan, out_dtype),
        grid=(plan.batch, plan.splits, plan.tiles),
        grid_names=("row", "split", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret(),
        kernel_name="dsv3_mla_decode",
    )(*operands)
    out, lse = out[:, :, : plan.rows], lse[..., : plan.rows]
    out, lse = (out[0], lse[0]) if plan.splits == 1 else combine(out, lse)
    return out.astype(q_latent.dtype).reshape(q_latent.shape), lse.reshape(q_latent.shape[:-1])


def _body(*refs: Any, plan: GpuPlan, scale: float, out_dtype: Any, **scratch_refs: Any) -> None:
    operands = iter(refs)
    lengths, layer = next(operands), next(operands)
    table = next(operands) if plan.pages_a_row else None
    q_latent, q_rope, cache = next(operands), next(operands), next(operands)
    scales = next(operands) if plan.scaled else None
    out, lse = operands
    shared = shared_refs(scratch_refs, out_dtype)

    row, split, tile = (lax.axis_index(name) for name in ("row", "split", "tile"))
    length = lengths[row]
    num_blocks = lax.div(length + (BLOCK - 1), BLOCK)
    first, end = (lax.div(num_blocks * s, plan.splits) for s in (split, split + 1))
    tile_rows = pl.ds(tile * TILE_ROWS, TILE_ROWS)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == COPY_THREAD)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        for i in range(plan.pieces):
            source = q_latent.at[row, tile_rows, pl.ds(i * plan.piece, plan.piece)]
            plgpu.copy_gmem_to_smem(source, shared.query.at[i], shared.ready)
        source = q_rope.at[row, tile_rows]
        plgpu.copy_gmem_to_smem(source, shared.query_rope, shared.ready)
        layer_number = layer[0]

        @pl.loop(first, end)
        def _(block: Array) -> None:
            buffer = lax.rem(block - first, BUFFERS)

            @pl.when(block - first >= BUFFERS)
            def _() -> None:
                plgpu.barrier_wait(shared.free.at[buffer])

            for i in range(plan.copies):
                _start_copies(shared, plan, cache, scales, table, layer_number, row, length, block, i, buffer)

    @pl.when(warpgroup < COPY_THREAD)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        attention = Float8Attention if plan.scaled else Attention
        attend = attention(shared, plan, scale, warpgroup, tile, length, first, end)
        attend.finish(attend.run(), out.at[split, row, tile_rows], lse.at[split, row, tile_rows])


def _start_copies(
    shared: Shared,
    plan: GpuPlan,
    cache: Any,
    scales: Any,
    table: Any,
    layer: Array,
    row: Array,
    length: Array,
    block: Array,
    chunk: int,
    buffer: Array,
) -> None:
    """Begins to bring one chunk of a block; those beyond the row's tokens are its last one once more."""
    token = jnp.minimum(block * BLOCK + chunk * plan.chunk, lax.div(length - 1, plan.chunk) * plan.chunk)
    page = row if table is None else table[row, lax.div(token, plan.page_size)]
    tokens = pl.ds(token if table is None else lax.rem(token, plan.page_size), plan.chunk)
    target = pl.ds(chunk * plan.chunk, plan.chunk)
    latent, rope = (shared.raw_latent, shared.raw_rope) if plan.scaled else (shared.latent, shared.rope)
    full = shared.full.at[buffer]
    width = RAW_PIECE if plan.scaled else plan.piece
    for i in range(plan.rank // width):
        source = cache.at[layer, page, tokens, pl.ds(i * width, width)]
        plgpu.copy_gmem_to_smem(source, latent.at[buffer, i, target], full)
    source = cache.at[layer, page, tokens, pl.ds(plan.rank, ROPE_COLUMNS)]
    plgpu.copy_gmem_to_smem(source, rope.at[buffer, target], full)
    if scales is not None:
        plgpu.copy_gmem_to_smem(scales.at[layer, page, 0, tokens], shared.scales.at[buffer, target], full)
