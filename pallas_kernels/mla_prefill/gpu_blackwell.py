"""Prefill attention on Blackwell: compiled for sm_100a, not run on a GPU.

A block takes 128 queries of one head and walks over chunks of 128 keys. One warpgroup copies, one issues products, and
two do the softmax of every other chunk, each with its own largest score, sum and result, which are joined at the end:
so one of them always has scores to work on while the tensor core multiplies for the other. Scores, the weights that
take their place, and results are in tensor memory, a query a lane: a thread has whole rows, no reduction crosses
threads, and no result stays in registers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_compat
from pallas_kernels.gpu_chip import interpret
from pallas_kernels.mla_prefill.gpu_blocks import (
    KEYS,
    LOWEST,
    MASKED,
    QUERIES,
    STAGES,
    WIDTH,
    Place,
    Work,
    place_of,
    tiled,
)

GROUPS = STAGES
"""Warpgroups of softmax, each with its own chunk in shared memory and scores in tensor memory."""
REGISTERS, OTHER_REGISTERS = 192, 64
PIECE = 32
"""Columns of tensor memory that are in registers at once."""
LANES = plgpu.Layout.TCGEN05_TMEM_NATIVE
ROWS = LANES.reduce(1)
RESULT = plgpu.Layout.TCGEN05
"""Of results on their way to shared memory: rows of a quad of threads are written without conflicts."""


class _Refs(NamedTuple):
    """Arrays in global memory, shared memory, tensor memory, barriers."""

    ranges: Any
    start: Any
    segments: Any
    numbers: Any
    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    v: Any
    out: Any
    own_nope: Any
    """[128, D], queries, and then their results."""
    own_rope: Any
    """[128, R]."""
    nope: Any
    """[stages, 128, D]."""
    rope: Any
    """[stages, 128, R]."""
    values: Any
    """[stages, 128, D]."""
    sums: Any
    """float32 [groups, 2, 128], largest scores and sums of weights."""
    matrices: Any
    """Of each group scores, float32 [128, 128], or weights, [128, 128]."""
    context: Any
    """Of each group the sum of values by weights, float32 [128, D]."""
    queries_here: Any
    keys_here: Any
    values_here: Any
    scored: Any
    weighted: Any
    multiplied: Any
    finished: Any


def attend(work: Work) -> Array:
    """[B, T, H, D]."""
    wide, narrow = work.v.shape[-1], work.k_rope.shape[-1]
    batch, heads, blocks = work.blocks
    ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
    kernel = plgpu.kernel(
        functools.partial(_kernel, scale=work.scale, packed=work.segments is not None),
        out_type=jax.ShapeDtypeStruct(work.q_nope.shape, work.v.dtype),
        grid=(batch * heads * blocks,),
        grid_names=("block",),
        num_threads=GROUPS + 2,
        thread_name="group",
        scratch_types=[
            tiled((QUERIES, wide)),
            tiled((QUERIES, narrow)),
            tiled((GROUPS, KEYS, wide)),
            tiled((GROUPS, KEYS, narrow)),
            tiled((GROUPS, KEYS, wide)),
            plgpu.SMEM((GROUPS, 2, QUERIES), jnp.float32),
            [
                plgpu.RefUnion(
                    plgpu.TMEM((QUERIES, KEYS), jnp.float32),
                    plgpu.TMEM((QUERIES, KEYS), work.v.dtype, packed=True),
                )
                for _ in range(GROUPS)
            ],
            [plgpu.TMEM((QUERIES, wide), jnp.float32)] * GROUPS,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            plgpu.Barrier(num_barriers=GROUPS),
            ordered(num_barriers=GROUPS),
            ordered(num_barriers=GROUPS),
            ordered(num_barriers=GROUPS),
            ordered(),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="dsv3_mla_prefill",
        interpret=interpret(),
    )
    return kernel(*work.operands)


def _kernel(*refs: Any, scale: float, packed: bool) -> None:
    named = _Refs(*refs)
    place = place_of(named)

    def softmax(own: int) -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        _softmax(named, place, own, scale, packed)
        plgpu.barrier_arrive(named.finished) if own else _join(named, place)

    def other(work: Callable[[_Refs, Place], None]) -> None:
        plgpu.set_max_registers(OTHER_REGISTERS, action="decrease")
        work(named, place)

    # One switch, not a condition for each: what a branch needs would be in registers during those before it.
    branches = [functools.partial(softmax, own) for own in range(GROUPS)]
    branches += [functools.partial(other, work) for work in (_copy, _multiply)]
    lax.switch(lax.axis_index("group"), branches)


def _copy(refs: _Refs, place: Place) -> None:
    """Brings the queries, and the chunks of keys and values, each as soon as its place is free."""
    queries = pl.ds(place.query, QUERIES)
    plgpu.copy_gmem_to_smem(refs.q_nope.at[place.row, queries, place.head], refs.own_nope, refs.queries_here)
    plgpu.copy_gmem_to_smem(refs.q_rope.at[place.row, queries, place.head], refs.own_rope, refs.queries_here)

    @pl.loop(0, place.last - place.first)
    def _(step: Any) -> None:
        slot = lax.rem(step, GROUPS)
        keys = pl.ds((place.first + step) * KEYS, KEYS)
        again = step >= GROUPS
        pl.when(again)(lambda: plgpu.barrier_wait(refs.scored.at[slot]))
        here = refs.keys_here.at[slot]
        plgpu.copy_gmem_to_smem(refs.k_nope.at[place.row, keys, place.head], refs.nope.at[slot], here)
        plgpu.copy_gmem_to_smem(refs.k_rope.at[place.row, keys], refs.rope.at[slot], here)
        pl.when(again)(lambda: plgpu.barrier_wait(refs.multiplied.at[slot]))
        here = refs.values_here.at[slot]
        plgpu.copy_gmem_to_smem(refs.v.at[place.row, keys, place.head], refs.values.at[slot], here)


def _multiply(refs: _Refs, place: Place) -> None:
    """Issues the products, scores as soon as the weights in their place have been used."""
    steps = place.last - place.first

    def score(slot: int) -> None:
        scores, _ = refs.matrices[slot]
        plgpu.barrier_wait(refs.keys_here.at[slot])
        nope, rope = (x.at[slot].transpose((1, 0)) for x in (refs.nope, refs.rope))
        plgpu.tcgen05_mma(scores, refs.own_nope, nope, accumulate=False)
        plgpu.tcgen05_mma(scores, refs.own_rope, rope, refs.scored.at[slot])

    def weigh(step: Any, slot: int) -> None:
        _, weights = refs.matrices[slot]
        plgpu.barrier_wait(refs.weighted.at[slot])
        plgpu.barrier_wait(refs.values_here.at[slot])
        values, done = refs.values.at[slot], refs.multiplied.at[slot]
        plgpu.tcgen05_mma(refs.context[slot], weights, values, done, accumulate=step >= GROUPS)
        # Products with different results are not in order among themselves.
        plgpu.barrier_wait(done)
        pl.when(step + GROUPS < steps)(lambda: score(slot))

    plgpu.barrier_wait(refs.queries_here)
    for slot in range(GROUPS):
        pl.when(slot < steps)(functools.partial(score, slot))

    @pl.loop(0, pl.cdiv(steps, GROUPS))
    def _(pair: Any) -> None:
        for slot in range(GROUPS):
            step = pair * GROUPS + slot
            pl.when(step < steps)(functools.partial(weigh, step, slot))


def _softmax(refs: _Refs, place: Place, own: int, scale: float, packed: bool) -> None:
    """Turns the scores of every other chunk into weights, and leaves their sums when all values have been added up."""
    steps = pl.cdiv(place.last - place.first - own, GROUPS)

    def chunk(step: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        index = place.first + step * GROUPS + own
        plgpu.barrier_wait(refs.scored.at[own])
        scores, weights = refs.matrices[own]
        pl.when(index >= place.full)(lambda: _mask(refs, place, scores, index, packed))
        peak, total, fade = _weigh(scores, weights, scale, *state)

        @pl.when(step > 0)
        def _() -> None:
            plgpu.barrier_wait(refs.multiplied.at[own])
            _rewrite(refs.context[own], lambda piece, context: context * _by_row(fade))

        plgpu.commit_tmem()
        plgpu.barrier_arrive(refs.weighted.at[own])
        return peak, total

    peak, total = lax.fori_loop(0, steps, chunk, (_filled(LOWEST), _filled(0.0)))
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(refs.multiplied.at[own]))
    refs.sums[own, 0] = peak
    refs.sums[own, 1] = total
    plgpu.commit_smem()


def _filled(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((QUERIES,), value, jnp.float32), ROWS)


def _mask(refs: _Refs, place: Place, scores: Any, chunk: Any, packed: bool) -> None:
    """Hides keys from queries that must not see them."""

    def mask(piece: int, scores: Array) -> Array:
        return jnp.where(_visible(refs, place, chunk, piece, packed), scores, MASKED)

    _rewrite(scores, mask)
    plgpu.commit_tmem()


def _rewrite(matrix: Any, function: Callable[[int, Array], Array]) -> None:
    """Applies a function to pieces of a matrix in tensor memory, two at a time so that registers hold them."""
    pieces = matrix.shape[1] // PIECE
    for first in range(0, pieces, 2):
        both = range(first, first + 2)
        results = [function(piece, _load(matrix, piece)) for piece in both]
        plgpu.wait_load_tmem()
        for piece, result in zip(both, results, strict=True):
            plgpu.async_store_tmem(_columns(matrix, piece), result)


def _weigh(
    scores: Any, weights: Any, scale: float, old_peak: Array, total: Array
) -> tuple[Array, Array, Array]:
    """Weights of one chunk, in the place of its scores; the new peak and total, and what fades older sums."""
    pieces = range(KEYS // PIECE)
    peak = old_peak
    for piece in pieces:
        peak = jnp.maximum(peak, jnp.max(_load(scores, piece), axis=1) * scale)
    fade = jnp.exp2(old_peak - peak)
    total = total * fade
    rounded = []
    for piece in pieces:
        part = jnp.exp2(_load(scores, piece) * scale - _by_row(peak))
        total += jnp.sum(part, axis=1)
        rounded.append(part.astype(weights.dtype))
    plgpu.wait_load_tmem()
    for piece in pieces:
        plgpu.async_store_tmem(_columns(weights, piece), rounded[piece])
    return peak, total, fade


def _visible(refs: _Refs, place: Place, chunk: Any, piece: int, packed: bool) -> Array:
    """Which of the 128 queries see which of 32 keys."""
    shape = (QUERIES, PIECE)
    first_key = chunk * KEYS + piece * PIECE
    row = plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROWS)
    last_key = _by_row(place.start + place.query - first_key + row)
    visible = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LANES) <= last_key
    if packed:
        ids = refs.segments.at[place.row]
        own = gpu_compat.load(ids.at[pl.ds(place.query, QUERIES)], layout=ROWS, optimized=False)
        other = gpu_compat.load(ids.at[pl.ds(first_key, PIECE)], layout=LANES.reduce(0), optimized=False)
        visible &= _by_row(own) == lax.broadcast_in_dim(other, shape, (1,))
    return visible


def _load(matrix: Any, piece: int) -> Array:
    """32 columns from tensor memory."""
    return plgpu.async_load_tmem(_columns(matrix, piece), layout=LANES)


def _columns(matrix: Any, piece: int) -> Any:
    return matrix.at[:, piece * PIECE : (piece + 1) * PIECE]


def _by_row(x: Array, width: int = PIECE) -> Array:
    """[128] -> [128, width]."""
    return lax.broadcast_in_dim(x, (QUERIES, width), (0,))


def _join(refs: _Refs, place: Place) -> None:
    """Joins the results of both softmax warpgroups and writes them."""
    plgpu.barrier_wait(refs.finished)
    peaks, totals = (
        [
            gpu_compat.load(refs.sums.at[own, i], layout=RESULT.reduce(1), optimized=False)
            for own in range(GROUPS)
        ]
        for i in range(2)
    )
    peak = jnp.maximum(*peaks)
    fades = [jnp.exp2(x - peak) for x in peaks]
    share = 1 / (totals[0] * fades[0] + totals[1] * fades[1])
    for start in range(0, refs.v.shape[-1], WIDTH):
        columns = slice(start, start + WIDTH)
        parts = []
        for context, fade, total in zip(refs.context, fades, totals, strict=True):
            part = plgpu.async_load_tmem(context.at[:, columns], layout=RESULT) * _by_row(fade * share, WIDTH)
            # Without a chunk of its own a warpgroup has left nothing in tensor memory.
            parts.append(jnp.where(_by_row(total, WIDTH) > 0, part, 0.0))
        refs.own_nope[:, columns] = (parts[0] + parts[1]).astype(refs.own_nope.dtype)
    plgpu.commit_smem()
    rows = pl.ds(place.query, QUERIES)
    plgpu.copy_smem_to_gmem(refs.own_nope, refs.out.at[place.row, rows, place.head])
    plgpu.wait_smem_to_gmem(0)
