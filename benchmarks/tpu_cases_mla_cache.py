"""Cases of `mla_cache`: 1 to 4 new tokens a row, batch 8 and 128, rows of 2048 and 131072 entries."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.tpu_case import Case
from pallas_kernels.mla_cache import write_entries
from pallas_kernels.mla_decode import cache_width
from pallas_kernels.normalize import Norm

RANK, ROPE = 512, 64
WIDTH = cache_width(RANK, ROPE)
LAYERS = 61
PAGE = 128
MAX_CACHE_BYTES = 12 << 30
WINDOW_BYTES = 8 * WIDTH * 4
"""Of the tile that is read and written for a new token: 8 words high."""


def mla_cache_cases() -> list[Case]:
    """A step's writes in one layer."""
    return [_case(*shape) for shape in _shapes()]


def _shapes() -> Iterator[tuple[int, int, int, str, int]]:
    """Batch, new tokens, capacity, type and page size, 0 for a contiguous cache."""
    for dtype in ("bfloat16", "float8_e4m3fn"):
        for batch, capacity in ((8, 2048), (8, 131072), (128, 2048)):
            for queries in (1, 2, 4):
                yield batch, queries, capacity, dtype, 0
            yield batch, 1, capacity, dtype, PAGE
    yield 8, 1, 2048, "float32", 0


def _case(batch: int, queries: int, capacity: int, dtype: str, page_size: int) -> Case:
    names = {"bfloat16": "BF16", "float8_e4m3fn": "FP8", "float32": "float32"}
    label = f"batch {batch}, {queries} new, capacity {capacity}, {names[dtype]}"
    arguments = _arguments(batch, queries, capacity, dtype, page_size)
    compressed = arguments[0]
    # Twice a window, and one of 128 scales, for every row: most new tokens share it.
    moved = 2 * batch * (WINDOW_BYTES + (512 if dtype == "float8_e4m3fn" else 0))
    return Case(
        kernel="dsv3_write_entries",
        label=label + (f", pages of {page_size}" if page_size else ""),
        function=functools.partial(_call, _shape(batch, capacity, dtype, page_size), dtype),
        arguments=arguments,
        ideal_bytes=moved + compressed.size * compressed.dtype.itemsize + batch * queries * ROPE * 4,
    )


def _shape(batch: int, capacity: int, dtype: str, page_size: int) -> tuple[int, int, int, int]:
    """[L, B, S, W] or [L, P, page_size, W], with as many layers as fit any chip."""
    page = page_size or capacity
    layers = MAX_CACHE_BYTES // (batch * capacity * WIDTH * jnp.dtype(dtype).itemsize)
    return min(LAYERS, layers), batch * capacity // page, page, WIDTH


def _arguments(batch: int, queries: int, capacity: int, dtype: str, page_size: int) -> tuple[Any, ...]:
    """compressed, norm, rope, start, counts, layer, page_table."""
    compute = "float32" if dtype == "float32" else "bfloat16"

    def abstract(*shape: int, dtype: str = compute) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    return (
        abstract(batch, queries, RANK + ROPE),
        abstract(LAYERS, RANK),
        abstract(batch, queries, ROPE, dtype="float32"),
        abstract(batch, dtype="int32"),
        abstract(batch, dtype="int32"),
        abstract(dtype="int32"),
        abstract(batch, capacity // page_size, dtype="int32") if page_size else None,
    )


def _call(
    shape: tuple[int, int, int, int],
    dtype: str,
    compressed: Array,
    norm_weight: Array,
    rope: Array,
    start: Array,
    counts: Array,
    layer: Array,
    page_table: Array | None,
) -> Array | tuple[Array, Array]:
    # An argument that is not donated would be copied first.
    layers, blocks, page, _ = shape
    scaled = dtype == "float8_e4m3fn"
    return write_entries(
        jax.lax.empty(shape, jnp.dtype(dtype)),
        compressed,
        norm=Norm(norm_weight, 1e-6),
        rope=rope,
        start=start,
        counts=counts,
        layer=layer,
        norm_layer=layer,
        cache_scales=jax.lax.empty((layers, blocks, 1, page), jnp.float32) if scaled else None,
        page_table=page_table,
        implementation="pallas",
    )
