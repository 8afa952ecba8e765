"""Packing: documents become one stream of tokens, the stream becomes windows, windows become batches."""

import functools
from collections.abc import Sequence

import numpy as np
import tokenizers

from dsv3_jax.train.bpe import BOS_ID, EOS_ID


def pack(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts end to end, each between BOS and EOS: int32 [number of tokens]."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([BOS_ID, *one.ids, EOS_ID], np.int32) for one in encoded])


def num_windows(stream: np.ndarray, length: int) -> int:
    """Windows of `length` predictions in a stream; what is left over at the end is not used."""
    return (len(stream) - 1) // length


def batch_at(stream: np.ndarray, step: int, *, batch_size: int, length: int, seed: int) -> np.ndarray:
    """The batch of one step, a function of its arguments alone: a resumed run sees what it would have seen.

    Every epoch goes through all windows once, in an order of its own; a batch may take its rows from two epochs.

    Args:
        stream: int32 [number of tokens], at least length + 1.
        step: from 0.
        batch_size: rows of a batch.
        length: predictions a row.
        seed: of the order.

    Returns:
        int32 [batch_size, length + 1]: a row's inputs, and its targets one to the right.
    """
    windows = num_windows(stream, length)
    first = step * batch_size
    rows = []
    for index in range(first, first + batch_size):
        epoch, place = divmod(index, windows)
        start = _order(windows, seed, epoch)[place] * length
        rows.append(stream[start : start + length + 1])
    return np.stack(rows)


@functools.lru_cache(maxsize=2)
def _order(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)
