"""Definition of `write_entries`, in plain `jax.numpy`."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.normalize import Norm, rms_norm
from pallas_kernels.quantize.rounding import float8_scales, round_to_float8
from pallas_kernels.rotary import rotate


def write_entries(
    cache: Array,
    compressed: Array,
    norm_weight: Array,
    norm_eps: float,
    rope: Array,
    start: Array,
    counts: Array,
    layer: Array | int,
    norm_layer: Array | int | None,
    cache_scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array | None]:
    rank = norm_weight.shape[-1]
    latent = rms_norm(compressed[..., :rank], Norm(norm_weight, norm_eps), norm_layer)
    entries = jnp.concatenate([latent, rotate(compressed[..., rank:], rope)], axis=-1)
    block, slot = _places(cache, compressed.shape[1], start, counts, page_table)
    if cache_scales is not None:
        wide = entries.astype(jnp.float32)
        scales = float8_scales(jnp.max(jnp.abs(wide), axis=-1), None)
        entries = round_to_float8(wide, scales[..., None])
        cache_scales = cache_scales.at[layer, block, 0, slot].set(scales, mode="drop")
    padding = cache.shape[-1] - entries.shape[-1]
    entries = jnp.pad(entries.astype(cache.dtype), ((0, 0), (0, 0), (0, padding)))
    return cache.at[layer, block, slot].set(entries, mode="drop"), cache_scales


def _places(
    cache: Array, num_tokens: int, start: Array, counts: Array, page_table: Array | None
) -> tuple[Array, Array]:
    """Where tokens go: int32 [B, Q] indices into the cache's second and third dimension, too large for dropped ones."""
    num_blocks, block_size = cache.shape[1:3]
    position = start[:, None] + jnp.arange(num_tokens)
    written = jnp.arange(num_tokens) < counts[:, None]
    if page_table is None:
        rows = jnp.broadcast_to(jnp.arange(num_blocks)[:, None], position.shape)
        return rows, jnp.where(written, position, block_size)
    pages = page_table.shape[1]
    index = jnp.minimum(position // block_size, pages - 1)
    page = jnp.take_along_axis(page_table, index, axis=1)
    written &= (position < pages * block_size) & (page >= 0)
    return jnp.where(written, page, num_blocks), position % block_size
