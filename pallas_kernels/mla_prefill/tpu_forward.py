"""Forward kernel of `mla_prefill`: online softmax over chunks of keys, the next chunk's scores computed meanwhile."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import interpret
from pallas_kernels.mla_prefill import tiles
from pallas_kernels.mla_prefill.blocks import Attention, Sizes, block_sizes, key_chunks
from pallas_kernels.mla_prefill.held_queries import Step, mask_of, specs, units

LARGEST = (1024, 512)
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
    out: Any
    lse: Any
    q: Any
    """[group, Dn + Dr, queries]."""
    scores: Any
    """float32 [group, chunk, queries], of the chunk that is next."""
    weights: Any
    """[group, chunk, queries]."""
    peak: Any
    """float32 [group, 1, queries], largest score so far."""
    total: Any
    """float32 [group, 8, queries], partial sums of the weights."""
    context: Any
    """float32 [group, Dv, queries]."""


def forward(
    attention: Attention, arrays: tuple[Array, ...], start: Array, segments: Array | None
) -> tuple[Array, Array]:
    """Attention of arrays whose heads lie side by side.

    Args:
        arrays: q_nope [B, T, H * Dn], q_rope [B, T, H * Dr], k_nope [B, S, H * Dn], k_rope [B, S, Dr],
            v [B, S, H * Dv].
        start: int32 [B].
        segments: int32 [B, 1, T], or None.

    Returns:
        [B, T, H * Dv], and the log-sum-exp of the scores to base 2, float32 [B, H / group, group, T].
    """
    batch, queries, keys = *arrays[0].shape[:2], arrays[2].shape[1]
    dtype, group, value = arrays[4].dtype, attention.group, attention.value
    sizes = block_sizes(queries, keys, dtype, LARGEST)
    ranges = key_chunks(start, segments, queries, keys, sizes)
    grid, layout = specs(attention, batch, queries, keys, sizes)
    operands = arrays if segments is None else (*arrays, segments, segments)
    held = sizes.held
    scratch = [
        pltpu.VMEM((group, attention.nope + attention.rope, held), dtype),
        pltpu.VMEM((group, sizes.chunk, held), jnp.float32),
        pltpu.VMEM((group, sizes.chunk, held), dtype),
        pltpu.VMEM((group, 1, held), jnp.float32),
        pltpu.VMEM((group, 8, held), jnp.float32),
        pltpu.VMEM((group, value, held), jnp.float32),
    ]
    out_specs = [layout.query(value), layout.row(group)]
    out_shape = [
        tiles.like(arrays[0], (batch, queries, attention.heads * value), dtype),
        tiles.like(arrays[0], (batch, attention.groups, group, queries), jnp.float32),
    ]
    in_specs = layout.inputs(segments is not None)
    return pl.pallas_call(
        functools.partial(_kernel, attention, sizes, (queries, keys), segments is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=out_shape,
        compiler_params=tiles.compiler_params(
            ("parallel", "parallel", "arbitrary", "arbitrary"), (*in_specs, *out_specs), dtype, scratch
        ),
        interpret=interpret(),
        name="dsv3_mla_prefill_forward",
    )(ranges, start, *operands)


def _kernel(
    attention: Attention,
    sizes: Sizes,
    lengths: tuple[int, int],
    packed: bool,
    ranges: Any,
    start: Any,
    *blocks: Any,
) -> None:
    refs = _Refs(*blocks[:5], *(blocks[5:7] if packed else (None, None)), *blocks[7 if packed else 5 :])
    step = Step.here(ranges, start, sizes, lengths)

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        for head in range(attention.group):
            tiles.load_transposed(refs.q, head, refs.q_nope, refs.q_rope, attention)
        refs.peak[...] = jnp.full_like(refs.peak, tiles.MASKED)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.context[...] = jnp.zeros_like(refs.context)

    @pl.when(step.last > step.first)
    def _() -> None:
        for unit in units(attention, sizes):
            _score(refs, attention, unit, step.rows(step.first))
        body = functools.partial(_chunk, refs, attention, sizes, step)
        final = step.last - 1
        full = jnp.minimum(step.full, final)
        lax.fori_loop(step.first, full, functools.partial(body, False, True), None)
        lax.fori_loop(full, final, functools.partial(body, True, True), None)
        body(True, False, final, None)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        factor = attention.scale * tiles.LOG2_E
        for head in range(attention.group):
            total = jnp.sum(refs.total[head], axis=0, keepdims=True)
            lanes = tiles.columns(head, attention.value)
            refs.out[:, lanes] = (refs.context[head] / total).T.astype(refs.out.dtype)
            refs.lse[head : head + 1] = refs.peak[head] * factor + jnp.log2(total)


def _chunk(
    refs: _Refs, attention: Attention, sizes: Sizes, step: Step, masked: bool, more: bool, chunk: Any, _: None
) -> None:
    """Softmax and values of one chunk of keys, whose scores are there, and the scores of the next if there are more."""
    rows = step.rows(chunk)
    values = [refs.v[rows, tiles.columns(head, attention.value)].T for head in range(attention.group)]
    if masked:
        values = [tiles.zero_beyond(x, step.valid(chunk)) for x in values]
    mask = mask_of(refs, sizes, step, chunk) if masked else None
    late: tuple[Any, ...] = ()
    for unit in units(attention, sizes):
        decay = _soften(refs, attention, unit, sizes, mask)
        if more:
            _score(refs, attention, unit, step.rows(chunk + 1))
        # The products with the values come one unit late, when the weights are long there.
        if late:
            _add_values(refs, values, *late)
        late = (unit, decay)
    _add_values(refs, values, *late)


def _score(refs: _Refs, attention: Attention, unit: tuple[int, slice], rows: Any) -> None:
    head, lanes = unit
    k = tiles.keys(refs.k_nope, refs.k_rope, rows, head, attention)
    refs.scores[head, :, lanes] = tiles.dot(k, refs.q[head, :, lanes])


def _soften(refs: _Refs, attention: Attention, unit: tuple[int, slice], sizes: Sizes, mask: Any) -> Array:
    """Scores to weights relative to the largest score so far; returns what earlier sums shrink by."""
    head, lanes = unit
    factor = attention.scale * tiles.LOG2_E
    largest = jnp.full((8, sizes.unit), -jnp.inf, jnp.float32)
    for piece in tiles.pieces(sizes.chunk):
        scores = refs.scores[head, piece, lanes]
        if mask is not None:
            scores = jnp.where(mask(piece, lanes), scores, tiles.MASKED)
            refs.scores[head, piece, lanes] = scores
        largest = jnp.maximum(largest, tiles.fold(jnp.max, scores))
    before = refs.peak[head, :, lanes]
    peak = jnp.maximum(before, jnp.max(largest, axis=0, keepdims=True))
    decay = jnp.exp2((before - peak) * factor)
    total = refs.total[head, :, lanes] * decay
    for piece in tiles.pieces(sizes.chunk):
        # The difference first: of two masked scores it has to be 0, whatever a product rounds to.
        weights = jnp.exp2((refs.scores[head, piece, lanes] - peak) * factor)
        total += tiles.fold(jnp.sum, weights)
        refs.weights[head, piece, lanes] = weights.astype(refs.weights.dtype)
    refs.peak[head, :, lanes] = peak
    refs.total[head, :, lanes] = total
    return decay


def _add_values(refs: _Refs, values: list[Array], unit: tuple[int, slice], decay: Array) -> None:
    head, lanes = unit
    product = tiles.dot(values[head], refs.weights[head, :, lanes])
    refs.context[head, :, lanes] = refs.context[head, :, lanes] * decay + product
