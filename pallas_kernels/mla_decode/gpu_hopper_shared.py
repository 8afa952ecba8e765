"""What the thread blocks of `mla_decode`'s Hopper kernel hold in shared memory."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.gpu_plan import BLOCK, ROPE_COLUMNS, GpuPlan

TILE_ROWS = 64
RAW_PIECE = 64
"""Columns of FP8 entries that lie together, as many as are converted at once and as wide as a rope key: offsets into
shared memory that are the same for all need fewer registers."""

BUFFERS = 2
"""Blocks of entries that are there or under way."""


class Shared(NamedTuple):
    """Shared memory of a thread block.

    Attributes:
        query: bfloat16 [pieces, 64, piece], the latent columns of the queries.
        results: float32 [2, 64, piece] in the place of `query`; None where results are bfloat16, which are written
            over the queries themselves.
        query_rope: bfloat16 [64, 64].
        latent: bfloat16 [slots, pieces, BLOCK, piece].
        rope: bfloat16 [slots, BLOCK, 64], rope keys, later the weights [64, BLOCK] of the block.
        raw_latent, raw_rope, scales: the entries of an FP8 cache, [BUFFERS, ...]; None for a bfloat16 cache.
        peak: float32 [2, 64], largest score up to the last block of either warpgroup; its weights are relative to it.
        shrink: float32 [2, 64], by what this last block made weights relative to the block before it smaller.
        total: float32 [2, 64], sums of these weights.
        lse: float32 [2, 64], twice the same.
        ready: barrier: queries are there.
        full: barriers [BUFFERS]: entries are there.
        free: barriers [BUFFERS]: both warpgroups are done with the entries.
        converted: barriers [2], of the blocks of either warpgroup: both halves are bfloat16; FP8 only.
        weighed: barriers [2], of the blocks of either warpgroup: weights are there.
        begun: barrier of both warpgroups.
    """

    query: Any
    results: Any
    query_rope: Any
    latent: Any
    rope: Any
    raw_latent: Any
    raw_rope: Any
    scales: Any
    peak: Any
    shrink: Any
    total: Any
    lse: Any
    ready: Any
    full: Any
    free: Any
    converted: Any
    weighed: Any
    begun: Any


def slots(plan: GpuPlan) -> int:
    """Blocks of entries in bfloat16: FP8 entries take the place of the second."""
    return 1 if plan.scaled else BUFFERS


def scratch(plan: GpuPlan, out_dtype: Any) -> dict[str, Any]:
    """Scratch types by name; `query` is a pair with `results` where these are float32."""
    num_slots = slots(plan)
    arrivals = plan.rank // RAW_PIECE + 2 if plan.scaled else plan.pieces + 1
    query = _tiled((plan.pieces, TILE_ROWS, plan.piece), jnp.bfloat16)
    if out_dtype == jnp.float32:
        query = plgpu.RefUnion(query, _tiled((2, TILE_ROWS, plan.piece), jnp.float32))
    raw = {
        "raw_latent": _tiled((BUFFERS, plan.rank // RAW_PIECE, BLOCK, RAW_PIECE), jnp.float8_e4m3fn),
        "raw_rope": _tiled((BUFFERS, BLOCK, ROPE_COLUMNS), jnp.float8_e4m3fn),
        "scales": plgpu.SMEM((BUFFERS, BLOCK), jnp.float32),
        "converted": plgpu.Barrier(num_arrivals=2, num_barriers=2),
    }
    return {
        "query": query,
        "query_rope": _tiled((TILE_ROWS, ROPE_COLUMNS), jnp.bfloat16),
        "latent": _tiled((num_slots, plan.pieces, BLOCK, plan.piece), jnp.bfloat16),
        "rope": _tiled((num_slots, BLOCK, ROPE_COLUMNS), jnp.bfloat16),
        **(raw if plan.scaled else {}),
        "peak": plgpu.SMEM((2, TILE_ROWS), jnp.float32),
        "shrink": plgpu.SMEM((2, TILE_ROWS), jnp.float32),
        "total": plgpu.SMEM((2, TILE_ROWS), jnp.float32),
        "lse": plgpu.SMEM((2, TILE_ROWS), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=plan.pieces + 1),
        "full": plgpu.Barrier(num_arrivals=arrivals * plan.copies, num_barriers=BUFFERS),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        "weighed": plgpu.Barrier(num_barriers=2),
        "begun": plgpu.Barrier(num_arrivals=2),
    }


def shared_refs(refs: dict[str, Any], out_dtype: Any) -> Shared:
    """The references of `scratch`."""
    query, results = refs.pop("query"), None
    if out_dtype == jnp.float32:
        query, results = query
    absent = dict.fromkeys(Shared._fields)
    return Shared(**(absent | refs | {"query": query, "results": results}))


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Matrices, tiled and swizzled as the tensor cores read them; FP8 is read in tiles of 64 columns like bfloat16."""
    itemsize = jnp.dtype(dtype).itemsize
    columns = 32 if itemsize == 4 else 64
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
