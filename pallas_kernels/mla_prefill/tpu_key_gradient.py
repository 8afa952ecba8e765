"""Derivative of `mla_prefill` with respect to keys and values: holds a block of them and walks over the queries."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import chip, interpret
from pallas_kernels.mla_prefill import tiles
from pallas_kernels.mla_prefill.blocks import Attention, Sizes, block_sizes, fetched_block, query_chunks
from pallas_kernels.mla_prefill.held_queries import units

LARGEST = (512, 256)
"""Rows of a block that is held and of a chunk, in bfloat16, beyond which nothing is gained on any chip."""


class _Refs(NamedTuple):
    """Blocks [rows, heads of the group * width], then scratch of each head."""

    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    v: Any
    segments: Any
    key_segments: Any
    d_out: Any
    lse: Any
    delta: Any
    dk_nope: Any
    dk_rope: Any
    dv: Any
    k: Any
    """[group, Dn + Dr, keys]."""
    values: Any
    """[group, Dv, keys], v transposed."""
    scores: Any
    """float32 [group, chunk, keys], of the chunk that is next."""
    d_weights: Any
    """float32 [group, chunk, keys], likewise: the derivative with respect to the softmax's result."""
    weights: Any
    """[group, chunk, keys]."""
    d_scores: Any
    """[group, chunk, keys]."""
    dk: Any
    """float32 [group, Dn, keys]."""
    shared: Any
    """float32 [Dr, keys], cotangent of k_rope, summed over all heads."""
    dv_sum: Any
    """float32 [group, Dv, keys]."""


