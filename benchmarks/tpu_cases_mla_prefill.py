"""Cases of `mla_prefill`: V3's attention over a whole sequence and over a chunk behind a prefix, and its derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from benchmarks.tpu_case import Case
from pallas_kernels.mla_prefill.blocks import Attention, Sizes, block_sizes, key_chunks, query_chunks
from pallas_kernels.mla_prefill.tpu_forward import LARGEST as FORWARD
from pallas_kernels.mla_prefill.tpu_forward import forward
from pallas_kernels.mla_prefill.tpu_key_gradient import LARGEST as KEY_GRADIENT
from pallas_kernels.mla_prefill.tpu_key_gradient import key_gradient
from pallas_kernels.mla_prefill.tpu_query_gradient import LARGEST as QUERY_GRADIENT
from pallas_kernels.mla_prefill.tpu_query_gradient import query_gradient

NOPE, ROPE, VALUE = 128, 64, 128
LENGTHS = ((4096, 0), (1024, 8192))
"""Queries, and tokens before them."""
HEADS = (128, 16)
SCALE = (NOPE + ROPE) ** -0.5


def mla_prefill_cases() -> list[Case]:
    """The forward kernel at all lengths, the two of the derivative where sequences begin."""
    forwards = [_forward(heads, *lengths) for lengths in LENGTHS for heads in HEADS]
    derivatives = [make(heads, 4096) for make in (_query_gradient, _key_gradient) for heads in HEADS]
    return forwards + derivatives


def _forward(heads: int, queries: int, prefix: int) -> Case:
    sizes = block_sizes(queries, prefix + queries, jnp.dtype(jnp.bfloat16), FORWARD)
    start = jnp.full(1, prefix, jnp.int32)
    arrays = _arrays(heads, queries, prefix + queries)

    def run(arrays: tuple[Array, ...], start: Array) -> Any:
        return forward(_attention(heads), arrays, start, None)

    moved = _bytes(arrays) + queries * heads * (2 * VALUE + 4)
    return _case("dsv3_mla_prefill_forward", run, (arrays,), key_chunks, sizes, start, moved)


def _query_gradient(heads: int, length: int) -> Case:
    sizes = block_sizes(length, length, jnp.dtype(jnp.bfloat16), QUERY_GRADIENT)
    arrays, out, row = _arrays(heads, length, length), _out(heads, length), _row(heads, length)

    def run(arrays: tuple[Array, ...], out: Array, lse: Array, d_out: Array, start: Array) -> Any:
        return query_gradient(_attention(heads), arrays, start, None, out, lse, d_out)

    moved = _bytes((arrays, arrays[:2], out, out, row, row))
    start = jnp.zeros(1, jnp.int32)
    name = "dsv3_mla_prefill_query_gradient"
    return _case(name, run, (arrays, out, row, out), key_chunks, sizes, start, moved)


def _key_gradient(heads: int, length: int) -> Case:
    sizes = block_sizes(length, length, jnp.dtype(jnp.bfloat16), KEY_GRADIENT)
    arrays, out, row = _arrays(heads, length, length), _out(heads, length), _row(heads, length)

    def run(arrays: tuple[Array, ...], lse: Array, delta: Array, d_out: Array, start: Array) -> Any:
        return key_gradient(_attention(heads), arrays, start, None, lse, delta, d_out)

    moved = _bytes((arrays, arrays[2:], out, row, row))
    start = jnp.zeros(1, jnp.int32)
    name = "dsv3_mla_prefill_key_gradient"
    return _case(name, run, (arrays, row, row, out), query_chunks, sizes, start, moved)


def _case(
    kernel: str,
    run: Callable,
    arguments: tuple[Any, ...],
    chunks: Callable,
    sizes: Sizes,
    start: Array,
    moved: int,
) -> Case:
    queries, keys = arguments[0][0].shape[1], arguments[0][2].shape[1]
    heads = arguments[0][0].shape[2] // NOPE
    ranges = np.asarray(chunks(start, None, queries, keys, sizes))
    walked = queries if chunks is query_chunks else keys
    trips = _trips(ranges.reshape(3, -1), sizes, pl.cdiv(walked, sizes.fetched))
    label = f"{queries} queries, {keys} keys, {heads} heads"
    arguments = (*arguments, jax.ShapeDtypeStruct(start.shape, start.dtype))
    return Case(kernel, label, run, arguments, moved, trips, (ranges, np.asarray(start)))


def _trips(ranges: np.ndarray, sizes: Sizes, fetches: int) -> tuple[float, float]:
    """Iterations of the two loops over chunks on an average of the grid's steps; the last chunk is outside them."""
    chunks = sizes.fetched // sizes.chunk
    before = after = 0
    for first, full, last in ranges.T.tolist():
        for base in range(0, fetches * chunks, chunks):
            begin, end = max(first, base), min(last, base + chunks) - 1
            middle = min(max(full, begin), end)
            before += max(middle - begin, 0)
            after += max(end - max(middle, begin), 0)
    steps = ranges.shape[1] * fetches
    return before / steps, after / steps


def _attention(heads: int) -> Attention:
    return Attention(heads, min(heads, 2), NOPE, ROPE, VALUE, SCALE)


def _arrays(heads: int, queries: int, keys: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    rows_and_widths = (
        (queries, heads * NOPE),
        (queries, heads * ROPE),
        (keys, heads * NOPE),
        (keys, ROPE),
        (keys, heads * VALUE),
    )
    return tuple(jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16) for shape in rows_and_widths)


def _out(heads: int, queries: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, queries, heads * VALUE), jnp.bfloat16)


def _row(heads: int, queries: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, heads // 2, 2, queries), jnp.float32)


def _bytes(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
