"""Sorting by group on a TPU: counting sort in one kernel, sums as products with 0/1 triangles on the matrix unit.

Products are exact in one pass: one factor is 0 or 1, the other an integer of at most 256, which bfloat16 holds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import compiler_params, interpret
from pallas_kernels.group_rows.grouping import Grouping, Visits, max_visits

LANES = 128
SUBLANES = 8
MAX_TOKENS = 256
MAX_PAIRS = 1024
MAX_GROUPS = 512

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


def unsupported(ids: Array, num_groups: int) -> str | None:
    """Why the kernel cannot sort `ids`; None if it can."""
    num_tokens, top_k = ids.shape
    if num_tokens > MAX_TOKENS or num_tokens * top_k > MAX_PAIRS:
        return f"{num_tokens} tokens of {top_k} (expected at most {MAX_TOKENS} tokens and {MAX_PAIRS} pairs)"
    if top_k > LANES:
        return f"{top_k} groups a token (expected at most {LANES})"
    if num_groups > MAX_GROUPS:
        return f"{num_groups} groups (expected at most {MAX_GROUPS})"
    return None


def group_rows(ids: Array, valid: Array, num_groups: int, row_tile: int) -> Grouping:
    """Arguments as of the public function."""
    num_tokens, top_k = ids.shape
    num_pairs = num_tokens * top_k
    num_visits = max_visits(num_groups, num_pairs, row_tile)
    shapes = [
        (num_pairs,),
        (num_pairs,),
        ids.shape,
        (num_groups,),
        (num_groups + 1,),
        (num_visits,),
        (num_visits,),
        (1,),
    ]
    vmem = 16 * (num_groups + LANES) * (num_groups + LANES) * 4
    order, tokens, position, sizes, starts, visit_group, visit_tile, count = pl.pallas_call(
        functools.partial(_kernel, row_tile=row_tile),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * 2,
        out_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * len(shapes),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        compiler_params=compiler_params((), vmem),
        name="dsv3_group_rows",
        interpret=interpret(),
    )(ids, valid.astype(jnp.int32)[None])
    return Grouping(order, tokens, position, sizes, Visits(starts, visit_group, visit_tile, count))


def _kernel(
    ids: Any,
    valid: Any,
    order: Any,
    tokens: Any,
    position: Any,
    sizes: Any,
    starts: Any,
    visit_group: Any,
    visit_tile: Any,
    num_visits: Any,
    *,
    row_tile: int,
) -> None:
    num_tokens, top_k = _round_up(ids.shape[0]), ids.shape[1]
    num_groups = sizes.shape[0]
    is_valid = _pad(valid[...], (1, num_tokens)).astype(jnp.float32)
    all_ids = _pad(ids[...], (num_tokens, top_k))
    group = _iota((num_tokens, num_groups), 1)
    chosen = functools.reduce(jnp.logical_or, (group == all_ids[:, k : k + 1] for k in range(top_k)))
    counts = _product(jnp.broadcast_to(is_valid, (SUBLANES, num_tokens)), chosen, NN)
    below = _iota((num_groups + SUBLANES, num_groups), 1) < _iota((num_groups + SUBLANES, num_groups), 0)
    row_starts = _product(counts, below, NT)
    _store(sizes, counts)
    _store(starts, row_starts)

    pairs = _positions(all_ids, chosen, is_valid, row_starts)
    position[...] = pairs[: ids.shape[0]].astype(jnp.int32)
    _write_order(pairs, order, tokens)
    _write_visits(row_starts, below, row_tile, visit_group, visit_tile, num_visits)


def _positions(ids: Array, chosen: Array, is_valid: Array, row_starts: Array) -> Array:
    """Sorted rows of the tokens' pairs, float32 [M, K]."""
    num_tokens, num_groups = chosen.shape
    shape = (num_tokens, num_tokens)
    earlier = _iota(shape, 1) < _iota(shape, 0)
    rank = _product(jnp.where(earlier, is_valid, 0), chosen, NN)
    row = _pick(rank + row_starts[:1, :num_groups], ids)
    own = _lane_sum(jnp.where(_iota(shape, 1) == _iota(shape, 0), is_valid, 0))
    invalid_before = _lane_sum(jnp.where(earlier, 1 - is_valid, 0))
    behind = row_starts[:1, num_groups : num_groups + 1] + invalid_before * ids.shape[1]
    return jnp.where(own > 0, row, behind + _iota(ids.shape, 1).astype(jnp.float32))


