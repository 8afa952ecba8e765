"""What both GPU kernels of `mla_prefill` work on: blocks of queries, chunks of keys, which of them meet."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_prefill.blocks import Sizes, key_chunks

QUERIES = 128
"""Queries of a block, all of one head."""
KEYS = 128
"""Keys of a chunk."""
STAGES = 2
"""Chunks that are in shared memory or on their way."""
WIDTH = 64
"""Widths are multiples of this: a row of 128 bytes of bfloat16."""
MASKED = -1e30
"""A score that no softmax sees; finite, for a chunk may hide every key from a query and -inf - -inf is NaN."""
LOWEST = -1e20
"""Largest score of a query before it has seen a key: so far above MASKED that what is hidden has the weight 0."""
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Work:
    """One call, with the arrays as the kernels read them.

    Attributes:
        q_nope: bfloat16 [B, T, H, D].
        q_rope: [B, T, H, R].
        k_nope: [B, S, H, D].
        k_rope: [B, S, R].
        v: [B, S, H, D].
        ranges: int32 [B, blocks of queries, 3]: first chunk of keys that a block sees, the one from which on some
            pair of query and key is masked, and the one behind the last.
        start: int32 [B].
        segments: int32 [B, T or S, rounded up to whole blocks and chunks], or None.
        scale: factor of the scores, for powers of two.
    """

    q_nope: Array
    q_rope: Array
    k_nope: Array
    k_rope: Array
    v: Array
    ranges: Array
    start: Array
    segments: Array | None
    scale: float

    @classmethod
    def of(
        cls,
        q_nope: Array,
        q_rope: Array,
        k_nope: Array,
        k_rope: Array,
        v: Array,
        scale: float,
        start: Array | None,
        segment_ids: Array | None,
    ) -> "Work":
        batch, queries = q_nope.shape[:2]
        keys, wide = k_nope.shape[1], max(q_nope.shape[-1], v.shape[-1])
        start = jnp.zeros(batch, jnp.int32) if start is None else start
        sizes = Sizes(held=QUERIES, fetched=KEYS, chunk=KEYS, unit=QUERIES)
        packed = None if segment_ids is None else segment_ids[:, None]
        ranges = key_chunks(start, packed, queries, keys, sizes).reshape(3, batch, -1)
        if segment_ids is not None:
            whole = max(round_up(queries, QUERIES), round_up(keys, KEYS))
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, whole - queries)), mode="edge")
        q_nope, k_nope, v = (_pad(x, wide) for x in (q_nope, k_nope, v))
        q_rope, k_rope = (_pad(x, k_rope.shape[-1]) for x in (q_rope, k_rope))
        ranges = ranges.transpose(1, 2, 0)
        if keys > queries:
            # 0 * NaN is NaN: what nobody has written must not be there. XLA does this where it takes v out of kv.
            written = jnp.arange(keys) < (start + queries)[:, None]
            v = jnp.where(written[:, :, None, None], v, 0)
        return cls(q_nope, q_rope, k_nope, k_rope, v, ranges, start, segment_ids, scale * LOG2_E)

    @property
    def operands(self) -> list[Array]:
        """Of a kernel; without segments `start` stands in for them, unread."""
        segments = self.start if self.segments is None else self.segments
        return [
            self.ranges,
            self.start,
            segments,
            jnp.arange(KEYS, dtype=jnp.int32),
            self.q_nope,
            self.q_rope,
            self.k_nope,
            self.k_rope,
            self.v,
        ]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Batch, heads, blocks of queries of each."""
        return self.q_nope.shape[0], self.q_nope.shape[2], self.ranges.shape[1]


class Place(NamedTuple):
    """Where a block stands.

    Attributes:
        row: of the batch.
        head: of the queries.
        query: the block's first.
        first, full, last: its chunks of keys, those from `full` on with a mask.
        start: position of the row's first query.
    """

    row: Any
    head: Any
    query: Any
    first: Any
    full: Any
    last: Any
    start: Any


def place_of(refs: Any) -> Place:
    """Blocks of one head follow each other, the one with the most keys first, so that they share keys in L2."""
    heads, blocks = refs.q_nope.shape[2], refs.ranges.shape[1]
    index = lax.axis_index("block")
    head_and_row = lax.div(index, blocks)
    block = blocks - 1 - lax.rem(index, blocks)
    row, head = lax.div(head_and_row, heads), lax.rem(head_and_row, heads)
    first, full, last = (refs.ranges[row, block, i] for i in range(3))
    return Place(row, head, block * QUERIES, first, full, last, refs.start[row])


def round_up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def _pad(x: Array, width: int) -> Array:
    """Zeros up to a multiple of WIDTH of the last dimension; real models need none."""
    missing = round_up(width, WIDTH) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def tiled(shape: tuple[int, ...]) -> Any:
    """bfloat16 shared memory whose tiles of 8 x 64 lie as the tensor cores want them."""
    transforms = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)
