"""Cases of `mla_decode`: 128 heads, or a chip's share of them, at batch 8 and 128 and contexts up to 131072."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_case import Case
from pallas_kernels.chip import chip
from pallas_kernels.mla_decode import cache_width, mla_decode
from pallas_kernels.mla_decode.plan import Plan, make_plan

RANK, ROPE = 512, 64
WIDTH = cache_width(RANK, ROPE)
SCALE = 0.1352
MAX_LAYERS = 61
"""The compiler brings a cache of few layers into VMEM."""
PAGE = 128
MIN_LAYERS = 2
MAX_CACHE_BYTES = 12 << 30
"""Of all layers. Paged caches that would be larger have fewer pages than the table has places."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one case; page_size 0 is a contiguous cache."""

    batch: int
    context: int
    heads: int
    dtype: str = "bfloat16"
    page_size: int = 0
    queries: int = 1

    @property
    def scaled(self) -> bool:
        return self.dtype == "float8_e4m3fn"

    @property
    def token_bytes(self) -> int:
        return WIDTH * jnp.dtype(self.dtype).itemsize + (4 if self.scaled else 0)


def mla_decode_cases() -> list[Case]:
    """All rows have the whole context; the case that the schedule's targets name is the first."""
    return [_case(shape) for shape in _shapes()]


def _shapes() -> Iterator[Shape]:
    for batch, context in ((8, 2048), (8, 8192), (8, 131072), (128, 2048), (128, 8192), (128, 131072)):
        for heads in (128, 16, 2):
            for dtype in ("bfloat16", "float8_e4m3fn"):
                for page_size in (0, PAGE):
                    shape = Shape(batch, context, heads, dtype, page_size)
                    if page_size or batch * context * shape.token_bytes * MIN_LAYERS < MAX_CACHE_BYTES:
                        yield shape
    for heads in (128, 16, 2):
        for queries in (2, 4):
            yield Shape(8, 8192, heads, queries=queries)
    yield Shape(2, 131072, 128)
    yield Shape(8, 2048, 128, "float32")


def _case(shape: Shape) -> Case:
    names = {"bfloat16": "BF16", "float8_e4m3fn": "FP8", "float32": "float32"}
    label = f"{shape.heads} heads, batch {shape.batch}, context {shape.context}, {names[shape.dtype]}"
    label += f", pages of {shape.page_size}" if shape.page_size else ""
    label += f", {shape.queries} queries" if shape.queries > 1 else ""
    arguments = _arguments(shape)
    queries = arguments[:2]
    out_bytes = shape.batch * shape.queries * shape.heads * (RANK * queries[0].dtype.itemsize + 4)
    return Case(
        kernel="dsv3_mla_decode",
        label=label,
        function=_call,
        arguments=arguments,
        ideal_bytes=shape.batch * shape.context * shape.token_bytes
        + sum(q.size * q.dtype.itemsize for q in queries)
        + out_bytes,
        trips=_trips(shape),
    )


def _arguments(shape: Shape) -> tuple:
    """q_latent, q_rope, cache, lengths, layer, cache_scales, page_table."""
    batch, page = shape.batch, shape.page_size or shape.context
    layers = max(min(MAX_LAYERS, MAX_CACHE_BYTES // (batch * shape.context * shape.token_bytes)), MIN_LAYERS)
    num_pages = min(batch * shape.context, MAX_CACHE_BYTES // layers // shape.token_bytes) // page
    query_dtype = jnp.float32 if shape.dtype == "float32" else jnp.bfloat16
    abstract = jax.ShapeDtypeStruct
    return (
        abstract((batch, shape.queries, shape.heads, RANK), query_dtype),
        abstract((batch, shape.queries, shape.heads, ROPE), query_dtype),
        abstract((layers, num_pages, page, WIDTH), shape.dtype),
        abstract((batch,), jnp.int32),
        abstract((), jnp.int32),
        abstract((layers, num_pages, 1, page), jnp.float32) if shape.scaled else None,
        abstract((batch, shape.context // page), jnp.int32) if shape.page_size else None,
    )


def _call(
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    layer: Array,
    scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array]:
    if scales is not None:
        # The scales of 61 layers still fit VMEM, into which the compiler would bring them.
        scales = pltpu.with_memory_space_constraint(scales, pltpu.HBM)
    return mla_decode(
        q_latent,
        q_rope,
        cache,
        lengths,
        scale=SCALE,
        layer=layer,
        cache_scales=scales,
        page_table=page_table,
        implementation="pallas",
    )


def _plan(shape: Shape) -> Plan:
    q_latent, _, cache, *_, table = _arguments(shape)
    pages_a_row = 0 if table is None else table.shape[1]
    return make_plan(q_latent.shape, ROPE, cache.shape, cache.dtype, pages_a_row, chip())


def _trips(shape: Shape) -> tuple[float, ...]:
    """Of the kernel's loops in one grid step, in the order of its code.

    Where rows are split over two cores, one of them has the last block, which late queries alone see whole.
    """
    plan = _plan(shape)
    shares = plan.parts if plan.split else 1
    blocks = shape.context / plan.block / shares
    masked = (1 if shape.queries > 1 else 0) / shares
    together = plan.copies_together
    starts = () if plan.chunk == plan.block else (plan.block // plan.chunk // together, 0)
    groups = () if plan.groups == 1 else (plan.groups,)
    first_row = (1, *(n / plan.rows_a_part for n in starts))
    next_row = () if plan.rows_a_part == 1 else (1,)
    masked_blocks = (masked, *starts, plan.block // plan.masked_sub_block, *groups)
    return (*first_row, *next_row, blocks - masked, *starts, *groups, *masked_blocks)
