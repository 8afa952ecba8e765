import dataclasses
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.errors import InputError
from dsv3_jax.generate.loop import (
    BUFFER_TOKENS,
    Completion,
    Conversation,
    Engine,
    _decode_program,
    _prefill_program,
    bucket,
)
from dsv3_jax.generate.sampling import SamplingParams

PROMPTS = [[5, 9, 40, 7], [11], [60, 61, 62, 63, 64, 65, 66]]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return dsv3_jax.load(tiny_checkpoint, dtype="float32").engine


def greedy(engine: Engine, **changes) -> list[list[int]]:
    sampling = SamplingParams(**{"max_new_tokens": 20, "ignore_eos": True} | changes)
    return [c.token_ids for c in engine.generate(PROMPTS, sampling)]


def finish(steps: Generator[list[list[int]], None, list[Completion]]) -> list[Completion]:
    """Runs a stream to its end, for what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_stream_yields_what_generate_returns(engine: Engine) -> None:
    expected = greedy(engine)
    for chunk in (1, 3):
        steps = engine.stream(PROMPTS, SamplingParams(max_new_tokens=20, ignore_eos=True), chunk=chunk)
        rows: list[list[int]] = [[], [], []]
        for new in steps:
            assert all(len(ids) <= chunk for ids in new)
            for row, ids in zip(rows, new, strict=True):
                row.extend(ids)
        assert rows == expected


def test_more_tokens_than_the_buffer_holds(engine: Engine) -> None:
    count = BUFFER_TOKENS + 7
    rows = greedy(engine, max_new_tokens=count)
    assert [len(row) for row in rows] == [count] * 3
    assert [row[:20] for row in rows] == greedy(engine)


def test_eos_ends_a_row_and_is_left_out(engine: Engine) -> None:
    plain = greedy(engine)
    eos = plain[0][6]
    sampling = SamplingParams(max_new_tokens=20, eos_token_ids=(eos,))
    for completion, row in zip(engine.generate(PROMPTS, sampling), plain, strict=True):
        end = row.index(eos) if eos in row else None
        assert completion.token_ids == row[:end]
        assert completion.finish_reason == ("length" if end is None else "stop")


def test_eos_as_the_first_token_gives_an_empty_row(engine: Engine) -> None:
    first = greedy(engine)[1][0]
    completion = engine.generate([PROMPTS[1]], SamplingParams(max_new_tokens=20, eos_token_ids=(first,)))[0]
    assert (completion.token_ids, completion.finish_reason) == ([], "stop")


def test_stopped_rows_end_and_the_others_go_on(engine: Engine) -> None:
    plain = greedy(engine)

    def stopped(row: int, ids: list[int]) -> bool:
        return row == 1 and len(ids) >= 5

    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    completions = finish(engine.stream(PROMPTS, sampling, stopped=stopped))
    assert [c.token_ids for c in completions] == [plain[0], plain[1][:5], plain[2]]
    assert [c.finish_reason for c in completions] == ["length", "stop", "length"]


def test_sampled_row_does_not_depend_on_the_batch(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    together = engine.generate(PROMPTS, sampling)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert engine.generate([prompt], sampling)[0].token_ids == row.token_ids
    other_seed = engine.generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=1.0, seed=4))
    assert [r.token_ids for r in other_seed] != [r.token_ids for r in together]


def test_equal_prompts_get_different_samples(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    first, second = engine.generate([PROMPTS[0], PROMPTS[0]], sampling)
    assert first.token_ids != second.token_ids


def test_next_turn_reads_only_what_is_new(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    conversation = Conversation()
    first = finish(engine.stream([PROMPTS[0]], sampling, conversation=conversation))[0]
    assert (
        conversation.tokens == [*PROMPTS[0], *first.token_ids][:-1]
    )  # the last one was not fed to the model
    turn = [*PROMPTS[0], *first.token_ids, *range(8, 60)]  # longer than the cache has room for
    _, known = engine._cache_for([turn], 100, dataclasses.replace(conversation))
    assert known == len(PROMPTS[0]) + 19
    second = finish(engine.stream([turn], sampling, conversation=conversation))[0]
    assert second.token_ids == engine.generate([turn], sampling)[0].token_ids
    # Another branch from the middle: what was cached beyond it does not count.
    branch = [*turn[:10], 3, 4, 5]
    third = finish(engine.stream([branch], sampling, conversation=conversation))[0]
    assert third.token_ids == engine.generate([branch], sampling)[0].token_ids


def test_streams_of_one_engine_do_not_disturb_each_other(engine: Engine) -> None:
    expected = greedy(engine)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    streams = [engine.stream([prompt], sampling) for prompt in PROMPTS]
    rows: list[list[int]] = [[], [], []]
    for _ in range(20):
        for row, stream in zip(rows, streams, strict=True):
            row.extend(next(stream)[0])
    assert rows == expected


def test_long_prompts_are_read_in_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(2, 72)), [7], list(range(100, 133))]
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    expected = engine.generate(prompts, sampling)
    monkeypatch.setattr("dsv3_jax.generate.loop.PREFILL_TOKENS", 3 * 16)
    assert [c.token_ids for c in engine.generate(prompts, sampling)] == [c.token_ids for c in expected]


def test_occurrences_are_those_of_the_whole_list(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    both = engine.generate([PROMPTS[0], PROMPTS[0]], sampling)
    second = engine.generate([PROMPTS[0]], sampling, occurrences=[1])[0]
    assert second.token_ids == both[1].token_ids


def test_no_prompts_give_no_completions(engine: Engine) -> None:
    assert engine.generate([], SamplingParams()) == []


def test_ids_beyond_the_tokenizer_are_never_generated(tiny_checkpoint: Path) -> None:
    model = dsv3_jax.load(tiny_checkpoint, dtype="float32")
    narrow = Engine(model.params, model.config, model.precision, num_tokens=10)
    rows = greedy(narrow, temperature=5.0)
    assert max(map(max, rows)) < 10


def test_lengths_of_one_bucket_share_a_program(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    engine.generate([[1] * 17, [2] * 20], sampling)
    sizes = _prefill_program._cache_size(), _decode_program._cache_size()
    for length in (18, 21, 24):
        engine.generate([[3] * length, [4]], SamplingParams(max_new_tokens=8, ignore_eos=True))
    assert (_prefill_program._cache_size(), _decode_program._cache_size()) == sizes


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 16, 17, 25, 33, 100, 1025)] == [16, 16, 24, 32, 48, 128, 1536]


def test_no_new_tokens(engine: Engine) -> None:
    completion = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=0))[0]
    assert (completion.token_ids, completion.finish_reason) == ([], "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 2 is empty"),
        ([304], r"prompt 2: token id 304 is out of range; expected 0 to 303"),
        ([-1], "token id -1 is out of range"),
        ([1] * 250, "250 tokens and --max-new-tokens 20 do not fit the context; expected at most 256"),
    ],
)
def test_bad_prompt_is_named(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate([[1], prompt], SamplingParams(max_new_tokens=20))


def test_statistics(engine: Engine) -> None:
    greedy(engine)
    assert engine.stats["prompt_tokens"] == 12
    assert engine.stats["new_tokens"] == 60
    assert np.isfinite(engine.stats["decode_tokens_per_second"])
