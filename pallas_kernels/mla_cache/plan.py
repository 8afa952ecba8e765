"""How the kernel of `mla_cache` cuts its work."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chip import MIB, chip

MAX_TOKENS = 8
"""New tokens of a row that the kernel takes: its code is written out for each of them."""

SUBLANES = 8
LANES = 128
BUFFER_BYTES = 8 * MIB


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes that are fixed when the kernel is compiled.

    Attributes:
        batch: B.
        rows: of the batch that a grid step works on.
        queries: Q.
        rank: kv_lora_rank.
        width: W.
        page_size: tokens that lie together; the capacity of a row where there are no pages.
        capacity: positions of a row.
        packing: tokens in a 32-bit word.
        windows: that the new tokens of a row may touch. A window is the tile of 8 words that a copy moves.
    """

    batch: int
    rows: int
    queries: int
    rank: int
    width: int
    page_size: int
    capacity: int
    packing: int
    windows: int

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return SUBLANES * self.packing

    @property
    def steps(self) -> int:
        return self.batch // self.rows


def unsupported(cache: Array, compressed: Array, page_table: Array | None) -> str | None:
    """Why the kernel cannot write to this cache; None if it can."""
    page_size, width = cache.shape[2:]
    if cache.dtype not in (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn):
        return f"a cache of {cache.dtype} (expected bfloat16, float32 or float8_e4m3fn)"
    if compressed.dtype not in (jnp.float32, jnp.bfloat16):
        return f"entries of {compressed.dtype} (expected bfloat16 or float32)"
    if width % LANES:
        return f"entries of {width} columns (expected a multiple of {LANES})"
    window = SUBLANES * 4 // cache.dtype.itemsize
    what = "a capacity" if page_table is None else "pages"
    if page_size % window:
        return f"{what} of {page_size} tokens (expected a multiple of {window} for {cache.dtype})"
    if cache.dtype.itemsize == 1 and page_size % LANES:
        return f"{what} of {page_size} tokens with scales (expected a multiple of {LANES})"
    return None


def make_plan(cache: Array, compressed: Array, rank: int, page_table: Array | None) -> Plan:
    batch, queries = compressed.shape[:2]
    page_size, width = cache.shape[2:]
    packing = 4 // cache.dtype.itemsize
    window = SUBLANES * packing
    windows = 1 if queries == 1 else 2 + (queries - 2) // window
    return Plan(
        batch=batch,
        rows=_rows_a_step(batch, queries, windows * SUBLANES * width * 4),
        queries=queries,
        rank=rank,
        width=width,
        page_size=page_size,
        capacity=page_size * (1 if page_table is None else page_table.shape[1]),
        packing=packing,
        windows=windows,
    )


def _rows_a_step(batch: int, queries: int, bytes_a_row: int) -> int:
    """All rows in one step, so that copies wait for each other only once; fewer for two cores, or if VMEM is short."""
    cores = chip().cores
    fitting = [
        rows
        for rows in range(1, batch + 1)
        if batch % rows == 0
        and (batch // rows) % cores == 0
        and rows * queries % 16 == 0
        and rows * bytes_a_row <= BUFFER_BYTES
    ]
    return max(fitting, default=batch)


def vmem_bytes(plan: Plan) -> int:
    """What the kernel's scratch and its values take."""
    tokens = plan.rows * plan.queries
    windows = plan.rows * plan.windows * (SUBLANES * plan.width * 4 + 8 * LANES * 4)
    return windows + tokens * (plan.width * 4 * 6 + 2 * LANES * 4)
