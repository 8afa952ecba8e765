"""What a thread block of `mla_decode`'s GPU kernels holds in shared memory, and in tensor memory."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.gpu_plan import BLOCK, BUFFERS, ROPE_COLUMNS, TILE_ROWS, GpuPlan

RAW_PIECE = 64
"""Columns of FP8 entries that lie together, as many as are converted at once and as wide as a rope key: offsets into
shared memory that are the same for all need fewer registers."""


class Shared(NamedTuple):
    """Memory of a thread block; None where a variant has none.

    Attributes:
        query: bfloat16 [pieces, 64, piece], the latent columns of the queries.
        results: float32 [2, 64, piece] in the place of `query`; None where results are bfloat16, which are written
            over the queries themselves.
        query_rope: bfloat16 [64, 64].
        latent: bfloat16 [slots, pieces, BLOCK, piece].
        rope: bfloat16 [slots, BLOCK, 64], rope keys, later the weights [64, BLOCK] of the block.
        raw_latent, raw_rope, scales: the entries of an FP8 cache, [BUFFERS, ...].
        peak: float32 [2, 64], largest score up to the last block of either warpgroup; its weights are relative to it.
        shrink: float32 [2, 64], by what this last block made weights relative to the block before it smaller.
        total: float32 [2, 64], sums of these weights.
        lse: float32 [2, 64], twice the same.
        ready: barrier: queries are there, and both warpgroups have cleared their `peak` and `total`.
        full: barriers [BUFFERS]: entries are there.
        free: barriers [BUFFERS]: entries are not needed any more.
        converted: barriers [2], of the blocks of either warpgroup: entries are bfloat16; FP8 only.
        weighed: barriers [2], of the blocks of either warpgroup: weights are there.
        score: tensor memory, float32 [64, BLOCK]; this and what follows on Blackwell only.
        accumulator: `pieces` times tensor memory, float32 [64, piece].
        scored: barriers [2], of the blocks of either warpgroup: scores are there.
        multiplied: barrier: weights times latents of a block have been added.
        shrunk: barriers [2], of the blocks of either warpgroup: the accumulator is ready for the block.
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
    score: Any
    accumulator: Any
    scored: Any
    multiplied: Any
    shrunk: Any


def scratch(plan: GpuPlan, out_dtype: Any, tile_columns: int) -> dict[str, Any]:
    """Scratch types of both generations, by name; `query` is a pair with `results` where these are float32.

    Args:
        tile_columns: of bfloat16 tiles.
    """

    def tiles(*shape: int) -> Any:
        return _tiled(shape, jnp.bfloat16, tile_columns)

    num_slots = 1 if plan.scaled else BUFFERS
    arrivals = plan.rank // RAW_PIECE + 2 if plan.scaled else plan.pieces + 1
    query = tiles(plan.pieces, TILE_ROWS, plan.piece)
    if out_dtype == jnp.float32:
        query = plgpu.RefUnion(query, _tiled((2, TILE_ROWS, plan.piece), jnp.float32, 32))
    raw = {
        "raw_latent": _tiled((BUFFERS, plan.rank // RAW_PIECE, BLOCK, RAW_PIECE), jnp.float8_e4m3fn, 64),
        "raw_rope": _tiled((BUFFERS, BLOCK, ROPE_COLUMNS), jnp.float8_e4m3fn, 64),
        "scales": plgpu.SMEM((BUFFERS, BLOCK), jnp.float32),
        "converted": plgpu.Barrier(num_arrivals=2, num_barriers=2),
    }
    return {
        "query": query,
        "query_rope": tiles(TILE_ROWS, ROPE_COLUMNS),
        "latent": tiles(num_slots, plan.pieces, BLOCK, plan.piece),
        "rope": tiles(num_slots, BLOCK, ROPE_COLUMNS),
        **(raw if plan.scaled else {}),
        **{name: plgpu.SMEM((2, TILE_ROWS), jnp.float32) for name in ("peak", "shrink", "total", "lse")},
        "ready": plgpu.Barrier(num_arrivals=plan.pieces + 1 + 2),
        "full": plgpu.Barrier(num_arrivals=arrivals * plan.copies, num_barriers=BUFFERS),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        "weighed": plgpu.Barrier(num_barriers=2),
    }


def shared_refs(refs: dict[str, Any], out_dtype: Any) -> Shared:
    """The references of `scratch`, by name."""
    query, results = refs["query"] if out_dtype == jnp.float32 else (refs["query"], None)
    return Shared(**(dict.fromkeys(Shared._fields) | refs | {"query": query, "results": results}))


def _tiled(shape: tuple[int, ...], dtype: Any, columns: int) -> Any:
    """Matrices in tiles of 8 rows, swizzled as tensor cores read them."""
    swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle))