def _pick(values: Array, ids: Array) -> Array:
    """values[t, ids[t, k]], from 128 lanes at a time: [M, E], [M, K] -> [M, K]; 0 where ids lie outside."""
    lanes = (values.shape[0], LANES)
    index = _pad(ids & (LANES - 1), lanes)
    picked = jnp.zeros(ids.shape, values.dtype)
    for start in range(0, values.shape[1], LANES):
        part = _pad(values[:, start : start + LANES], lanes)
        found = jnp.take_along_axis(part, index, axis=1, mode="promise_in_bounds")[:, : ids.shape[1]]
        picked = jnp.where((ids >= start) & (ids < start + LANES), found, picked)
    return picked


def _write_order(position: Array, order: Any, tokens: Any) -> None:
    """The inverse permutation, as products of one-hot matrices: of a sorted row over 128, and modulo 128."""
    num_tokens, top_k = position.shape
    lines = -(-order.shape[0] // LANES)
    high = jnp.floor(position * (1 / LANES))
    high, low = (_lane_row(digit) for digit in (high, position - high * LANES))
    shape = (_round_up(lines), num_tokens)
    token = jnp.concatenate([_iota(shape, 1).astype(jnp.float32)] * top_k, axis=1)
    choice = jnp.concatenate([jnp.full(shape, float(k)) for k in range(top_k)], axis=1)
    line = high == _iota(token.shape, 0).astype(jnp.float32)
    left = jnp.concatenate([jnp.where(line, token, 0), jnp.where(line, choice, 0)])
    right = low == _iota((LANES, token.shape[1]), 0).astype(jnp.float32)
    pairs = _product(left, right, NT)
    rows = pairs[: shape[0]] * top_k + pairs[shape[0] :]
    for line in range(lines):
        _store(order, rows[line : line + 1], line * LANES)
        _store(tokens, pairs[line : line + 1], line * LANES)


def _lane_row(digits: Array) -> Array:
    """[M, K] whole numbers of at most 256 -> [1, K * M], those of one choice side by side."""
    top_k = digits.shape[1]
    square = (_round_up(top_k), top_k)
    turned = _product(_iota(square, 0) == _iota(square, 1), digits, NT)
    return jnp.concatenate([turned[k : k + 1] for k in range(top_k)], axis=1)


def _write_visits(
    starts: Array, below: Array, row_tile: int, visit_group: Any, visit_tile: Any, num_visits: Any
) -> None:
    """Visits by comparison with their cumulative sums.

    Args:
        starts: float32 [8, more than E], first rows of the groups and the end of the last, in equal rows.
        below: bool [more than E, E], whether the group of the column comes before that of the row.
    """
    num_groups = below.shape[1]
    first, end = starts[:, :num_groups], starts[:, 1 : num_groups + 1]
    first_tile = _floor_divide(first, row_tile)
    tiles = jnp.where(end > first, _floor_divide(end - 1, row_tile) - first_tile + 1, 0)
    begin = _product(tiles, below, NT)
    total = begin[:, num_groups : num_groups + 1]
    _store(num_visits, total)
    offset = first_tile - begin[:, :num_groups]
    # The same sums in columns, equal in all of them.
    begin = _product(below[:num_groups], jnp.broadcast_to(tiles[:1], (LANES, num_groups)), NT)
    for start in range(0, visit_group.shape[0], LANES):
        visit = _iota((SUBLANES, LANES), 1).astype(jnp.float32) + start
        visit = jnp.maximum(jnp.minimum(visit, total - 1), 0)
        # Of groups that begin at the same visit all but the last are empty.
        begun = jnp.sum(jnp.where(begin <= visit[:1], 1.0, 0.0), axis=0, keepdims=True)
        owner = jnp.where(total > 0, begun - 1, 0).astype(jnp.int32)
        _store(visit_group, owner, start)
        _store(visit_tile, _pick(offset, owner) + visit, start)


def _store(out: Any, row: Array, start: int = 0) -> None:
    """The first row of [rows, columns], as far as it goes, into a vector from `start` on."""
    size = min(out.shape[0] - start, row.shape[1])
    out[start : start + size] = row[0, :size].astype(jnp.int32)


def _pad(values: Array, shape: tuple[int, ...]) -> Array:
    """With zeros: tokens that are not valid, behind the others, whose positions nothing else depends on."""
    return jnp.pad(values, [(0, size - old) for size, old in zip(shape, values.shape, strict=True)])


def _round_up(size: int) -> int:
    return -(-size // SUBLANES) * SUBLANES


def _floor_divide(rows: Array, row_tile: int) -> Array:
    """Of whole numbers below 2^16 in float32, where half a row keeps clear of rounding."""
    return jnp.floor((rows + 0.5) * (1 / row_tile))


def _product(a: Array, b: Array, dimensions: Any) -> Array:
    a, b = (factor.astype(jnp.float32).astype(jnp.bfloat16) for factor in (a, b))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _lane_sum(values: Array) -> Array:
    return jnp.sum(values, axis=1, keepdims=True)


def _iota(shape: tuple[int, ...], dimension: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)
