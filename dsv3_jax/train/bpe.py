"""Byte-level BPE, trained on the corpus, stored as the `tokenizer.json` that Hugging Face publishes with a model."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dsv3_jax.errors import InputError

BOS_TOKEN, EOS_TOKEN = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
MIN_VOCAB_SIZE = 256 + 2

# As GPT-4's and DeepSeek's: words with the sign before them, at most three digits, runs of signs. Line ends are
# taken together with the indentation that follows them, so that the start of a line of code is one token.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"|(?:[ \t]*\r?\n)+[ \t]*"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a tokenizer in which every byte has a token, so that any text can be encoded and comes back as it was.

    Args:
        texts: the training documents.
        vocab_size: entries in all: BOS, EOS, 256 bytes, merges. A small corpus may give fewer.

    Raises:
        InputError: vocab_size leaves no room for the bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size is {vocab_size}; expected at least {MIN_VOCAB_SIZE}: the bytes, BOS and EOS"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, max_length: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` into an existing folder.

    Args:
        max_length: tokens that the model can read.
    """
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
