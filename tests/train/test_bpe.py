from pathlib import Path

import pytest
import tokenizers

from dsv3_jax.errors import InputError
from dsv3_jax.generate.tokenizer import load_tokenizer
from dsv3_jax.train.bpe import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN, train_tokenizer, write_tokenizer
from dsv3_jax.train.corpus import Corpus


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> tokenizers.Tokenizer:
    return train_tokenizer((document.text for document in corpus.train), 320)


def test_special_tokens_come_first(tokenizer: tokenizers.Tokenizer) -> None:
    assert (tokenizer.token_to_id(BOS_TOKEN), tokenizer.token_to_id(EOS_TOKEN)) == (BOS_ID, EOS_ID)
    assert tokenizer.get_vocab_size() == 320


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 1\r\n\ttab\n\n\n    four",
        "größer 你好 🚀",
        " lead",
        "trail \n ",
        "\x00\x7f",
        "a" * 99,
        "12345678",
    ],
)
def test_any_text_comes_back_as_it_was(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_start_of_a_line_is_one_token_and_numbers_are_short(tokenizer: tokenizers.Tokenizer) -> None:
    assert "Ċ" + "Ġ" * 4 in tokenizer.encode("):\n    return").tokens
    assert all(len(token) <= 3 for token in tokenizer.encode("1234567890").tokens)


def test_training_is_deterministic(tokenizer: tokenizers.Tokenizer, corpus: Corpus) -> None:
    again = train_tokenizer((document.text for document in corpus.train), 320)
    assert again.to_str() == tokenizer.to_str()


def test_written_files_are_what_generation_reads(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer, 256)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert (loaded.bos_token_id, loaded.eos_token_id) == (BOS_ID, EOS_ID)
    assert loaded.encode("def f(x):") == [BOS_ID, *tokenizer.encode("def f(x):").ids]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size is 257"):
        train_tokenizer(["text"], 257)
