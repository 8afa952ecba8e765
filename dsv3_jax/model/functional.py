"""The model as pure functions of its parameters; jit them with `config` and `precision` static.

`prefill` and `decode_step` are what generation needs. Beneath them, the functions called `*_hidden` return the
hidden state before the final norm, from which `head` makes logits and the MTP modules draft.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import MLA, Chunk, pack_entries
from dsv3_jax.model.block import DecoderLayer
from dsv3_jax.model.cache import Cache
from dsv3_jax.model.mlp import Routing
from dsv3_jax.model.transformer import DeepseekV3, abstract_model
from dsv3_jax.precision import Precision
from pallas_kernels.normalize import Norm

Params = dict
Attend = Callable[[MLA, Array, Norm, Array, Array, Array], tuple[Array, Array]]
"""(attention, x, its norm, cache entries, layer of the stack, layer of the cache) -> (x + output, cache entries)."""


@functools.lru_cache(maxsize=16)
def _structure(config: ModelConfig, precision: Precision) -> nnx.GraphDef:
    return nnx.split(abstract_model(config, precision))[0]


def bind(params: Params, config: ModelConfig, precision: Precision) -> DeepseekV3:
    """The module whose parameters are `params`, to be used inside a traced function."""
    return nnx.merge(_structure(config, precision), params)


def head(params: Params, hidden: Array, *, config: ModelConfig, precision: Precision) -> Array:
    """Logits from hidden states before the final norm: [..., hidden_size] -> float32 [..., vocab_size]."""
    model = bind(params, config, precision)
    return model.logits(hidden, model.norm.parameters())


def prefill(
    params: Params, tokens: Array, lengths: Array, cache: Cache, *, config: ModelConfig, precision: Precision
) -> tuple[Array, Cache]:
    """Reads prompts into an empty cache.

    Args:
        params: nested dict, see `abstract_params`.
        tokens: int32 [B, T], right-padded; T at most the cache's capacity.
        lengths: int32 [B], real tokens of each row, at least 1.
        cache: of `init_cache`.

    Returns:
        float32 [B, vocab_size], the logits that follow each row's last token, and the filled cache.
    """
    hidden, cache = prefill_hidden(params, tokens, lengths, cache, config=config, precision=precision)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return head(params, last, config=config, precision=precision), cache


def extend(
    params: Params, tokens: Array, lengths: Array, cache: Cache, *, config: ModelConfig, precision: Precision
) -> tuple[Array, Cache]:
    """As `prefill`, for a cache that holds earlier tokens of each row (the next turn of a chat, the next chunk).

    Rows of length 0 stay as they are; their logits mean nothing.
    """
    hidden, cache = extend_hidden(params, tokens, lengths, cache, config=config, precision=precision)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return head(params, last, config=config, precision=precision), cache


def decode_step(
    params: Params,
    tokens: Array,
    cache: Cache,
    live: Array | None = None,
    *,
    config: ModelConfig,
    precision: Precision,
) -> tuple[Array, Cache]:
    """One token of each row through the model, with absorbed attention.

    Args:
        tokens: int32 [B].
        cache: holds what came before; every live row has room for one more.
        live: bool [B]; other rows are finished: their cache stays, their logits mean nothing. All if None.

    Returns:
        float32 [B, vocab_size], the logits that follow, and the cache with the tokens in it.
    """
    hidden, cache = decode_hidden(params, tokens[:, None], cache, live, config=config, precision=precision)
    return head(params, hidden[:, 0], config=config, precision=precision), cache


def prefill_hidden(
    params: Params, tokens: Array, lengths: Array, cache: Cache, *, config: ModelConfig, precision: Precision
) -> tuple[Array, Cache]:
    """Hidden states [B, T, hidden_size] of prompts, before the final norm; arguments as of `prefill`."""
    model = bind(params, config, precision)
    chunk = _chunk(model, cache, jnp.zeros_like(lengths), lengths, tokens.shape[1])
    x = model.embed_tokens(tokens)
    x, entries = _run_layers(model, x, chunk, cache.entries, _attend_fresh(chunk))
    return x, Cache(entries, lengths, cache.rope)


def extend_hidden(
    params: Params, tokens: Array, lengths: Array, cache: Cache, *, config: ModelConfig, precision: Precision
) -> tuple[Array, Cache]:
    """Hidden states [B, T, hidden_size] of chunks that continue a cache, before the final norm."""
    model = bind(params, config, precision)
    chunk = _chunk(model, cache, cache.lengths, lengths, tokens.shape[1])

    def attend(
        mla: MLA, x: Array, norm: Norm, entries: Array, layer: Array, cache_layer: Array
    ) -> tuple[Array, Array]:
        return mla.prefix(x, norm, chunk, entries, layer, cache_layer)

    x, entries = _run_layers(model, model.embed_tokens(tokens), chunk, cache.entries, attend)
    return x, Cache(entries, cache.lengths + lengths, cache.rope)


def decode_hidden(
    params: Params,
    tokens: Array,
    cache: Cache,
    live: Array | None = None,
    *,
    config: ModelConfig,
    precision: Precision,
) -> tuple[Array, Cache]:
    """Hidden states [B, Q, hidden_size] of int32 [B, Q] new tokens, before the final norm; as `decode_step`."""
    model = bind(params, config, precision)
    chunk, lengths = _decode_chunk(model, cache, tokens.shape[1], live)
    x = model.embed_tokens(tokens)
    x, entries = _run_layers(model, x, chunk, cache.entries, _attend_absorbed(chunk))
    return x, Cache(entries, lengths, cache.rope)


def mtp_prefill_hidden(
    params: Params,
    hidden: Array,
    next_tokens: Array,
    lengths: Array,
    cache: Cache,
    *,
    module: int = 0,
    config: ModelConfig,
    precision: Precision,
) -> tuple[Array, Cache]:
    """Runs an MTP module over whole sequences (paper section 2.2).

    Position t joins the hidden state of token t with the embedding of token t + 1 and predicts token t + 2.

    Args:
        hidden: [B, T, hidden_size] of the main model: after its final norm, as serving engines and transformers
            take it, or before.
        next_tokens: int32 [B, T], token t + 1 at t; right-padded.
        lengths: int32 [B], real positions of each row.
        cache: of `init_cache` with `num_nextn_predict_layers` layers, empty.
        module: which of the modules.

    Returns:
        [B, T, hidden_size], after `shared_head.norm` (what the head takes), and the cache.
    """
    model = bind(params, config, precision)
    chunk = _chunk(model, cache, jnp.zeros_like(lengths), lengths, next_tokens.shape[1])
    out, entries = _run_mtp(model, hidden, next_tokens, chunk, cache.entries, _attend_fresh(chunk), module)
    return out, Cache(entries, lengths, cache.rope)


def mtp_decode_hidden(
    params: Params,
    hidden: Array,
    next_tokens: Array,
    cache: Cache,
    live: Array | None = None,
    *,
    module: int = 0,
    config: ModelConfig,
    precision: Precision,
) -> tuple[Array, Cache]:
    """As `mtp_prefill_hidden`, for int32 [B, Q] new positions that continue the module's cache."""
    model = bind(params, config, precision)
    chunk, lengths = _decode_chunk(model, cache, next_tokens.shape[1], live)
    out, entries = _run_mtp(model, hidden, next_tokens, chunk, cache.entries, _attend_absorbed(chunk), module)
    return out, Cache(entries, lengths, cache.rope)


