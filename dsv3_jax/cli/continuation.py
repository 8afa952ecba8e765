"""What `dsv3 generate` does: prompts to token ids, the model's continuations of them, printed and written."""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.api import Model, bundled_checkpoint, load
from dsv3_jax.checkpoint import open_checkpoint
from dsv3_jax.cli.compilation_cache import enable_compilation_cache
from dsv3_jax.cli.generate import DEFAULT_NEW_TOKENS
from dsv3_jax.cli.output import write_json
from dsv3_jax.cli.prompts import ChatOptions, Prompt, check_token_ids, encode_prompt
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.generate.complete import TextCompletion, complete
from dsv3_jax.generate.sampling import SamplingParams, count_occurrences
from dsv3_jax.generate.tokenizer import Tokenizer, eos_token_ids, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Job:
    """What is known before the weights are read.

    Attributes:
        sampling: as the command line says, with the eos ids of the checkpoint.
        shorten: where the context has no room for that many tokens, make fewer; else refuse the prompt.
    """

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    chat: ChatOptions
    sampling: SamplingParams
    shorten: bool
    stop: tuple[str, ...]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises InputError where they are not what the model can continue."""
        ids = encode_prompt(prompt, self.tokenizer, self.chat)
        check_token_ids(ids, prompt.source, self.config, 0 if self.shorten else self.sampling.max_new_tokens)
        return ids

    def sampling_after(self, ids: Sequence[int]) -> SamplingParams:
        """How a prompt is continued: with no more tokens than the context has room for."""
        room = self.config.max_position_embeddings - len(ids)
        return dataclasses.replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))


def prepare(args: argparse.Namespace, prompts: Sequence[Prompt]) -> Job:
    """Reads all of the checkpoint but its weights.

    Raises:
        InputError: an argument is out of range or does not go with the others, or a file is not as expected.
    """
    sampling = SamplingParams(
        max_new_tokens=DEFAULT_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )
    chats = args.chat or args.interactive or any(prompt.messages is not None for prompt in prompts)
    for flag, given in (
        ("--system", args.system is not None),
        ("--template-variable", args.template_variable),
    ):
        if given and not chats:
            raise InputError(f"{flag} is for chats; expected --chat or --interactive with it")
    chat = ChatOptions(args.chat, args.system, dict(map(_template_variable, args.template_variable)))

    folder = args.checkpoint or bundled_checkpoint()
    config, tokenizer = open_checkpoint(folder).config, load_tokenizer(folder)
    if tokenizer is None and args.stop:
        raise InputError(f"--stop needs a tokenizer; expected tokenizer.json or tiktoken.model in {folder}")
    eos = eos_token_ids(folder, config, tokenizer)
    return Job(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        chat=chat,
        sampling=dataclasses.replace(sampling, eos_token_ids=eos),
        shorten=args.max_new_tokens is None,
        stop=tuple(args.stop),
    )


def load_model(args: argparse.Namespace, job: Job) -> Model:
    """Reads the weights in the format that the arguments ask for."""
    enable_compilation_cache(args)
    return load(
        job.folder,
        weights=args.weights,
        activations=args.activations,
        dtype=args.dtype,
        implementation=args.implementation,
    )


def continue_prompts(args: argparse.Namespace, job: Job, prompts: Sequence[Prompt]) -> None:
    """Continues all prompts, prints the texts and writes the output file where one is asked for."""
    rows = [job.encode(prompt) for prompt in prompts]
    started = time.perf_counter()
    model = load_model(args, job)
    stats = {"load_seconds": time.perf_counter() - started}
    alone = len(prompts) == 1
    results = []
    occurrences = count_occurrences(rows)
    for batch in _batches(rows, job, args.batch_size):
        completions = complete(
            model.engine,
            job.tokenizer,
            [rows[n] for n in batch],
            job.sampling_after(rows[batch[0]]),
            stop=job.stop,
            on_text=_print_piece if alone and not args.no_stream else None,
            occurrences=[occurrences[n] for n in batch],
        )
        _add_stats(stats, model.engine.stats, completions)
        for n, completion in zip(batch, completions, strict=True):
            if alone:
                _print_end(completion, was_streamed=not args.no_stream)
            else:
                print(f"[{n + 1}] {_title(prompts[n])}\n{_written(completion)}\n", flush=True)
            results.append(_result(prompts[n], completion))
    if args.output is not None:
        write_json(args.output, {"results": results, "stats": stats})
    if sys.stderr.isatty():
        _print_stats(stats)


def _batches(rows: Sequence[Sequence[int]], job: Job, size: int) -> Iterator[list[int]]:
    """Numbers of the rows that are continued together: neighbours that may become equally much longer."""
    room = [job.sampling_after(ids).max_new_tokens for ids in rows]
    for _, group in itertools.groupby(range(len(rows)), key=lambda n: room[n]):
        numbers = list(group)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _print_piece(row: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _print_end(completion: TextCompletion, was_streamed: bool) -> None:
    print("" if was_streamed and completion.text is not None else _written(completion), flush=True)


def _written(completion: TextCompletion) -> str:
    """The text, or without a tokenizer the ids."""
    return ",".join(map(str, completion.token_ids)) if completion.text is None else completion.text


def _title(prompt: Prompt) -> str:
    if prompt.token_ids is not None:
        return ",".join(map(str, prompt.token_ids))
    return prompt.text or "" if prompt.messages is None else str(prompt.messages[-1].get("content"))


def _result(prompt: Prompt, completion: TextCompletion) -> dict[str, Any]:
    """An entry of the output file; `prompt` is what was given: a text, messages, or null for token ids."""
    return {
        "prompt": prompt.text if prompt.messages is None else list(prompt.messages),
        "prompt_token_ids": completion.prompt_token_ids,
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
    }


def _add_stats(
    total: dict[str, float], batch: dict[str, float], completions: Sequence[TextCompletion]
) -> None:
    """Adds the counts and seconds of one batch; a rate is that of the sums."""
    decoded = batch["decode_tokens_per_second"] * batch["decode_seconds"]
    decoded += total.get("decode_tokens_per_second", 0.0) * total.get("decode_seconds", 0.0)
    for name in ("prompt_tokens", "prefill_seconds", "decode_seconds"):
        total[name] = total.get(name, 0) + batch[name]
    # Not the engine's count: that has what was made beyond a stop string.
    new_tokens = sum(len(completion.token_ids) for completion in completions)
    total["new_tokens"] = total.get("new_tokens", 0) + new_tokens
    seconds = total["decode_seconds"]
    total["decode_tokens_per_second"] = decoded / seconds if seconds else 0.0


def _print_stats(stats: dict[str, float]) -> None:
    print(
        f"[{stats['prompt_tokens']:.0f} prompt tokens, {stats['new_tokens']:.0f} new tokens, "
        f"{stats['decode_tokens_per_second']:.1f} tokens/s; load {stats['load_seconds']:.1f} s, "
        f"prefill {stats['prefill_seconds']:.1f} s, decode {stats['decode_seconds']:.1f} s]",
        file=sys.stderr,
    )


def _template_variable(argument: str) -> tuple[str, Any]:
    name, equals, value = argument.partition("=")
    if name.isidentifier() and equals:
        try:
            return name, json.loads(value)
        except ValueError:
            pass
    raise InputError(f"--template-variable is {argument!r}; expected NAME=JSON, such as thinking=true")
