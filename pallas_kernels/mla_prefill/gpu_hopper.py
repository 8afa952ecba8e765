"""Prefill attention on Hopper: compiled for sm_90a, not run on a GPU.

A block takes 128 queries of one head and walks over chunks of 128 keys. Two warpgroups hold 64 queries each; a third
only copies. Scores are the sum of two products, so that no key is widened by the rotary part and that part is read as
it is, common to all heads. The two warpgroups take turns: one's softmax runs while the other has the tensor cores.
"""

import functools
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
    Place,
    Work,
    place_of,
    tiled,
)

HELD = 64
"""Queries of a warpgroup, the rows of a wgmma."""
GROUPS = QUERIES // HELD
"""Warpgroups that compute."""
REGISTERS, COPY_REGISTERS = 232, 40
ROWS, SCORES = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA


class _Refs(NamedTuple):
    """Arrays in global memory, then shared memory and barriers."""

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
    """[groups, 64, D], queries, and then their results."""
    own_rope: Any
    """[groups, 64, R]."""
    nope: Any
    """[stages, 128, D]."""
    rope: Any
    """[stages, 128, R]."""
    values: Any
    """[stages, 128, D]."""
    queries_here: Any
    keys_here: Any
    values_here: Any
    keys_used: Any
    values_used: Any
    turn: Any


