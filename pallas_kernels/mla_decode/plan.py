"""How the kernel of `mla_decode` cuts its work: blocks of tokens, groups of query rows, parts of the grid."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chip import Chip

GROUP_ROWS = 128
BUFFERS = 2
COPIES_TOGETHER = 8
"""Copies of pages that are started together, at most: one at a time, each waits for its page number."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes that are fixed when a kernel is compiled.

    Attributes:
        queries, heads, rank, rope, width: Q, H, kv_lora_rank, Dr and W of the arguments.
        page_size: tokens that lie together in the cache; a contiguous cache has one page a row.
        pages_a_row: width of the page table; 0 for a contiguous cache.
        block: tokens that are fetched together, a step of the loop.
        sub_block: tokens whose scores are held together, of a block that every query sees whole.
        masked_sub_block: the same for the last blocks of a row.
        chunk: tokens that one copy brings; it lies within a page.
        granule: copies bring a multiple of it, the sublane tile of the cache's type.
        groups, group_rows: the Q * H query rows are worked on `group_rows` at a time.
        batch: B.
        parts: size of the parallel grid dimension.
        split: every part takes a share of each row's tokens, not a share of the rows.
    """

    queries: int
    heads: int
    rank: int
    rope: int
    width: int
    page_size: int
    pages_a_row: int
    block: int
    sub_block: int
    masked_sub_block: int
    chunk: int
    granule: int
    groups: int
    group_rows: int
    batch: int
    parts: int
    split: bool

    @property
    def rows(self) -> int:
        """Query rows of a batch row, before padding."""
        return self.queries * self.heads

    @property
    def columns(self) -> int:
        """Columns of the cache that enter the accumulator: the latent, up to a multiple of 128."""
        return min(-(-self.rank // 128) * 128, self.width)

    @property
    def copies_together(self) -> int:
        """Copies of a whole block that are started together, of `block // chunk`."""
        return math.gcd(self.block // self.chunk, COPIES_TOGETHER)

    @property
    def rows_a_part(self) -> int:
        """Batch rows that a part of the grid goes through."""
        return self.batch if self.split else self.batch // self.parts


def make_plan(
    q_latent_shape: tuple[int, ...],
    rope: int,
    cache_shape: tuple[int, ...],
    cache_dtype: jnp.dtype,
    pages_a_row: int,
    chip: Chip,
) -> Plan:
    """Chooses the sizes.

    A block is as long as what it holds in VMEM allows: the start of a loop step (semaphores, latencies) costs some
    100 bundles. Two sub-blocks are enough for the scheduler to multiply one while it takes the exponentials of the
    other. Few query rows take bigger blocks, since their steps are short. On a chip of two cores the batch rows are
    dealt to both; a small or odd batch has each row's tokens split instead.
    """
    batch, queries, heads, rank = q_latent_shape
    page_size, width = cache_shape[2:]
    rows = queries * heads
    groups = -(-rows // GROUP_ROWS)
    group_rows = rows if groups == 1 else -(-rows // groups // 16) * 16
    itemsize = cache_dtype.itemsize
    block = (2048 if rows <= 32 else 1024) // (2 if itemsize == 4 else 1)
    split = chip.cores > 1 and (batch % chip.cores != 0 or batch < 2 * chip.cores)
    return Plan(
        queries=queries,
        heads=heads,
        rank=rank,
        rope=rope,
        width=width,
        page_size=page_size,
        pages_a_row=pages_a_row,
        block=block,
        sub_block=1024 if rows <= 16 else 512,
        masked_sub_block=256,
        chunk=math.gcd(block, page_size) if pages_a_row else block,
        granule=copy_granule(cache_dtype),
        groups=groups,
        group_rows=group_rows,
        batch=batch,
        parts=chip.cores,
        split=split,
    )


def unsupported(q_latent: Array, q_rope: Array, cache: Array, page_table: Array | None) -> str | None:
    """What keeps the kernel from taking these arguments, as a phrase; None if nothing does."""
    for name, array in (("q_latent", q_latent), ("q_rope", q_rope), ("cache", cache)):
        types = (jnp.bfloat16, jnp.float32) + ((jnp.float8_e4m3fn,) if name == "cache" else ())
        if array.dtype not in types:
            return f"{name} of {array.dtype}"
    if cache.shape[-1] % 128:
        return f"a cache {cache.shape[-1]} wide (expected a multiple of 128)"
    tile = copy_granule(cache.dtype)
    if cache.shape[2] % tile:
        what = "a capacity" if page_table is None else "pages"
        return f"{what} of {cache.shape[2]} tokens of {cache.dtype} (expected a multiple of {tile})"
    return None


def copy_granule(cache_dtype: jnp.dtype) -> int:
    """Tokens of which a copy brings a multiple: the sublane tile of their type; of an FP8 cache's scales, the lanes."""
    return 128 if cache_dtype.itemsize == 1 else 32 // cache_dtype.itemsize


def vmem_bytes(plan: Plan, query_dtype: jnp.dtype, compute_dtype: jnp.dtype, cache_dtype: jnp.dtype) -> int:
    """VMEM that blocks and scratch occupy."""
    padded_rows = plan.groups * -(-plan.group_rows // 16) * 16
    cache = BUFFERS * plan.block * (plan.width * cache_dtype.itemsize + 32)
    queries = padded_rows * plan.width * (2 * query_dtype.itemsize + compute_dtype.itemsize)
    scores = 2 * plan.group_rows * plan.sub_block * (4 + compute_dtype.itemsize)
    state = padded_rows * (plan.columns + 2 * 128) * 4
    results = 2 * padded_rows * (plan.rank + 8) * 4
    return cache + queries + scores + state + results
