"""Derivative of `mla_prefill` with respect to queries: holds a block of them and walks over the keys."""

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

LARGEST = (1024, 256)
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
    d_out: Any
    lse: Any
    dq_nope: Any
    dq_rope: Any
    delta: Any
    q: Any
    """[group, Dn + Dr, queries]."""
    cotangent: Any
    """[group, Dv, queries], d_out transposed."""
    scores: Any
    """float32 [group, chunk, queries], of the chunk that is next."""
    d_weights: Any
    """float32 [group, chunk, queries], likewise: the derivative with respect to the softmax's result."""
    d_scores: Any
    """[group, chunk, queries]."""
    dq: Any
    """float32 [group, Dn + Dr, queries]."""


def query_gradient(
    attention: Attention,
    arrays: tuple[Array, ...],
    start: Array,
    segments: Array | None,
    out: Array,
    lse: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    """Arguments and `out`, `lse` as of `forward`; `d_out` is the cotangent of `out`.

    Returns:
        Cotangents of q_nope and q_rope, and what each query's derivatives lose by the softmax's sum, sum(out * d_out):
        float32 [B, H / group, group, T].
    """
    batch, queries, keys = *arrays[0].shape[:2], arrays[2].shape[1]
    dtype, group, nope, rope, value = (
        arrays[0].dtype,
        attention.group,
        attention.nope,
        attention.rope,
        attention.value,
    )
    sizes = block_sizes(queries, keys, dtype, LARGEST)
    ranges = key_chunks(start, segments, queries, keys, sizes)
    grid, layout = specs(attention, batch, queries, keys, sizes)
    packed = () if segments is None else (segments, segments)
    held, chunk = sizes.held, sizes.chunk
    scratch = [
        pltpu.VMEM((group, nope + rope, held), dtype),
        pltpu.VMEM((group, value, held), dtype),
        pltpu.VMEM((group, chunk, held), jnp.float32),
        pltpu.VMEM((group, chunk, held), jnp.float32),
        pltpu.VMEM((group, chunk, held), dtype),
        pltpu.VMEM((group, nope + rope, held), jnp.float32),
    ]
    in_specs = [*layout.inputs(bool(packed)), layout.query(value), layout.query(value), layout.row(group)]
    out_specs = [layout.query(nope), layout.query(rope), layout.row(group)]
    return pl.pallas_call(
        functools.partial(_kernel, attention, sizes, (queries, keys), bool(packed)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=[
            tiles.like(arrays[0], arrays[0].shape, dtype),
            tiles.like(arrays[0], arrays[1].shape, dtype),
            tiles.like(arrays[0], lse.shape, jnp.float32),
        ],
        compiler_params=tiles.compiler_params(
            ("parallel", "parallel", "arbitrary", "arbitrary"), (*in_specs, *out_specs), dtype, scratch
        ),
        interpret=interpret(),
        name="dsv3_mla_prefill_query_gradient",
    )(ranges, start, *arrays, *packed, out, d_out, lse)


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
        _begin(refs, attention)

    @pl.when(step.last > step.first)
    def _() -> None:
        for unit in units(attention, sizes):
            _multiply(refs, attention, unit, step.rows(step.first))
        body = functools.partial(_chunk, refs, attention, sizes, step)
        final = step.last - 1
        full = jnp.minimum(step.full, final)
        lax.fori_loop(step.first, full, functools.partial(body, False, True), None)
        lax.fori_loop(full, final, functools.partial(body, True, True), None)
        body(True, False, final, None)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _() -> None:
        for head in range(attention.group):
            nope = refs.dq[head, : attention.nope] * attention.scale
            refs.dq_nope[:, tiles.columns(head, attention.nope)] = nope.T.astype(refs.dq_nope.dtype)
        rope = [refs.dq[head, attention.nope :] for head in range(attention.group)]
        refs.dq_rope[...] = (jnp.concatenate(rope) * attention.scale).T.astype(refs.dq_rope.dtype)


def _begin(refs: _Refs, attention: Attention) -> None:
    for head in range(attention.group):
        tiles.load_transposed(refs.q, head, refs.q_nope, refs.q_rope, attention)
        lanes = tiles.columns(head, attention.value)
        cotangent = refs.d_out[:, lanes]
        refs.cotangent[head] = cotangent.T
        product = refs.out[:, lanes].astype(jnp.float32) * cotangent.astype(jnp.float32)
        refs.delta[head : head + 1] = jnp.sum(product.T, axis=0, keepdims=True)
    refs.dq[...] = jnp.zeros_like(refs.dq)


def _chunk(
    refs: _Refs, attention: Attention, sizes: Sizes, step: Step, masked: bool, more: bool, chunk: Any, _: None
) -> None:
    """Derivatives by one chunk of keys, whose scores are there, and the scores of the next if there are more."""
    rows = step.rows(chunk)
    rope = refs.k_rope[rows].T
    keys = [
        jnp.concatenate([refs.k_nope[rows, tiles.columns(head, attention.nope)].T, rope])
        for head in range(attention.group)
    ]
    if masked:
        keys = [tiles.zero_beyond(k, step.valid(chunk)) for k in keys]
    mask = mask_of(refs, sizes, step, chunk) if masked else None
    late = None
    for unit in units(attention, sizes):
        _differentiate(refs, attention, unit, sizes, mask)
        if more:
            _multiply(refs, attention, unit, step.rows(chunk + 1))
        if late:
            _add(refs, keys, late)
        late = unit
    if late:
        _add(refs, keys, late)


def _multiply(refs: _Refs, attention: Attention, unit: tuple[int, slice], rows: Any) -> None:
    head, lanes = unit
    k = tiles.keys(refs.k_nope, refs.k_rope, rows, head, attention)
    refs.scores[head, :, lanes] = tiles.dot(k, refs.q[head, :, lanes])
    v = refs.v[rows, tiles.columns(head, attention.value)]
    refs.d_weights[head, :, lanes] = tiles.dot(v, refs.cotangent[head, :, lanes])


def _differentiate(
    refs: _Refs, attention: Attention, unit: tuple[int, slice], sizes: Sizes, mask: Any
) -> None:
    head, lanes = unit
    factor = attention.scale * tiles.LOG2_E
    lse, delta = (ref[head : head + 1, lanes] for ref in (refs.lse, refs.delta))
    for piece in tiles.pieces(sizes.chunk):
        weights = jnp.exp2(refs.scores[head, piece, lanes] * factor - lse)
        d_scores = weights * (refs.d_weights[head, piece, lanes] - delta)
        if mask is not None:
            d_scores = jnp.where(mask(piece, lanes), d_scores, 0)
        refs.d_scores[head, piece, lanes] = d_scores.astype(refs.d_scores.dtype)


def _add(refs: _Refs, keys: list[Array], unit: tuple[int, slice]) -> None:
    head, lanes = unit
    refs.dq[head, :, lanes] += tiles.dot(keys[head], refs.d_scores[head, :, lanes])
