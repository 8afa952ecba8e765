"""Bits per byte of held-out text: what a compressor that knows the model would need, and compressors need."""

import functools
import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.functional import Params
from dsv3_jax.precision import Precision
from dsv3_jax.train.step import token_losses

_BATCH_SIZE = 8


def bits_per_byte(
    params: Params,
    stream: np.ndarray,
    num_bytes: int,
    *,
    length: int,
    context: int,
    config: ModelConfig,
    precision: Precision,
) -> float:
    """Cross-entropy of a packed stream, BOS and EOS included, over the bytes of its texts.

    Args:
        stream: int32 [number of tokens] of `pack`.
        num_bytes: of the texts, in UTF-8.
        length: tokens that the model sees at a time.
        context: of these, how many precede the first that is counted (fewer at the start of the stream): windows
            overlap by as much. Every token but the first is counted exactly once.
        config, precision: of the params.
    """
    nats = 0.0
    for batch, counted in _window_batches(stream, length, context):
        nats += float(_counted_nats(params, batch, counted, config=config, precision=precision))
    return nats / math.log(2) / num_bytes


def xz_bits_per_byte(data: bytes) -> float:
    """Size of `xz -9` of the bytes as one stream, in bits per byte of them."""
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


@functools.partial(jax.jit, static_argnames=("config", "precision"))
def _counted_nats(
    params: Params, batch: jax.Array, counted: jax.Array, *, config: ModelConfig, precision: Precision
) -> jax.Array:
    losses, _ = token_losses(params, batch, config=config, precision=precision)
    return jnp.sum(losses * counted)


def _window_batches(stream: np.ndarray, length: int, context: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of int32 [B, length + 1] with float32 [B, length], 1 where a prediction is counted."""
    num_predictions = len(stream) - 1
    starts = range(0, max(num_predictions - context, 1), length - context)
    padding = (starts[-1] + length + 1) - len(stream)
    padded = np.pad(stream, (0, max(padding, 0)))
    rows, counted = [], []
    for start in starts:
        place = np.arange(length)
        rows.append(padded[start : start + length + 1])
        counted.append((place >= (context if start else 0)) & (start + place < num_predictions))
    missing = -len(rows) % _BATCH_SIZE
    rows += [np.zeros(length + 1, stream.dtype)] * missing
    counted += [np.zeros(length, bool)] * missing
    tokens, weights = np.stack(rows), np.stack(counted).astype(np.float32)
    return [
        (tokens[i : i + _BATCH_SIZE], weights[i : i + _BATCH_SIZE]) for i in range(0, len(rows), _BATCH_SIZE)
    ]
