"""Block sizes of the kernels of `mla_prefill`, and which blocks see each other.

All of them hold a block of one side (queries in the forward pass and for their gradient, keys for the gradient of
keys and values) and walk over chunks of the other. Scores lie transposed, walked x held: what softmax needs of each
held row is then a row along lanes, which costs no shuffles, and the held side has to be transposed only once.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

LANES = 128


@dataclasses.dataclass(frozen=True)
class Attention:
    """What of a call is static.

    Attributes:
        heads: H.
        group: heads that a grid step takes; two, for two rotated queries of 64 share a tile of 128 lanes.
        nope: Dn, a multiple of 128.
        rope: Dr, a multiple of 64.
        value: Dv, a multiple of 128.
        scale: factor of the scores.
    """

    heads: int
    group: int
    nope: int
    rope: int
    value: int
    scale: float

    @property
    def groups(self) -> int:
        return self.heads // self.group


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of the blocks of one kernel.

    Attributes:
        held: rows that stay; they are the lanes of the scores.
        fetched: rows of the other side that come with a grid step.
        chunk: those of them that an iteration inside the step takes; they are the sublanes of the scores.
        unit: held rows of one product.
    """

    held: int
    fetched: int
    chunk: int
    unit: int


def block_sizes(held: int, walked: int, dtype: jnp.dtype, largest: tuple[int, int]) -> Sizes:
    """Sizes for `held` x `walked` rows; a bfloat16 kernel may have as many as `largest` in a block and in a chunk.

    The loop over chunks starts and ends with products that nothing overlaps, so a step fetches many of them.
    """
    narrow = dtype == jnp.bfloat16
    held_limit, chunk, fetched = (*largest, 2048) if narrow else (largest[0] // 2, LANES, 512)
    blocks = pl.cdiv(held, held_limit)
    held = _round_up(pl.cdiv(held, blocks), LANES)
    chunk = min(chunk, _round_up(walked, LANES))
    unit = next(size for size in (256, LANES) if held % size == 0)
    return Sizes(held, min(fetched, _round_up(walked, chunk)), chunk, unit)


def _round_up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def key_chunks(start: Array, segments: Array | None, queries: int, keys: int, sizes: Sizes) -> Array:
    """Chunks of keys that each block of queries sees: int32 [3 * B * blocks].

    `segments` is int32 [B, 1, T] or None. Those of block i of row b are first ... last - 1, in order first, full,
    last, each [B, blocks]; up to `full` all of its queries see all of their keys.
    """
    block = jnp.arange(pl.cdiv(queries, sizes.held))
    begin = start[:, None] + block * sizes.held
    end = start[:, None] + jnp.minimum((block + 1) * sizes.held, queries)
    last = jnp.minimum(pl.cdiv(end, sizes.chunk), pl.cdiv(keys, sizes.chunk))
    first = jnp.zeros_like(last)
    full = jnp.minimum((begin + 1) // sizes.chunk, last)
    if segments is not None:
        met = _meet(segments[:, 0], sizes.held, sizes.chunk)
        first = jnp.minimum(jnp.argmax(met, axis=-1), last)
        full = first
    return jnp.stack([first, full, last]).astype(jnp.int32).reshape(-1)


def query_chunks(start: Array, segments: Array | None, queries: int, keys: int, sizes: Sizes) -> Array:
    """Chunks of queries that see each block of keys: int32 [3 * B * blocks], in order first, full, last.

    From `full` on all queries see all of the block's keys, but the last chunk may hold rows that are no queries.
    """
    block = jnp.arange(pl.cdiv(keys, sizes.held))
    begin = block * sizes.held - start[:, None]
    last = jnp.full_like(begin, pl.cdiv(queries, sizes.chunk))
    first = jnp.clip(begin // sizes.chunk, 0, last)
    full = pl.cdiv(begin + sizes.held - 1, sizes.chunk)
    if segments is not None:
        met = _meet(segments[:, 0], sizes.chunk, sizes.held).swapaxes(1, 2)
        met = jnp.pad(met, ((0, 0), (0, block.size - met.shape[1]), (0, 0)))
        last = jnp.where(met.any(-1), met.shape[-1] - jnp.argmax(met[..., ::-1], axis=-1), 0)
        first, full = jnp.minimum(first, last), last
    return jnp.stack([first, jnp.clip(full, first, last), last]).astype(jnp.int32).reshape(-1)


def _meet(segments: Array, rows: int, columns: int) -> Array:
    """Whether blocks of `rows` and of `columns` tokens may share a segment: bool [B, T / rows, T / columns]."""
    low, high = (_per_block(segments, rows, reduce) for reduce in (jnp.min, jnp.max))
    other_low, other_high = (_per_block(segments, columns, reduce) for reduce in (jnp.min, jnp.max))
    return (low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= high[:, :, None])


def _per_block(segments: Array, size: int, reduce: Any) -> Array:
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % size)), mode="edge")
    return reduce(padded.reshape(len(segments), -1, size), axis=-1)


def fetched_block(step: Any, first: Any, last: Any, chunks: int) -> Any:
    """Index of the block that a step needs; one that needs none keeps its neighbour's, which is not fetched again."""
    return jnp.clip(step, first // chunks, jnp.maximum(last - 1, 0) // chunks)
