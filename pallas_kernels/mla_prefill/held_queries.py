"""Where a kernel that holds queries and walks over keys stands, and the blocks that it fetches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.mla_prefill import tiles
from pallas_kernels.mla_prefill.blocks import Attention, Sizes, fetched_block


class Layout(NamedTuple):
    """Block specs in a grid of (heads, rows of the batch, blocks of queries, fetches of keys).

    Attributes:
        query: block of [B, T, H * width], by width of a head.
        key: block of [B, S, H * width].
        shared: block of [B, S, width], of all heads.
        row: block of [B, H / group, rows, T], by number of rows.
        segments: blocks of [B, 1, T], of the queries and of the keys.
        attention: gives the widths.
    """

    query: Callable[[int], pl.BlockSpec]
    key: Callable[[int], pl.BlockSpec]
    shared: Callable[[int], pl.BlockSpec]
    row: Callable[[int], pl.BlockSpec]
    segments: list[pl.BlockSpec]
    attention: Attention

    def inputs(self, packed: bool) -> list[pl.BlockSpec]:
        """Specs of queries, keys, values, and segments if rows are packed."""
        a = self.attention
        arrays = [
            self.query(a.nope),
            self.query(a.rope),
            self.key(a.nope),
            self.shared(a.rope),
            self.key(a.value),
        ]
        return arrays + (self.segments if packed else [])


def specs(
    attention: Attention, batch: int, queries: int, keys: int, sizes: Sizes
) -> tuple[tuple[int, ...], Layout]:
    """The grid and its blocks; `ranges` of `key_chunks` and `start` are prefetched."""
    blocks, group = pl.cdiv(queries, sizes.held), attention.group
    chunks = sizes.fetched // sizes.chunk

    def fetched(ranges: Any, b: Any, i: Any, j: Any) -> Any:
        at = b * blocks + i
        return fetched_block(j, ranges[at], ranges[2 * batch * blocks + at], chunks)

    def query(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, sizes.held, group * width), lambda g, b, i, j, *_: (b, i, g))

    def key(width: int) -> pl.BlockSpec:
        shape = (None, sizes.fetched, group * width)
        return pl.BlockSpec(shape, lambda g, b, i, j, ranges, _: (b, fetched(ranges, b, i, j), g))

    def shared(width: int) -> pl.BlockSpec:
        shape = (None, sizes.fetched, width)
        return pl.BlockSpec(shape, lambda g, b, i, j, ranges, _: (b, fetched(ranges, b, i, j), 0))

    def row(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, sizes.held), lambda g, b, i, j, *_: (b, g, 0, i))

    segments = [
        pl.BlockSpec((None, 1, sizes.held), lambda g, b, i, j, *_: (b, 0, i)),
        pl.BlockSpec(
            (None, 1, sizes.fetched), lambda g, b, i, j, ranges, _: (b, 0, fetched(ranges, b, i, j))
        ),
    ]
    grid = (attention.groups, batch, blocks, pl.cdiv(keys, sizes.fetched))
    return grid, Layout(query, key, shared, row, segments, attention)


class Step(NamedTuple):
    """A grid step: its block of queries and its chunks of keys.

    Attributes:
        first: its chunks of keys are first ... last - 1.
        full: up to this chunk, no mask is needed.
        last: see `first`.
        position: of the first query.
        end: keys from this position on are seen by no query.
        base: first chunk of the fetched block.
        chunk: keys of a chunk.
    """

    first: Array
    full: Array
    last: Array
    position: Array
    end: Array
    base: Array
    chunk: int

    @classmethod
    def here(cls, ranges: Any, start: Any, sizes: Sizes, lengths: tuple[int, int]) -> "Step":
        """The step of the current program; `lengths` are T and S."""
        b, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
        at, rows = b * pl.num_programs(2) + i, pl.num_programs(1) * pl.num_programs(2)
        chunks = sizes.fetched // sizes.chunk
        base = j * chunks
        first = jnp.maximum(ranges[at], base)
        last = jnp.minimum(ranges[2 * rows + at], base + chunks)
        full = jnp.clip(ranges[rows + at], first, jnp.maximum(first, last))
        end = jnp.minimum(start[b] + lengths[0], lengths[1])
        return cls(first, full, last, start[b] + i * sizes.held, end, base, sizes.chunk)

    def rows(self, chunk: Any) -> Any:
        """Rows of a chunk in the fetched block."""
        return pl.ds(pl.multiple_of((chunk - self.base) * self.chunk, self.chunk), self.chunk)

    def valid(self, chunk: Any) -> Any:
        """Keys of a chunk that some query sees are below this one."""
        return self.end - chunk * self.chunk


def units(attention: Attention, sizes: Sizes) -> list[tuple[int, slice]]:
    """Head and queries of each product."""
    return [
        (head, slice(first, first + sizes.unit))
        for head in range(attention.group)
        for first in range(0, sizes.held, sizes.unit)
    ]


def mask_of(refs: Any, sizes: Sizes, step: Step, chunk: Any) -> Callable[[slice, slice], Array]:
    """Which keys of a chunk (rows) which queries (lanes) see, by pieces of both."""
    offset = step.position - chunk * sizes.chunk
    difference = tiles.row_minus_lane(tiles.PIECE, sizes.unit)
    owner = None if refs.segments is None else tiles.by_lanes(refs.key_segments[:, step.rows(chunk)])

    def mask(keys: slice, queries: slice) -> Array:
        seen = difference <= offset + (queries.start - keys.start)
        if owner is None:
            return seen
        return seen & (tiles.repeat_lanes(owner[keys], sizes.unit) == refs.segments[:, queries])

    return mask
