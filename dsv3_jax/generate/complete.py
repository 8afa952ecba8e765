"""Completions with their text: an engine's token ids, decoded as they come and cut before a stop string."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Literal

from dsv3_jax.errors import InputError
from dsv3_jax.generate.loop import BUFFER_TOKENS, Completion, Conversation, Engine
from dsv3_jax.generate.sampling import SamplingParams
from dsv3_jax.generate.stream import TextStream
from dsv3_jax.generate.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextCompletion:
    """What a model wrote after one prompt.

    Attributes:
        prompt_token_ids: ids of the prompt, BOS included where there is one.
        token_ids: ids of the continuation; where a stop string was found, up to the one that completed it.
        text: the continuation, without special tokens, cut before a stop string; None without tokenizer.
        finish_reason: "stop" at an eos id, a stop string or an interruption, else "length".
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: Literal["stop", "length"]


def complete(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    occurrences: Sequence[int] | None = None,
    conversation: Conversation | None = None,
) -> list[TextCompletion]:
    """Continues a batch of prompts.

    Args:
        engine: the model.
        tokenizer: None leaves the texts None; then there can be no stop strings.
        prompts: token ids of each row.
        sampling: how tokens are chosen, and how many.
        stop: strings before which a text is cut and its row ends.
        on_text: is given the texts piece by piece as they come, each piece with its row; it makes the engine
            stop after every token to look.
        interrupted: asked now and then (after every token with `on_text`); once it is true, all rows end.
        occurrences, conversation: see `Engine.stream`.

    Raises:
        InputError: a prompt does not fit the model, or there is no tokenizer to find a stop string with.
    """
    if tokenizer is None:
        if stop:
            raise InputError("--stop needs a tokenizer, and the checkpoint has none; expected tokenizer.json")
        return [
            TextCompletion(row.prompt_token_ids, row.token_ids, None, row.finish_reason)
            for row in engine.generate(
                [list(prompt) for prompt in prompts], sampling, occurrences=occurrences
            )
        ]
    decode = functools.partial(tokenizer.decode, skip_special=True)
    streams = [TextStream(decode, stop) for _ in prompts]

    def give(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    def stopped(row: int, token_ids: list[int]) -> bool:
        stream = streams[row]
        give(row, stream.feed(token_ids[len(stream.token_ids) :]))
        return stream.stopped or (interrupted is not None and interrupted())

    rows = [list(prompt) for prompt in prompts]
    completions = _result(
        engine.stream(
            rows,
            sampling,
            stopped=stopped,
            chunk=BUFFER_TOKENS if on_text is None else 1,
            occurrences=occurrences,
            conversation=conversation,
        )
    )
    results = []
    for row, (stream, completion) in enumerate(zip(streams, completions, strict=True)):
        give(row, stream.feed(completion.token_ids[len(stream.token_ids) :]) + stream.finish())
        finish_reason = "stop" if stream.stopped else completion.finish_reason
        results.append(
            TextCompletion(completion.prompt_token_ids, stream.token_ids, stream.text, finish_reason)
        )
    return results


def _result(steps: Generator[list[list[int]], None, list[Completion]]) -> list[Completion]:
    """Runs a stream to its end, for what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
