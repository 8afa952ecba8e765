import numpy as np
import pytest
import tokenizers

from dsv3_jax.train.batches import batch_at, num_windows, pack
from dsv3_jax.train.bpe import BOS_ID, EOS_ID, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return train_tokenizer(["some words, some more words"], 270)


def test_packing_loses_nothing(tokenizer: tokenizers.Tokenizer) -> None:
    texts = ["some words", "more", "größer\n"]
    stream = pack(tokenizer, texts)
    starts, ends = np.flatnonzero(stream == BOS_ID), np.flatnonzero(stream == EOS_ID)
    assert stream.dtype == np.int32
    assert starts[0] == 0
    assert ends[-1] == len(stream) - 1
    np.testing.assert_array_equal(starts[1:], ends[:-1] + 1)
    documents = [stream[start + 1 : end] for start, end in zip(starts, ends, strict=True)]
    assert [tokenizer.decode(document.tolist()) for document in documents] == texts


def test_an_epoch_is_every_window_once_in_an_order_of_its_own() -> None:
    stream = np.arange(1000, dtype=np.int32)
    assert num_windows(stream, 9) == 111
    rows = np.concatenate([batch_at(stream, step, batch_size=3, length=9, seed=1) for step in range(2 * 37)])
    first, second = rows[:111], rows[111:]
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 999, 9))
        np.testing.assert_array_equal(epoch, epoch[:, :1] + np.arange(10))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[:, 0], np.sort(first[:, 0]))


def test_a_batch_depends_on_step_and_seed_alone() -> None:
    stream = np.arange(500, dtype=np.int32)

    def rows(step: int, seed: int) -> list[list[int]]:
        return batch_at(stream, step, batch_size=4, length=16, seed=seed).tolist()

    later = rows(9, 0)
    assert rows(0, 0) != later
    assert rows(9, 0) == later
    assert rows(9, 1) != later


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    batch = batch_at(np.arange(33, dtype=np.int32), 0, batch_size=5, length=16, seed=0)
    assert batch.shape == (5, 17)
    np.testing.assert_array_equal(np.sort(batch[:4, 0]), [0, 0, 16, 16])
