"""Multi-head latent attention (paper section 2.1.1; MLA of the release's model.py)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.model.linear import Layer, Linear, Parameters, RMSNorm
from dsv3_jax.model.rope import softmax_scale
from pallas_kernels.mla_cache import write_entries
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_heads import HeadDims, absorb_queries, head_values
from pallas_kernels.mla_prefill import mla_prefill
from pallas_kernels.normalize import Norm
from pallas_kernels.rotary import rotate

LORA_NORM_EPS = 1e-6
"""transformers and the release fix the eps of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Where the new tokens of a batch stand.

    Attributes:
        rope: float32 [B, T, qk_rope_head_dim], cosines and sines of their positions.
        start: int32 [B], tokens of each row that came before.
        counts: int32 [B], new tokens of each row; padding is on the right.
        lengths: int32 [B], tokens that a decode step attends to, at most the cache's capacity; new ones included.
    """

    rope: Array
    start: Array
    counts: Array
    lengths: Array

    @property
    def valid(self) -> Array:
        """bool [B, T], False for padding."""
        return jnp.arange(self.rope.shape[1]) < self.counts[:, None]


class MLA(nnx.Module):
    """Queries and keys of two parts, one without position and one rotated; keys and values from a shared latent.

    Three ways to the same numbers: `fresh` (a chunk attends to itself), `prefix` (a chunk attends to the cache and
    to itself, heads expanded), `absorbed` (a few tokens attend to the latents themselves).
    """

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        config = make.config
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        hidden = config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(make, stack, heads * config.qk_head_dim, hidden)
        else:
            self.q_a_proj = Linear(make, stack, config.q_lora_rank, hidden)
            self.q_a_layernorm = RMSNorm(make, stack, config.q_lora_rank, LORA_NORM_EPS)
            self.q_b_proj = Linear(make, stack, heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = Linear(make, stack, rank + config.qk_rope_head_dim, hidden)
        self.kv_a_layernorm = RMSNorm(make, stack, rank, LORA_NORM_EPS)
        self.kv_b_proj = Linear(make, stack, heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
        self.o_proj = Linear(make, stack, hidden, heads * config.v_head_dim)
        self.config = config
        self.dims = HeadDims(config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        self.scale = softmax_scale(config)
        self.implementation = make.precision.implementation

    def query_rows(self, x: Array, layer: Layer, norm: Norm) -> Array:
        """[B, T, hidden] -> [B, T, H * (qk_nope_head_dim + qk_rope_head_dim)], not rotated."""
        if self.config.q_lora_rank is None:
            return self.q_proj(x, layer, norm=norm)
        compressed = self.q_a_proj(x, layer, norm=norm)
        return self.q_b_proj(compressed, layer, norm=self.q_a_layernorm.parameters())

    def queries(self, x: Array, rope: Array, layer: Layer, norm: Norm) -> tuple[Array, Array]:
        """[B, T, hidden] -> [B, T, H, qk_nope_head_dim] and rotated [B, T, H, qk_rope_head_dim]."""
        q = self.query_rows(x, layer, norm)
        q = q.reshape(*x.shape[:2], -1, self.config.qk_head_dim)
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, rotate(q_rope, rope[:, :, None])

    def expand(self, latent: Array, layer: Layer) -> tuple[Array, Array]:
        """Latents [B, S, kv_lora_rank] -> k_nope [B, S, H, qk_nope_head_dim], v [B, S, H, v_head_dim]."""
        per_head = self.config.qk_nope_head_dim + self.config.v_head_dim
        kv = self.kv_b_proj(latent, layer).reshape(*latent.shape[:2], -1, per_head)
        k_nope, v = jnp.split(kv, [self.config.qk_nope_head_dim], axis=-1)
        return k_nope, v

    def fresh(self, x: Array, norm: Norm, chunk: Chunk, layer: Layer) -> tuple[Array, tuple[Array, Array]]:
        """x + attention(norm(x)) of sequences that begin with this chunk.

        Returns:
            [B, T, hidden], and what the cache keeps: normalised latents [B, T, kv_lora_rank] and rotated keys
            [B, T, qk_rope_head_dim].
        """
        q_nope, q_rope = self.queries(x, chunk.rope, layer, norm)
        compressed = self.kv_a_proj_with_mqa(x, layer, norm=norm)
        latent, k_rope = jnp.split(compressed, [self.config.kv_lora_rank], axis=-1)
        latent, k_rope = self.kv_a_layernorm(latent, layer), rotate(k_rope, chunk.rope)
        k_nope, v = self.expand(latent, layer)
        heads = mla_prefill(
            q_nope, q_rope, k_nope, k_rope, v, scale=self.scale, implementation=self.implementation
        )
        return self._output(x, heads, layer), (latent, k_rope)

    def prefix(
        self, x: Array, norm: Norm, chunk: Chunk, entries: Array, layer: Layer, cache_layer: Array | int
    ) -> tuple[Array, Array]:
        """x + attention(norm(x)) of a chunk that continues what is cached.

        Args:
            norm: RMSNorm in front.
            entries: [L, B, S, W], the cache.
            cache_layer: this layer's index in it.

        Returns:
            [B, T, hidden], and the cache with the chunk in it.
        """
        q_nope, q_rope = self.queries(x, chunk.rope, layer, norm)
        entries = self._write(x, norm, chunk, entries, layer, cache_layer)
        latent, k_rope, _ = jnp.split(entries[cache_layer].astype(x.dtype), self._entry_parts(), axis=-1)
        k_nope, v = self.expand(latent, layer)
        heads = mla_prefill(
            q_nope,
            q_rope,
            k_nope,
            k_rope,
            v,
            scale=self.scale,
            start=chunk.start,
            implementation=self.implementation,
        )
        return self._output(x, heads, layer), entries

    def absorbed(
        self, x: Array, norm: Norm, chunk: Chunk, entries: Array, layer: Layer, cache_layer: Array | int
    ) -> tuple[Array, Array]:
        """x + attention(norm(x)) of a few new tokens, without expanding the cache; otherwise as `prefix`."""
        batch, length, _ = x.shape
        kv_b = self.kv_b_proj.matrix()
        rope = chunk.rope.reshape(batch * length, -1)
        q = self.query_rows(x, layer, norm).reshape(batch * length, -1)
        q_latent, q_rope = absorb_queries(
            q, rope, kv_b, self.dims, layer=layer, implementation=self.implementation
        )
        entries = self._write(x, norm, chunk, entries, layer, cache_layer)
        context, _ = mla_decode(
            q_latent.reshape(batch, length, *q_latent.shape[1:]),
            q_rope.reshape(batch, length, *q_rope.shape[1:]),
            entries,
            chunk.lengths,
            scale=self.scale,
            layer=cache_layer,
            implementation=self.implementation,
        )
        context = context.reshape(batch * length, *context.shape[2:])
        heads = head_values(context, kv_b, self.dims, layer=layer, implementation=self.implementation)
        return self._output(x, heads, layer), entries

    def _output(self, x: Array, heads: Array, layer: Layer) -> Array:
        """x and the projection of all heads' values, [B, T, H, v_head_dim] or flattened."""
        return self.o_proj.onto(x, heads.reshape(*x.shape[:2], -1), layer)

    def _write(
        self, x: Array, norm: Norm, chunk: Chunk, entries: Array, layer: Layer, cache_layer: Array | int
    ) -> Array:
        """The cache with the chunk in it; padding is not written."""
        written = write_entries(
            entries,
            self.kv_a_proj_with_mqa(x, layer, norm=norm),
            norm=self.kv_a_layernorm.parameters(),
            norm_layer=layer,
            rope=chunk.rope,
            start=chunk.start,
            counts=chunk.counts,
            layer=cache_layer,
            implementation=self.implementation,
        )
        assert not isinstance(written, tuple)
        return written

    def _entry_parts(self) -> list[int]:
        return [self.config.kv_lora_rank, self.config.kv_lora_rank + self.config.qk_rope_head_dim]


def pack_entries(new: tuple[Array, Array], entries: Array) -> Array:
    """Latents and keys side by side, zero-padded to the width and cast to the type of the cache: [B, T, W]."""
    joined = jnp.concatenate(new, axis=-1).astype(entries.dtype)
    return jnp.pad(joined, ((0, 0), (0, 0), (0, entries.shape[-1] - joined.shape[-1])))
