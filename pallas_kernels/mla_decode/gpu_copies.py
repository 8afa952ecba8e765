"""What the copying warps of `mla_decode`'s GPU kernels do: queries, then blocks of entries ahead of their use."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.gpu_plan import BLOCK, BUFFERS, TILE_ROWS, GpuPlan
from pallas_kernels.mla_decode.gpu_shared import RAW_PIECE, Shared


class Operands(NamedTuple):
    """A kernel's operands and results in global memory; None where a variant has none.

    Attributes:
        lengths: int32 [B].
        layer: int32 [1].
        table: int32 [B, pages_a_row].
        q_latent, q_rope: bfloat16 [B, padded_rows, rank] and [B, padded_rows, 64].
        cache: [L, P, page_size, W].
        scales: float32 [L, P, 1, page_size].
        out: [splits, B, padded_rows, rank].
        lse: float32 [splits, B, tiles * 64].
    """

    lengths: Any
    layer: Any
    table: Any
    q_latent: Any
    q_rope: Any
    cache: Any
    scales: Any
    out: Any
    lse: Any


class Work(NamedTuple):
    """What a thread block has to do.

    Attributes:
        row: of the batch.
        split, tile: which of the row's.
        length: of the row.
        first, end: its blocks of tokens.
    """

    row: Array
    split: Array
    tile: Array
    length: Array
    first: Array
    end: Array

    @property
    def tile_rows(self) -> Any:
        """The tile's query rows."""
        return pl.ds(self.tile * TILE_ROWS, TILE_ROWS)


def operand_refs(refs: tuple[Any, ...], plan: GpuPlan) -> Operands:
    """The references that a kernel gets, by name."""
    absent = {"table": not plan.pages_a_row, "scales": not plan.scaled}
    present = iter(refs)
    return Operands(*(None if absent.get(name) else next(present) for name in Operands._fields))


def find_work(operands: Operands, plan: GpuPlan) -> Work:
    """Every split takes its share of the row's blocks."""
    row, split, tile = (lax.axis_index(name) for name in ("row", "split", "tile"))
    length = operands.lengths[row]
    num_blocks = lax.div(length + (BLOCK - 1), BLOCK)
    first, end = (lax.div(num_blocks * s, plan.splits) for s in (split, split + 1))
    return Work(row, split, tile, length, first, end)


def copy_all(shared: Shared, operands: Operands, plan: GpuPlan, work: Work) -> None:
    """Brings the queries and all blocks, the latter as buffers become free."""
    for i in range(plan.pieces):
        source = operands.q_latent.at[work.row, work.tile_rows, pl.ds(i * plan.piece, plan.piece)]
        plgpu.copy_gmem_to_smem(source, shared.query.at[i], shared.ready)
    plgpu.copy_gmem_to_smem(operands.q_rope.at[work.row, work.tile_rows], shared.query_rope, shared.ready)
    layer = operands.layer[0]

    @pl.loop(work.first, work.end)
    def _(block: Array) -> None:
        buffer = lax.rem(block - work.first, BUFFERS)

        @pl.when(block - work.first >= BUFFERS)
        def _() -> None:
            plgpu.barrier_wait(shared.free.at[buffer])

        for chunk in range(plan.copies):
            _start_copies(shared, operands, plan, work, layer, block, chunk, buffer)


def _start_copies(
    shared: Shared,
    operands: Operands,
    plan: GpuPlan,
    work: Work,
    layer: Array,
    block: Array,
    chunk: int,
    buffer: Array,
) -> None:
    """Begins to bring one chunk of a block; those beyond the row's tokens are its last one once more."""
    last = lax.div(work.length - 1, plan.chunk) * plan.chunk
    token = jnp.minimum(block * BLOCK + chunk * plan.chunk, last)
    page, offset = work.row, token
    if operands.table is not None:
        page, offset = (
            operands.table[work.row, lax.div(token, plan.page_size)],
            lax.rem(token, plan.page_size),
        )
    tokens, target = pl.ds(offset, plan.chunk), pl.ds(chunk * plan.chunk, plan.chunk)
    entries = operands.cache.at[layer, page, tokens]
    latent, rope = (shared.raw_latent, shared.raw_rope) if plan.scaled else (shared.latent, shared.rope)
    width = RAW_PIECE if plan.scaled else plan.piece
    full = shared.full.at[buffer]
    for i in range(plan.rank // width):
        plgpu.copy_gmem_to_smem(entries.at[:, pl.ds(i * width, width)], latent.at[buffer, i, target], full)
    plgpu.copy_gmem_to_smem(entries.at[:, pl.ds(plan.rank, rope.shape[-1])], rope.at[buffer, target], full)
    if operands.scales is not None:
        scales = operands.scales.at[layer, page, 0, tokens]
        plgpu.copy_gmem_to_smem(scales, shared.scales.at[buffer, target], full)