def attend(work: Work) -> Array:
    """[B, T, H, D]."""
    wide, narrow = work.v.shape[-1], work.k_rope.shape[-1]
    batch, heads, blocks = work.blocks
    used = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)
    kernel = plgpu.kernel(
        functools.partial(_kernel, scale=work.scale, packed=work.segments is not None),
        out_type=jax.ShapeDtypeStruct(work.q_nope.shape, work.v.dtype),
        grid=(batch * heads * blocks,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            tiled((GROUPS, HELD, wide)),
            tiled((GROUPS, HELD, narrow)),
            tiled((STAGES, KEYS, wide)),
            tiled((STAGES, KEYS, narrow)),
            tiled((STAGES, KEYS, wide)),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            used,
            used,
            plgpu.Barrier(num_arrivals=GROUPS),
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
    group = lax.axis_index("group")

    @pl.when(group < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        _compute(named, place, group, scale, packed)

    @pl.when(group == GROUPS)
    def _() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        _copy(named, place)


def _copy(refs: _Refs, place: Place) -> None:
    """Brings the chunks of keys and values, each as soon as its place is free."""

    @pl.loop(place.first, place.last)
    def _(chunk: Any) -> None:
        step = chunk - place.first
        slot = lax.rem(step, STAGES)
        keys = pl.ds(chunk * KEYS, KEYS)
        again = step >= STAGES
        pl.when(again)(lambda: plgpu.barrier_wait(refs.keys_used.at[slot]))
        here = refs.keys_here.at[slot]
        plgpu.copy_gmem_to_smem(refs.k_nope.at[place.row, keys, place.head], refs.nope.at[slot], here)
        plgpu.copy_gmem_to_smem(refs.k_rope.at[place.row, keys], refs.rope.at[slot], here)
        pl.when(again)(lambda: plgpu.barrier_wait(refs.values_used.at[slot]))
        here = refs.values_here.at[slot]
        plgpu.copy_gmem_to_smem(refs.v.at[place.row, keys, place.head], refs.values.at[slot], here)


class _State(NamedTuple):
    """Of the softmax of 64 queries.

    Attributes:
        context: float32 [64, D], sum of values by weights so far.
        peak: [64], the largest score to base 2.
        total: [64], sum of weights.
    """

    context: Array
    peak: Array
    total: Array


def _compute(refs: _Refs, place: Place, group: Any, scale: float, packed: bool) -> None:
    query = place.query + group * HELD
    queries = pl.ds(query, HELD)
    nope, rope = refs.own_nope.at[group], refs.own_rope.at[group]
    here = refs.queries_here.at[group]
    plgpu.copy_gmem_to_smem(refs.q_nope.at[place.row, queries, place.head], nope, here)
    plgpu.copy_gmem_to_smem(refs.q_rope.at[place.row, queries, place.head], rope, here)
    state = _State(
        _filled((HELD, refs.v.shape[-1]), 0.0, SCORES),
        _filled((HELD,), LOWEST, ROWS),
        _filled((HELD,), 0.0, ROWS),
    )
    plgpu.barrier_wait(here)
    pl.when(group == 1)(lambda: _take_turns(refs))
    body = functools.partial(_chunk, refs, place, group, scale, packed)
    state = lax.fori_loop(place.first, place.last, body, state)
    pl.when(group == 0)(lambda: _take_turns(refs))
    context = state.context / lax.broadcast_in_dim(state.total, state.context.shape, (0,))
    nope[...] = context.astype(nope.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(nope, refs.out.at[place.row, queries, place.head])
    plgpu.wait_smem_to_gmem(0)


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _take_turns(refs: _Refs) -> None:
    plgpu.barrier_arrive(refs.turn)
    plgpu.barrier_wait(refs.turn)


def _chunk(
    refs: _Refs,
    place: Place,
    group: Any,
    scale: float,
    packed: bool,
    chunk: Any,
    state: _State,
) -> _State:
    """One chunk of keys."""
    slot = lax.rem(chunk - place.first, STAGES)
    plgpu.barrier_wait(refs.keys_here.at[slot])

    def multiply(scores: Any) -> Array:
        plgpu.wgmma(scores, refs.own_nope.at[group], refs.nope.at[slot].transpose((1, 0)))
        plgpu.wgmma(scores, refs.own_rope.at[group], refs.rope.at[slot].transpose((1, 0)))
        _take_turns(refs)
        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((HELD, KEYS), jnp.float32))
    plgpu.barrier_arrive(refs.keys_used.at[slot])

    def mask(scores: Array) -> Array:
        return jnp.where(_visible(refs, place, group, chunk, packed), scores, MASKED)

    scores = lax.cond(chunk >= place.full, mask, lambda scores: scores, scores)
    peak = jnp.maximum(state.peak, jnp.max(scores, axis=1) * scale)
    fade = jnp.exp2(state.peak - peak)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(peak, scores.shape, (0,)))
    total = state.total * fade + jnp.sum(weights, axis=1)
    rounded = weights.astype(refs.values.dtype)
    plgpu.barrier_wait(refs.values_here.at[slot])
    _take_turns(refs)
    product = gpu_compat.register_product(rounded, refs.values.at[slot])
    plgpu.barrier_arrive(refs.values_used.at[slot])
    context = state.context * lax.broadcast_in_dim(fade, state.context.shape, (0,)) + product
    return _State(context, peak, total)


def _visible(refs: _Refs, place: Place, group: Any, chunk: Any, packed: bool) -> Array:
    """Which of the 64 queries see which of the 128 keys."""
    shape = (HELD, KEYS)
    first_query = place.query + group * HELD
    # The numbers of the keys are read, for 32 registers hold them if the compiler takes them out of the loop.
    key = gpu_compat.load(refs.numbers, layout=SCORES.reduce(0), optimized=False)
    last_key = (
        place.start + first_query - chunk * KEYS + plgpu.broadcasted_iota(jnp.int32, (HELD,), 0, layout=ROWS)
    )
    visible = lax.broadcast_in_dim(key, shape, (1,)) <= lax.broadcast_in_dim(last_key, shape, (0,))
    if packed:
        ids = refs.segments.at[place.row]
        own = gpu_compat.load(ids.at[pl.ds(first_query, HELD)], layout=ROWS, optimized=False)
        other = gpu_compat.load(ids.at[pl.ds(chunk * KEYS, KEYS)], layout=SCORES.reduce(0), optimized=False)
        visible &= lax.broadcast_in_dim(own, shape, (0,)) == lax.broadcast_in_dim(other, shape, (1,))
    return visible
