"""Generation of token ids: one jitted prefill and one jitted decode loop, for batches of mixed lengths."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.generate.sampling import Method, SamplingParams, count_occurrences, row_keys, sample
from dsv3_jax.model.cache import Cache, grow, init_cache
from dsv3_jax.model.functional import Params, decode_step, extend, prefill
from dsv3_jax.model.layout import for_reading
from dsv3_jax.precision import Precision

BUFFER_TOKENS = 64
"""Tokens a row that one call of the decode loop makes at most, between two looks at ^C and stop strings."""

PREFILL_TOKENS = 8192
"""Tokens of a batch that the model reads at once: longer prompts are read in chunks, so that memory stays bounded."""

Stopped = Callable[[int, list[int]], bool]


@dataclasses.dataclass
class Completion:
    """The result of one row; `finish_reason` is "stop" (an eos id or a stop string) or "length"."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] = "length"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the decode loop carries.

    Attributes:
        cache: holds all tokens but the last of each row.
        token: int32 [B], the last token of each row, not yet in the cache.
        count: int32 [B], new tokens so far, that one included.
        done: bool [B], rows that get no more tokens.
        keys: key array [B], each row's own.
    """

    cache: Cache
    token: Array
    count: Array
    done: Array
    keys: Array


@dataclasses.dataclass
class Conversation:
    """What a cache holds of one conversation, so that the model reads only what its next turn adds.

    Given to one stream after the other, never to two at once: a stream takes the cache over, and leaves it here when
    it ends.

    Attributes:
        tokens: ids that are in the cache.
        cache: of a batch of one; None before the first turn.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    cache: Cache | None = None


