"""The bundled model is what docs/tiny.md says."""

import pytest

import dsv3_jax
from dsv3_jax.api import Model, bundled_checkpoint
from dsv3_jax.config import named_config
from dsv3_jax.train.batches import pack
from dsv3_jax.train.corpus import STDLIB, is_held_out, read_corpus
from dsv3_jax.train.evaluate import bits_per_byte, xz_bits_per_byte


@pytest.fixture(scope="module")
def tiny() -> Model:
    return dsv3_jax.load(None, dtype="float32")


def test_it_is_small_and_float8_and_of_the_bundled_config(tiny: Model) -> None:
    assert sum(path.stat().st_size for path in bundled_checkpoint().iterdir()) < 10_000_000
    assert tiny.precision.weights == "float8"
    assert tiny.config == named_config("tiny")
    assert tiny.tokenizer is not None
    assert tiny.tokenizer.vocab_size == tiny.config.vocab_size
    assert (tiny.tokenizer.bos_token_id, tiny.eos_token_ids) == (0, (1,))


def test_it_needs_fewer_bits_than_xz_for_a_file_that_it_never_saw(tiny: Model) -> None:
    assert is_held_out("ast.py")
    text = next(d.text for d in read_corpus(STDLIB, "a*.py").held_out if d.name == "ast.py")[:12_000]
    assert tiny.tokenizer is not None
    stream = pack(tiny.tokenizer.backend, [text])
    data = text.encode("utf-8")
    bits = bits_per_byte(
        tiny.params,
        stream,
        len(data),
        length=256,
        context=128,
        config=tiny.config,
        precision=tiny.precision,
    )
    assert bits < 0.8 * xz_bits_per_byte(data)


def test_it_indents_what_follows_a_colon(tiny: Model) -> None:
    (completion,) = tiny.generate(["def fibonacci(n):"], max_new_tokens=8)
    assert completion.text.lstrip("\n").startswith("    ")
