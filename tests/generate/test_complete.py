"""`complete`: texts as they come, and what ends them."""

import dataclasses
from pathlib import Path

import pytest

from dsv3_jax.api import Model, load
from dsv3_jax.errors import InputError
from dsv3_jax.generate.complete import complete
from dsv3_jax.generate.sampling import SamplingParams

SAMPLING = SamplingParams(max_new_tokens=14, ignore_eos=True)
PROMPTS = ("def", "The fox", "class A:")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load(tiny_checkpoint)


def encode(model: Model, *texts: str) -> list[list[int]]:
    assert model.tokenizer is not None
    return [model.tokenizer.encode(text) for text in texts]


def test_pieces_make_the_texts(model: Model) -> None:
    pieces: list[list[str]] = [[], [], []]
    rows = encode(model, *PROMPTS)
    whole = complete(model.engine, model.tokenizer, rows, SAMPLING)
    streamed = complete(
        model.engine, model.tokenizer, rows, SAMPLING, on_text=lambda row, piece: pieces[row].append(piece)
    )
    assert streamed == whole
    assert ["".join(row) for row in pieces] == [completion.text for completion in whole]
    assert all(len(row) > 5 and "" not in row for row in pieces)
    assert [completion.prompt_token_ids for completion in whole] == rows
    assert {completion.finish_reason for completion in whole} == {"length"}


def test_an_interruption_ends_all_rows_and_keeps_what_they_have(model: Model) -> None:
    rows = encode(model, *PROMPTS)
    whole = complete(model.engine, model.tokenizer, rows, SAMPLING)
    count = 0

    def on_text(row: int, piece: str) -> None:
        nonlocal count
        count += 1

    cut = complete(
        model.engine, model.tokenizer, rows, SAMPLING, on_text=on_text, interrupted=lambda: count >= 9
    )
    for before, after in zip(whole, cut, strict=True):
        assert after.finish_reason == "stop"
        assert 0 < len(after.token_ids) < 14
        assert after.token_ids == before.token_ids[: len(after.token_ids)]


def test_without_tokenizer_there_is_no_text(model: Model) -> None:
    rows = encode(model, *PROMPTS)
    expected = [
        dataclasses.replace(completion, text=None)
        for completion in complete(model.engine, model.tokenizer, rows, SAMPLING)
    ]
    assert complete(model.engine, None, rows, SAMPLING) == expected
    with pytest.raises(InputError, match="--stop needs a tokenizer"):
        complete(model.engine, None, rows, SAMPLING, stop=["a"])