def bucket(length: int) -> int:
    """Least of 16, 24, 32, 48, 64, 96, ... that is not below `length`: programs are compiled for these only."""
    size = 16
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def cache_capacity(length: int, config: ModelConfig) -> int:
    """Tokens a row of a cache for `length`: a bucket, and a multiple of the 128 that the kernels take at a time."""
    return min(-(-bucket(length) // 128) * 128, config.max_position_embeddings)


class Engine:
    """Continues batches of token ids with one model.

    Attributes:
        num_tokens: ids from here on are never generated (rows of the embedding that belong to no token).
        stats: counts and seconds of the last call.
    """

    def __init__(
        self, params: Params, config: ModelConfig, precision: Precision, num_tokens: int | None = None
    ):
        self.params = for_reading(params, precision)
        self.config = config
        self.precision = precision
        self.num_tokens = min(num_tokens or config.vocab_size, config.vocab_size)
        self.stats: dict[str, float] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        stopped: Stopped | None = None,
        occurrences: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continues all prompts to their end; see `stream` for arguments and errors."""
        steps = self.stream(prompts, sampling, stopped=stopped, chunk=BUFFER_TOKENS, occurrences=occurrences)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        stopped: Stopped | None = None,
        chunk: int = 1,
        occurrences: Sequence[int] | None = None,
        conversation: Conversation | None = None,
    ) -> Generator[list[list[int]], None, list[Completion]]:
        """Continues a batch and hands out tokens as they come.

        Args:
            prompts: token ids of each row; lengths may differ.
            stopped: asked after every chunk with the row and all its new ids, whether the row ends there.
            chunk: decode steps between two yields, at most 64.
            occurrences: how many earlier rows have the same prompt, for each row; for batches that are parts of a
                larger one. Counted in this batch if None.
            conversation: the conversation that the one prompt continues.

        Yields:
            The new ids of every row since the last yield, without eos ids.

        Returns:
            One `Completion` a row.

        Raises:
            InputError: a prompt is empty, holds an id out of range, or does not fit the context.
        """
        self.check(prompts, sampling)
        completions = [Completion(list(prompt), []) for prompt in prompts]
        self.stats = dict.fromkeys(("prefill_seconds", "decode_seconds", "decode_tokens_per_second"), 0.0)
        self.stats |= {"prompt_tokens": sum(map(len, prompts)), "new_tokens": 0}
        if not prompts or sampling.max_new_tokens == 0:
            return completions
        occurrences = count_occurrences(prompts) if occurrences is None else occurrences
        started = time.perf_counter()
        state = self._start(prompts, sampling, row_keys(sampling.seed, occurrences), conversation)
        tokens = np.asarray(state.token)[:, None]
        self.stats["prefill_seconds"] = time.perf_counter() - started
        steps = 0
        try:
            while True:
                new = _collect(tokens, completions, sampling)
                stop = [row for row, c in enumerate(completions) if stopped and stopped(row, c.token_ids)]
                for row in stop:
                    completions[row].finish_reason = "stop"
                self.stats["new_tokens"] = sum(len(c.token_ids) for c in completions)
                yield new
                done = np.asarray(state.done) | np.isin(np.arange(len(prompts)), stop)
                if done.all():
                    return completions
                begun = time.perf_counter()
                state = dataclasses.replace(state, done=jnp.asarray(done))
                buffer, state = self._decode(state, sampling, chunk)
                tokens = np.asarray(buffer)
                steps += int((tokens >= 0).sum())
                self.stats["decode_seconds"] += time.perf_counter() - begun
                self.stats["decode_tokens_per_second"] = steps / self.stats["decode_seconds"]
        finally:
            if conversation is not None:
                written = completions[0].prompt_token_ids + completions[0].token_ids
                conversation.tokens = written[: int(state.cache.lengths[0])]
                conversation.cache = state.cache

    def check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        """Raises InputError where `stream` would refuse the prompts."""
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {row + 1} is empty; expected at least one token")
            for token in prompt:
                if not 0 <= token < self.config.vocab_size:
                    raise InputError(
                        f"prompt {row + 1}: token id {token} is out of range; "
                        f"expected 0 to {self.config.vocab_size - 1}"
                    )
            total = len(prompt) + sampling.max_new_tokens
            if total > self.config.max_position_embeddings:
                raise InputError(
                    f"prompt {row + 1}: {len(prompt)} tokens and --max-new-tokens {sampling.max_new_tokens} do not "
                    f"fit the context; expected at most {self.config.max_position_embeddings} together"
                )

    def _start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        keys: Array,
        conversation: Conversation | None,
    ) -> LoopState:
        """Reads the prompts, a chunk at a time, and draws the first token of each row."""
        static = {"config": self.config, "precision": self.precision}
        longest = max(map(len, prompts))
        cache, known = self._cache_for(prompts, longest + sampling.max_new_tokens, conversation)
        size = max(PREFILL_TOKENS // len(prompts), 16)
        logits = None
        for start in range(known, longest, size):
            rows = [prompt[start : start + size] for prompt in prompts]
            tokens, lengths = pad_rows(rows, min(bucket(max(map(len, rows))), cache.capacity))
            program = _prefill_program if start == 0 else _extend_program
            chunk_logits, cache = program(self.params, tokens, lengths, cache, **static)
            # A row's logits are those of the chunk in which its prompt ends.
            logits = chunk_logits if logits is None else jnp.where(lengths[:, None] > 0, chunk_logits, logits)
        count = jnp.zeros(len(prompts), jnp.int32)
        token = _first_program(
            logits, keys, count, sampling.numbers(), method=sampling.method, num_tokens=self.num_tokens
        )
        done = (token[:, None] == self._eos(sampling)).any(-1) | (sampling.max_new_tokens == 1)
        return LoopState(cache, token, count + 1, done, keys)

    def _cache_for(
        self, prompts: Sequence[Sequence[int]], length: int, conversation: Conversation | None
    ) -> tuple[Cache, int]:
        """A cache with room for `length` tokens a row, and how many tokens of the prompts are in it already."""
        capacity = cache_capacity(length, self.config)
        if conversation is not None:
            # The last token is read again: its logits are not in the cache.
            pairs = zip(conversation.tokens, prompts[0][:-1], strict=False)
            known = sum(itertools.takewhile(bool, (a == b for a, b in pairs)))
            cache, conversation.cache, conversation.tokens = conversation.cache, None, []
            if cache is not None and known:
                if cache.capacity < capacity:
                    cache = grow(cache, self.config, capacity)
                return dataclasses.replace(cache, lengths=jnp.full(1, known, jnp.int32)), known
        return init_cache(self.config, len(prompts), capacity, self.precision.dtype), 0

    def _decode(self, state: LoopState, sampling: SamplingParams, chunk: int) -> tuple[Array, LoopState]:
        return _decode_program(
            self.params,
            state,
            sampling.numbers(),
            self._eos(sampling),
            jnp.int32(sampling.max_new_tokens),
            jnp.int32(min(chunk, BUFFER_TOKENS)),
            config=self.config,
            precision=self.precision,
            method=sampling.method,
            num_tokens=self.num_tokens,
        )

    def _eos(self, sampling: SamplingParams) -> Array:
        ids = () if sampling.ignore_eos else sampling.eos_token_ids
        # At least one entry, so that the number of eos ids seldom compiles a program anew.
        return jnp.asarray((*ids, *[-1] * (4 - len(ids))), jnp.int32)


def pad_rows(rows: Sequence[Sequence[int]], length: int) -> tuple[Array, Array]:
    """Rows of ids, right-padded with 0: int32 [B, length], and their lengths, int32 [B]."""
    tokens = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def _collect(tokens: np.ndarray, completions: list[Completion], sampling: SamplingParams) -> list[list[int]]:
    """Appends the new ids [B, n] (-1 where a row had none) to the completions and returns them by row."""
    eos = () if sampling.ignore_eos else sampling.eos_token_ids
    new = []
    for row, completion in enumerate(completions):
        ids = [int(token) for token in tokens[row] if token >= 0]
        if ids and ids[-1] in eos:
            ids.pop()
            completion.finish_reason = "stop"
        completion.token_ids.extend(ids)
        new.append(ids)
    return new


def _next_token(
    logits: Array, keys: Array, count: Array, numbers: Array, method: Method, num_tokens: int
) -> Array:
    if num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
    return sample(logits, jax.vmap(jax.random.fold_in)(keys, count), numbers, method)


def decode_loop(
    params: Params,
    state: LoopState,
    numbers: Array,
    eos: Array,
    max_new_tokens: Array,
    num_steps: Array,
    *,
    config: ModelConfig,
    precision: Precision,
    method: Method,
    num_tokens: int,
) -> tuple[Array, LoopState]:
    """Decodes until every row is done or `num_steps` steps are.

    Args:
        state: of the prefill or of an earlier call.
        numbers: float32 [4] of `SamplingParams.numbers`.
        eos: int32 [n], ids that end a row; -1 entries are ignored.
        max_new_tokens: int32 scalar.
        num_steps: int32 scalar, at most 64.
        method, num_tokens: static; how to sample, and how many ids may be.

    Returns:
        int32 [B, 64], the new tokens by step, -1 where a row was done, and the state.
    """

    def body(carry: tuple[Array, Array, LoopState]) -> tuple[Array, Array, LoopState]:
        step, buffer, state = carry
        live = ~state.done
        logits, cache = decode_step(
            params, state.token, state.cache, live, config=config, precision=precision
        )
        token = _next_token(logits, state.keys, state.count, numbers, method, num_tokens)
        count = state.count + live
        done = state.done | (token[:, None] == eos).any(-1) | (count >= max_new_tokens)
        buffer = lax.dynamic_update_slice(buffer, jnp.where(live, token, -1)[:, None], (0, step))
        token = jnp.where(live, token, state.token)
        return step + 1, buffer, LoopState(cache, token, count, done, state.keys)

    def unfinished(carry: tuple[Array, Array, LoopState]) -> Array:
        step, _, state = carry
        return (step < num_steps) & ~state.done.all()

    buffer = jnp.full((state.token.shape[0], BUFFER_TOKENS), -1, jnp.int32)
    _, buffer, state = lax.while_loop(unfinished, body, (jnp.int32(0), buffer, state))
    return buffer, state


_MODEL = ("config", "precision")
_SAMPLING = ("method", "num_tokens")
_prefill_program = jax.jit(prefill, static_argnames=_MODEL, donate_argnames="cache")
_extend_program = jax.jit(extend, static_argnames=_MODEL, donate_argnames="cache")
_first_program = jax.jit(_next_token, static_argnames=_SAMPLING)
_decode_program = jax.jit(decode_loop, static_argnames=_MODEL + _SAMPLING, donate_argnames="state")
