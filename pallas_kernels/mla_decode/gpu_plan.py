"""How the GPU kernels of `mla_decode` cut their work: tiles of query rows, blocks of tokens, splits of rows."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.gpu_chip import GpuChip

BLOCK = 64
"""Tokens of a step. Their entries are 72 KiB in bfloat16, of which two fit into shared memory beside the queries."""

PIECE = {"hopper": 128, "blackwell": 64}
"""Columns of the latent that are multiplied together, at most. On Blackwell as many again come from tensor memory to be
made smaller; 128 spill."""

BUFFERS = 2
"""Blocks of entries that are there or under way."""

TILE_ROWS = 64
"""Query rows that a thread block works on: their results are all that registers hold."""

ROPE_COLUMNS = 64
"""Columns of the rope key as copied: rope keys may be narrower, the copy engine and the cache's padding fill up."""

ROW_TILE = 8
"""Rows of a tile in shared memory: what is copied has a multiple of it, and begins at one."""

SPLIT_BLOCKS = 4
"""Blocks that a split should have at least: its result, in float32, is as large as two blocks of the cache."""


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """Sizes that are fixed when a kernel is compiled.

    Attributes:
        batch, queries, heads, rank: B, Q, H and kv_lora_rank of the arguments.
        page_size: tokens that lie together in the cache; a contiguous cache has one page a row.
        pages_a_row: width of the page table; 0 for a contiguous cache.
        chunk: tokens that one copy brings; it lies within a page.
        scaled: the cache is FP8 with scales.
        piece: columns of the latent that lie together in shared memory and are multiplied together.
        tiles: thread blocks that share a batch row and its tokens.
        splits: thread blocks that the tokens of a batch row are dealt to, each a share of its blocks.
    """

    batch: int
    queries: int
    heads: int
    rank: int
    page_size: int
    pages_a_row: int
    chunk: int
    scaled: bool
    piece: int
    tiles: int
    splits: int

    @property
    def rows(self) -> int:
        """Query rows of a batch row."""
        return self.queries * self.heads

    @property
    def padded_rows(self) -> int:
        """Query rows as the kernel takes them: tiled copies want a multiple of 8."""
        return -(-self.rows // ROW_TILE) * ROW_TILE

    @property
    def pieces(self) -> int:
        """Pieces of the latent; an even number."""
        return self.rank // self.piece

    @property
    def copies(self) -> int:
        """Copies that bring the tokens of a block."""
        return BLOCK // self.chunk


def make_plan(
    q_latent_shape: tuple[int, ...],
    cache: Array | jax.ShapeDtypeStruct,
    page_table: Array | jax.ShapeDtypeStruct | None,
    chip: GpuChip,
) -> GpuPlan:
    """Chooses the sizes.

    An SM holds one thread block. Splits fill the chip once, as long as each has a few blocks of the longest row
    that the cache has room for; lengths are known at run time only, and every split takes its share of them.
    """
    batch, queries, heads, rank = q_latent_shape
    page_size = cache.shape[2]
    pages_a_row = 0 if page_table is None else page_table.shape[1]
    capacity = page_size * max(pages_a_row, 1)
    tiles = -(-queries * heads // TILE_ROWS)
    most_splits = max(-(-capacity // BLOCK) // SPLIT_BLOCKS, 1)
    return GpuPlan(
        batch=batch,
        queries=queries,
        heads=heads,
        rank=rank,
        page_size=page_size,
        pages_a_row=pages_a_row,
        chunk=math.gcd(BLOCK, page_size) if pages_a_row else BLOCK,
        scaled=cache.dtype == jnp.float8_e4m3fn,
        piece=math.gcd(PIECE[chip.generation], rank // 2),
        tiles=tiles,
        splits=max(min(chip.sms // (batch * tiles), most_splits), 1),
    )