def mtp_head(params: Params, hidden: Array, *, config: ModelConfig, precision: Precision) -> Array:
    """Logits of an MTP module from its normed output, by the main model's head: float32 [..., vocab_size]."""
    return bind(params, config, precision).logits(hidden)


def train_hidden(
    params: Params,
    tokens: Array,
    rope: Array,
    *,
    config: ModelConfig,
    precision: Precision,
    remat: bool = True,
) -> tuple[Array, Routing | None]:
    """Hidden states of whole sequences without a cache, differentiable.

    Args:
        tokens: int32 [B, T], no padding.
        rope: float32 [T, qk_rope_head_dim] of `rope_table`.
        remat: recomputes each layer in the backward pass: less memory, a third more work.

    Returns:
        [B, T, hidden_size] before the final norm, and the routing of all MoE layers: ids int32 [L, B * T, K] and
        scores float32 [L, B * T, E]; None without MoE layers.
    """
    model = bind(params, config, precision)
    batch, length = tokens.shape
    chunk = Chunk(
        rope=jnp.broadcast_to(rope, (batch, *rope.shape)),
        start=jnp.zeros(batch, jnp.int32),
        counts=jnp.full(batch, length, jnp.int32),
        lengths=jnp.full(batch, length, jnp.int32),
    )
    x, routing = model.embed_tokens(tokens), None
    for group, _ in model.groups():
        structure, stacked = nnx.split(group)

        def layer_step(x: Array, weights: nnx.State, structure: nnx.GraphDef = structure) -> tuple:
            # Slices handed out by the scan: a gradient of an indexed stack would be summed over whole stacks.
            layer: DecoderLayer = nnx.merge(structure, weights)
            x, _ = layer.self_attn.fresh(x, layer.input_layernorm.parameters(), chunk, None)
            return layer.feed_forward(x, chunk.valid, None)

        x, routing = lax.scan(jax.checkpoint(layer_step) if remat else layer_step, x, stacked)
    return x, routing


