"""`mla_decode` on a GPU: what its kernels take, and which one it is."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gpu_chip import of_generation
from pallas_kernels.mla_decode import gpu_blackwell, gpu_hopper
from pallas_kernels.mla_decode.gpu_plan import ROPE_COLUMNS, ROW_TILE

MAX_RANK = 512
MAX_QUERIES = 8


def unsupported(q_latent: Array, q_rope: Array, cache: Array, page_table: Array | None) -> str | None:
    """Why the kernels cannot take these arguments, as a phrase; None if they can."""
    for name, array in (("q_latent", q_latent), ("q_rope", q_rope), ("cache", cache)):
        types = (jnp.bfloat16,) + ((jnp.float8_e4m3fn, jnp.uint8) if name == "cache" else ())
        if array.dtype not in types:
            return f"{name} of {array.dtype}"
    rank, rope = q_latent.shape[-1], q_rope.shape[-1]
    if rank % 128 or rank > MAX_RANK:
        return f"a latent {rank} wide (expected a multiple of 128 up to {MAX_RANK})"
    if rope > ROPE_COLUMNS:
        return f"rope keys {rope} wide (expected at most {ROPE_COLUMNS})"
    if cache.shape[-1] % ROPE_COLUMNS or cache.shape[-1] < rank + ROPE_COLUMNS:
        return f"a cache {cache.shape[-1]} wide (expected a multiple of {ROPE_COLUMNS} from {rank + ROPE_COLUMNS})"
    if q_latent.shape[1] > MAX_QUERIES:
        return f"{q_latent.shape[1]} queries a row (expected at most {MAX_QUERIES})"
    tokens = cache.shape[2]
    if tokens % ROW_TILE:
        what = "a capacity" if page_table is None else "pages"
        return f"{what} of {tokens} tokens (expected a multiple of {ROW_TILE})"
    if 0 in q_latent.shape or 0 in cache.shape:
        return "an empty array"
    return None


def mla_decode(
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    scale: float,
    layer: Array | int,
    cache_scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array]:
    """Arguments as of the public function."""
    if cache.dtype == jnp.uint8:
        cache = lax.bitcast_convert_type(cache, jnp.float8_e4m3fn)
    kernels = of_generation(gpu_hopper, gpu_blackwell)
    return kernels.mla_decode(q_latent, q_rope, cache, lengths, scale, layer, cache_scales, page_table)