def key_gradient(
    attention: Attention,
    arrays: tuple[Array, ...],
    start: Array,
    segments: Array | None,
    lse: Array,
    delta: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    """Arguments as of `forward`, `lse` its result; `delta` is that of `query_gradient`, `d_out` the cotangent.

    Returns:
        Cotangents of k_nope, k_rope and v.
    """
    batch, queries, keys = *arrays[0].shape[:2], arrays[2].shape[1]
    dtype, group, nope, rope, value = (
        arrays[0].dtype,
        attention.group,
        attention.nope,
        attention.rope,
        attention.value,
    )
    sizes = block_sizes(keys, queries, dtype, LARGEST)
    ranges = query_chunks(start, segments, queries, keys, sizes)
    packed = segments is not None
    grid, in_specs, out_specs = _specs(attention, batch, queries, keys, sizes, packed)
    held, chunk = sizes.held, sizes.chunk
    scratch = [
        pltpu.VMEM((group, nope + rope, held), dtype),
        pltpu.VMEM((group, value, held), dtype),
        pltpu.VMEM((group, chunk, held), jnp.float32),
        pltpu.VMEM((group, chunk, held), jnp.float32),
        pltpu.VMEM((group, chunk, held), dtype),
        pltpu.VMEM((group, chunk, held), dtype),
        pltpu.VMEM((group, nope, held), jnp.float32),
        pltpu.VMEM((rope, held), jnp.float32),
        pltpu.VMEM((group, value, held), jnp.float32),
    ]
    operands = (*arrays, segments, segments) if packed else arrays
    return pl.pallas_call(
        functools.partial(_kernel, attention, sizes, queries, packed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=[tiles.like(arrays[0], x.shape, dtype) for x in arrays[2:]],
        compiler_params=tiles.compiler_params(
            ("parallel", "arbitrary", "arbitrary", "arbitrary"), (*in_specs, *out_specs), dtype, scratch
        ),
        interpret=interpret(),
        name="dsv3_mla_prefill_key_gradient",
    )(ranges, start, *operands, d_out, lse, delta)


def _held_block(step: Any, blocks: Any) -> Any:
    """Which block of keys a step of the first grid dimension holds.

    Two cores split that dimension in halves, and earlier keys are seen by more queries: one core takes the even blocks,
    the other the odd ones.
    """
    if chip().cores == 1:
        return step
    half = pl.cdiv(blocks, 2)
    return jnp.where(step < half, 2 * step, 2 * (step - half) + 1)


def _specs(
    attention: Attention, batch: int, queries: int, keys: int, sizes: Sizes, packed: bool
) -> tuple[tuple[int, ...], list[pl.BlockSpec], list[pl.BlockSpec]]:
    """Grid of (blocks of keys, rows of the batch, heads, fetches of queries); inputs and outputs."""
    blocks, group, chunks = pl.cdiv(keys, sizes.held), attention.group, sizes.fetched // sizes.chunk

    def fetched(ranges: Any, j: Any, b: Any, i: Any) -> Any:
        at = b * blocks + _held_block(j, blocks)
        return fetched_block(i, ranges[at], ranges[2 * batch * blocks + at], chunks)

    def query(width: int) -> pl.BlockSpec:
        shape = (None, sizes.fetched, group * width)
        return pl.BlockSpec(shape, lambda j, b, g, i, ranges, _: (b, fetched(ranges, j, b, i), g))

    def key(width: int) -> pl.BlockSpec:
        shape = (None, sizes.held, group * width)
        return pl.BlockSpec(shape, lambda j, b, g, i, *_: (b, _held_block(j, blocks), g))

    row = pl.BlockSpec(
        (None, None, group, sizes.fetched),
        lambda j, b, g, i, ranges, _: (b, g, 0, fetched(ranges, j, b, i)),
    )
    shared = pl.BlockSpec(
        (None, sizes.held, attention.rope), lambda j, b, g, i, *_: (b, _held_block(j, blocks), 0)
    )
    segments = [
        pl.BlockSpec(
            (None, 1, sizes.fetched), lambda j, b, g, i, ranges, _: (b, 0, fetched(ranges, j, b, i))
        ),
        pl.BlockSpec((None, 1, sizes.held), lambda j, b, g, i, *_: (b, 0, _held_block(j, blocks))),
    ]
    k_and_v = [key(attention.nope), shared, key(attention.value)]
    in_specs = [query(attention.nope), query(attention.rope), *k_and_v, *(segments if packed else [])]
    in_specs += [query(attention.value), row, row]
    return (blocks, batch, attention.groups, pl.cdiv(queries, sizes.fetched)), in_specs, k_and_v


class _Step(NamedTuple):
    """A grid step: its block of keys, and its chunks of queries, first ... last - 1; see `query_chunks`."""

    first: Array
    full: Array
    last: Array
    offset: Array
    """Position of query 0 less that of the first key."""
    base: Array
    """First chunk of the fetched block."""
    queries: int
    chunk: int

    @classmethod
    def here(cls, ranges: Any, start: Any, sizes: Sizes, queries: int) -> "_Step":
        blocks, batch = pl.num_programs(0), pl.num_programs(1)
        block, b, i = _held_block(pl.program_id(0), blocks), pl.program_id(1), pl.program_id(3)
        chunks = sizes.fetched // sizes.chunk
        base = i * chunks
        at, rows = b * blocks + block, batch * blocks

        def bound(kind: int) -> Array:
            return jnp.clip(ranges[kind * rows + at], base, base + chunks)

        offset = start[b] - block * sizes.held
        return cls(bound(0), bound(1), bound(2), offset, base, queries, sizes.chunk)

    def rows(self, chunk: Any) -> Any:
        """Rows of a chunk in the fetched block."""
        return pl.ds(pl.multiple_of((chunk - self.base) * self.chunk, self.chunk), self.chunk)

    def valid(self, chunk: Any) -> Any:
        """Queries of a chunk that exist are below this one."""
        return self.queries - chunk * self.chunk


def _kernel(
    attention: Attention, sizes: Sizes, queries: int, packed: bool, ranges: Any, start: Any, *blocks: Any
) -> None:
    refs = _Refs(*blocks[:5], *(blocks[5:7] if packed else (None, None)), *blocks[7 if packed else 5 :])
    step = _Step.here(ranges, start, sizes, queries)
    group, fetch = pl.program_id(2), pl.program_id(3)
    ending = fetch == pl.num_programs(3) - 1

    @pl.when(fetch == 0)
    def _() -> None:
        for head in range(attention.group):
            tiles.load_transposed(refs.k, head, refs.k_nope, refs.k_rope, attention)
            refs.values[head] = refs.v[:, tiles.columns(head, attention.value)].T
        refs.dk[...] = jnp.zeros_like(refs.dk)
        refs.dv_sum[...] = jnp.zeros_like(refs.dv_sum)

    @pl.when((fetch == 0) & (group == 0))
    def _() -> None:
        refs.shared[...] = jnp.zeros_like(refs.shared)

    @pl.when(step.last > step.first)
    def _() -> None:
        for unit in units(attention, sizes):
            _multiply(refs, attention, unit, step.rows(step.first))
        body = functools.partial(_chunk, refs, attention, sizes, step)
        final = step.last - 1
        full = jnp.minimum(step.full, final)
        lax.fori_loop(step.first, full, functools.partial(body, True, True), None)
        lax.fori_loop(full, final, functools.partial(body, False, True), None)
        body(True, False, final, None)

    @pl.when(ending)
    def _() -> None:
        for head in range(attention.group):
            dk = refs.dk[head] * attention.scale
            refs.dk_nope[:, tiles.columns(head, attention.nope)] = dk.T.astype(refs.dk_nope.dtype)
            dv = refs.dv_sum[head].T
            refs.dv[:, tiles.columns(head, attention.value)] = dv.astype(refs.dv.dtype)

    @pl.when(ending & (group == pl.num_programs(2) - 1))
    def _() -> None:
        refs.dk_rope[...] = (refs.shared[...] * attention.scale).T.astype(refs.dk_rope.dtype)


def _chunk(
    refs: _Refs,
    attention: Attention,
    sizes: Sizes,
    step: _Step,
    masked: bool,
    more: bool,
    chunk: Any,
    _: None,
) -> None:
    """Derivatives by one chunk of queries, whose scores are there, and the scores of the next if there are more."""
    rows = step.rows(chunk)
    rope = refs.q_rope[rows].T
    queries, cotangents, statistics = [], [], []
    for head in range(attention.group):
        nope = refs.q_nope[rows, tiles.columns(head, attention.nope)].T
        queries.append(jnp.concatenate([nope, rope[tiles.columns(head, attention.rope)]]))
        cotangents.append(refs.d_out[rows, tiles.columns(head, attention.value)].T)
        statistics.append([tiles.by_lanes(ref[head : head + 1, rows]) for ref in (refs.lse, refs.delta)])
    if masked:
        queries, cotangents = (
            [tiles.zero_beyond(x, step.valid(chunk)) for x in y] for y in (queries, cotangents)
        )
    mask = _mask(refs, sizes, step, chunk) if masked else None
    late = None
    for unit in units(attention, sizes):
        _differentiate(refs, attention, unit, sizes, statistics[unit[0]], mask)
        if more:
            _multiply(refs, attention, unit, step.rows(chunk + 1))
        if late:
            _add(refs, attention, queries, cotangents, late)
        late = unit
    if late:
        _add(refs, attention, queries, cotangents, late)


def _mask(refs: _Refs, sizes: Sizes, step: _Step, chunk: Any) -> Any:
    """Which queries of a chunk (rows) see which keys (lanes), by pieces of both."""
    offset = step.offset + chunk * sizes.chunk
    difference = tiles.row_minus_lane(tiles.PIECE, sizes.unit)
    row = lax.broadcasted_iota(jnp.int32, difference.shape, 0)
    owner = None if refs.segments is None else tiles.by_lanes(refs.segments[:, step.rows(chunk)])

    def mask(queries: slice, keys: slice) -> Array:
        seen = difference >= keys.start - queries.start - offset
        seen &= row < step.valid(chunk) - queries.start
        if owner is None:
            return seen
        return seen & (tiles.repeat_lanes(owner[queries], sizes.unit) == refs.key_segments[:, keys])

    return mask


def _multiply(refs: _Refs, attention: Attention, unit: tuple[int, slice], rows: Any) -> None:
    head, lanes = unit
    rope = refs.q_rope[rows, tiles.columns(head, attention.rope)]
    q = jnp.concatenate([refs.q_nope[rows, tiles.columns(head, attention.nope)], rope], axis=1)
    refs.scores[head, :, lanes] = tiles.dot(q, refs.k[head, :, lanes])
    cotangent = refs.d_out[rows, tiles.columns(head, attention.value)]
    refs.d_weights[head, :, lanes] = tiles.dot(cotangent, refs.values[head, :, lanes])


def _differentiate(
    refs: _Refs,
    attention: Attention,
    unit: tuple[int, slice],
    sizes: Sizes,
    statistics: list[Array],
    mask: Any,
) -> None:
    head, lanes = unit
    factor = attention.scale * tiles.LOG2_E
    for piece in tiles.pieces(sizes.chunk):
        lse, delta = (tiles.repeat_lanes(x[piece], sizes.unit) for x in statistics)
        weights = jnp.exp2(refs.scores[head, piece, lanes] * factor - lse)
        d_scores = weights * (refs.d_weights[head, piece, lanes] - delta)
        if mask is not None:
            seen = mask(piece, lanes)
            weights, d_scores = jnp.where(seen, weights, 0), jnp.where(seen, d_scores, 0)
        refs.weights[head, piece, lanes] = weights.astype(refs.weights.dtype)
        refs.d_scores[head, piece, lanes] = d_scores.astype(refs.d_scores.dtype)


def _add(
    refs: _Refs, attention: Attention, queries: list[Array], cotangents: list[Array], unit: tuple[int, slice]
) -> None:
    head, lanes = unit
    dk = tiles.dot(queries[head], refs.d_scores[head, :, lanes])
    refs.dk[head, :, lanes] += dk[: attention.nope]
    refs.shared[:, lanes] += dk[attention.nope :]
    refs.dv_sum[head, :, lanes] += tiles.dot(cotangents[head], refs.weights[head, :, lanes])