def _chunk(model: DeepseekV3, cache: Cache, start: Array, lengths: Array, num_tokens: int) -> Chunk:
    offset = jnp.arange(num_tokens)
    # Padding may stand beyond the capacity; its position is of no consequence.
    position = jnp.minimum(start[:, None] + offset, cache.capacity - 1)
    # Rows that are finished attend too, to no use; what they attend to has to exist.
    attended = jnp.minimum(start + num_tokens, cache.capacity)
    rope = cache.rope[position][..., : model.config.qk_rope_head_dim]
    return Chunk(rope=rope, start=start, counts=lengths, lengths=attended)


def _decode_chunk(
    model: DeepseekV3, cache: Cache, num_tokens: int, live: Array | None
) -> tuple[Chunk, Array]:
    """The chunk of `num_tokens` new tokens a row, and the cache's lengths after it."""
    live = jnp.ones(cache.lengths.shape, bool) if live is None else live
    added = jnp.where(live, num_tokens, 0)
    return _chunk(model, cache, cache.lengths, added, num_tokens), cache.lengths + added


def _attend_fresh(chunk: Chunk) -> Attend:
    def attend(
        mla: MLA, x: Array, norm: Norm, entries: Array, layer: Array, cache_layer: Array
    ) -> tuple[Array, Array]:
        out, new = mla.fresh(x, norm, chunk, layer)
        packed = pack_entries(new, entries)[None]
        return out, lax.dynamic_update_slice(entries, packed, (cache_layer, 0, 0, 0))

    return attend


def _attend_absorbed(chunk: Chunk) -> Attend:
    def attend(
        mla: MLA, x: Array, norm: Norm, entries: Array, layer: Array, cache_layer: Array
    ) -> tuple[Array, Array]:
        return mla.absorbed(x, norm, chunk, entries, layer, cache_layer)

    return attend


def _run_layers(
    model: DeepseekV3, x: Array, chunk: Chunk, entries: Array, attend: Attend
) -> tuple[Array, Array]:
    """All layers of the main model; whole stacks and a layer index, so that no weight is copied."""
    first = 0
    for group, num_layers in model.groups():

        def step(
            carry: tuple[Array, Array], layer: Array, group: DecoderLayer = group, first: int = first
        ) -> tuple[tuple[Array, Array], None]:
            return _layer(group, carry, chunk, attend, layer, first + layer), None

        (x, entries), _ = lax.scan(step, (x, entries), jnp.arange(num_layers, dtype=jnp.int32))
        first += num_layers
    return x, entries


def _layer(
    group: DecoderLayer,
    carry: tuple[Array, Array],
    chunk: Chunk,
    attend: Attend,
    layer: Array,
    cache_layer: Array,
) -> tuple[Array, Array]:
    x, entries = carry
    with jax.named_scope("attention"):
        norm = group.input_layernorm.parameters()
        x, entries = attend(group.self_attn, x, norm, entries, layer, cache_layer)
    with jax.named_scope("feed_forward"):
        x, _ = group.feed_forward(x, chunk.valid, layer)
    return x, entries


def _run_mtp(
    model: DeepseekV3,
    hidden: Array,
    next_tokens: Array,
    chunk: Chunk,
    entries: Array,
    attend: Attend,
    module: int,
) -> tuple[Array, Array]:
    layers = model.mtp_layers
    x = layers.combine(model.embed_tokens(next_tokens), hidden, module)
    index = jnp.asarray(module, jnp.int32)
    x, entries = _layer(layers, (x, entries), chunk, attend, index, index)
    return layers.shared_head.norm(x, module), entries
