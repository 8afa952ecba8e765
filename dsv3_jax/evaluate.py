"""Logits of whole sequences, at once or token by token: what parity with another implementation is measured on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.generate.loop import cache_capacity
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import (
    bind,
    decode_hidden,
    head,
    mtp_decode_hidden,
    mtp_head,
    mtp_prefill_hidden,
    prefill_hidden,
)

if TYPE_CHECKING:
    from dsv3_jax.api import Model

Mode = Literal["prefill", "decode"]
HEAD_BLOCK = 64
_STATIC = ("config", "precision")
_prefill_hidden = jax.jit(prefill_hidden, static_argnames=_STATIC)
_decode_hidden = jax.jit(decode_hidden, static_argnames=_STATIC, donate_argnames="cache")
_mtp_prefill_hidden = jax.jit(mtp_prefill_hidden, static_argnames=(*_STATIC, "module"))
_mtp_decode_hidden = jax.jit(mtp_decode_hidden, static_argnames=(*_STATIC, "module"), donate_argnames="cache")
_head = jax.jit(head, static_argnames=_STATIC)
_mtp_head = jax.jit(mtp_head, static_argnames=_STATIC)
_final_norm = jax.jit(
    lambda params, hidden, config, precision: bind(params, config, precision).norm(hidden),
    static_argnames=_STATIC,
)


def main_logits(model: "Model", tokens: np.ndarray, lengths: np.ndarray, *, mode: Mode) -> np.ndarray:
    """Logits of the main model at every position.

    Args:
        tokens: integers [B, T], right-padded with anything.
        lengths: integers [B], real tokens of each row, 1 to T.
        mode: "prefill" runs whole sequences (expanded attention), "decode" one token at a time (absorbed).

    Returns:
        float32 [B, T, vocab_size]; padding positions mean nothing.

    Raises:
        InputError: a token id is out of range, or T exceeds the context.
    """
    static = {"config": model.config, "precision": model.precision}
    hidden = _main_hidden(model, tokens, lengths, mode)
    return _in_blocks(lambda x: _head(model.engine.params, x, **static), hidden)


def mtp_logits(
    model: "Model",
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    mode: Mode,
    hidden: Literal["post", "pre"] = "post",
) -> np.ndarray:
    """Logits of the first MTP module: position t, from token t's hidden state and token t + 1, is for token t + 2.

    Args:
        tokens, lengths, mode: as in `main_logits`.
        hidden: the module gets the main model's hidden state after its final norm, or before.

    Returns:
        float32 [B, T, vocab_size]; a row's last position has no next token and means nothing.

    Raises:
        InputError: as `main_logits`.
    """
    static = {"config": model.config, "precision": model.precision}
    states = _main_hidden(model, tokens, lengths, mode)
    if hidden == "post":
        states = _final_norm(model.engine.params, states, **static)
    following = np.roll(_checked(tokens, lengths, model.config), -1, axis=1)
    config, batch = model.config, len(tokens)
    cache = init_cache(
        config, batch, states.shape[1], model.precision.dtype, num_layers=config.num_nextn_predict_layers
    )
    if mode == "prefill":
        out, _ = _mtp_prefill_hidden(model.engine.params, states, following, lengths, cache, **static)
    else:
        steps = []
        for t in range(tokens.shape[1]):
            step, cache = _mtp_decode_hidden(
                model.engine.params,
                states[:, t : t + 1],
                following[:, t : t + 1],
                cache,
                t < lengths,
                **static,
            )
            steps.append(step)
        out = jnp.concatenate(steps, axis=1)
    return _in_blocks(lambda x: _mtp_head(model.engine.params, x, **static), out)


def _main_hidden(model: "Model", tokens: np.ndarray, lengths: np.ndarray, mode: Mode) -> jax.Array:
    """Hidden states before the final norm, [B, T, hidden_size]."""
    tokens = _checked(tokens, lengths, model.config)
    static = {"config": model.config, "precision": model.precision}
    batch, length = tokens.shape
    capacity = cache_capacity(length, model.config)
    cache = init_cache(model.config, batch, max(capacity, length), model.precision.dtype)
    if mode == "prefill":
        padded = np.pad(tokens, ((0, 0), (0, cache.capacity - length)))
        return _prefill_hidden(model.engine.params, padded, lengths, cache, **static)[0][:, :length]
    steps = []
    for t in range(length):
        step, cache = _decode_hidden(model.engine.params, tokens[:, t : t + 1], cache, t < lengths, **static)
        steps.append(step)
    return jnp.concatenate(steps, axis=1)


def _checked(tokens: np.ndarray, lengths: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The tokens as int32 with zeros for padding, whatever that was."""
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(
            f"token ids are {tokens.min()} to {tokens.max()}; expected 0 to {config.vocab_size - 1}"
        )
    return tokens.astype(np.int32)


def _in_blocks(function: Callable[[jax.Array], jax.Array], hidden: jax.Array) -> np.ndarray:
    """Applies the head to blocks of positions: the logits of all do not fit twice."""
    blocks = range(0, hidden.shape[1], HEAD_BLOCK)
    first = np.asarray(function(hidden[:, :HEAD_BLOCK]))
    out = np.empty((*hidden.shape[:2], first.shape[-1]), np.float32)
    for start in blocks:
        block = first if start == 0 else np.asarray(function(hidden[:, start : start + HEAD_BLOCK]))
        out[:, start : start + HEAD_BLOCK] = block
    return out
