"""The latent cache: one entry a token and layer, common to all heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.model.rope import rope_table
from pallas_kernels.mla_decode import cache_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What attention remembers of a batch of sequences.

    Attributes:
        entries: [L, B, S, W]: normalised latent (kv_lora_rank), rotated rope key (qk_rope_head_dim), zeros.
        lengths: int32 [B], tokens of each row that are in the cache.
        rope: float32 [S, 128 or a multiple], cosines and sines of the positions that fit, qk_rope_head_dim numbers in
            all, then zeros. A TPU holds narrower rows the other way round, and turns all of them to read a few.
    """

    entries: Array
    lengths: Array
    rope: Array

    @property
    def capacity(self) -> int:
        """Tokens that fit a row."""
        return self.entries.shape[2]


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: str, num_layers: int | None = None
) -> Cache:
    """An empty cache for `batch` sequences of up to `capacity` tokens.

    Args:
        dtype: type of the entries.
        num_layers: layers to cache; all of the main model if None, `num_nextn_predict_layers` for the MTP modules.

    Raises:
        InputError: capacity exceeds the config's max_position_embeddings.
    """
    if capacity > config.max_position_embeddings:
        raise InputError(
            f"{capacity} tokens do not fit the context; "
            f"expected at most max_position_embeddings = {config.max_position_embeddings}"
        )
    num_layers = config.num_hidden_layers if num_layers is None else num_layers
    width = cache_width(config.kv_lora_rank, config.qk_rope_head_dim)
    return Cache(
        entries=jnp.zeros((num_layers, batch, capacity, width), dtype),
        lengths=jnp.zeros(batch, jnp.int32),
        rope=_padded_rope_table(config, capacity),
    )


def grow(cache: Cache, config: ModelConfig, capacity: int) -> Cache:
    """The same cache with room for `capacity` tokens a row, at least as many as before."""
    more = capacity - cache.capacity
    return Cache(
        entries=jnp.pad(cache.entries, ((0, 0), (0, 0), (0, more), (0, 0))),
        lengths=cache.lengths,
        rope=_padded_rope_table(config, capacity),
    )


def _padded_rope_table(config: ModelConfig, capacity: int) -> Array:
    table = rope_table(config, capacity)
    return jnp.asarray(np.pad(table, ((0, 0), (0, -table.shape[1] % 128))))
