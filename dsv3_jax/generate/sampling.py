"""From logits to the next token: greedy, or random after temperature, top-k, top-p and min-p."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a batch is continued.

    Attributes:
        max_new_tokens: tokens a row gets at most; 0 gives none.
        temperature: divisor of the logits; 0 takes the likeliest token always.
        top_k: only the k likeliest tokens; 0 is off.
        top_p: only the likeliest tokens whose probabilities add up to p; 1 is off.
        min_p: only tokens at least this fraction as probable as the likeliest; 0 is off.
        seed: of the random numbers. A row depends on it and on its own prompt, not on the batch around it; the
            n-th row with the same prompt has its own numbers.
        eos_token_ids: ids that end a row; they are not part of the result.
        ignore_eos: go on past them.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises InputError, naming the flag, for a value outside its range."""
        _check("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _check("--temperature", self.temperature, finite, "a finite number, 0 or more")
        _check("--top-k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("--top-p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1 (off)")
        _check("--min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1")
        _check("--seed", self.seed, 0 <= self.seed < 2**32, "from 0 to 4294967295")

    @property
    def method(self) -> "Method":
        """Which of the three programs samples."""
        if self.temperature == 0:
            return "greedy"
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return "filtered" if filtered else "plain"

    def numbers(self) -> Array:
        """temperature, top_k, top_p, min_p as float32 [4]: arguments of a program, so that none is recompiled."""
        return jnp.asarray([self.temperature, self.top_k, self.top_p, self.min_p], jnp.float32)


Method = Literal["greedy", "plain", "filtered"]


def _check(flag: str, value: float, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"{flag} is {value}; expected {expected}")


def count_occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt, how many of those before it are the same."""
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    occurrences = []
    for prompt in map(tuple, prompts):
        occurrences.append(seen[prompt])
        seen[prompt] += 1
    return occurrences


def row_keys(seed: int, occurrences: Sequence[int]) -> Array:
    """One random key a row, from the seed and `count_occurrences`: key array [B]."""
    key = jax.random.key(seed)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.asarray(occurrences, jnp.uint32))


def sample(logits: Array, keys: Array, numbers: Array, method: Method) -> Array:
    """Draws one token a row.

    Args:
        logits: float32 [B, V].
        keys: key array [B], fresh for every token.
        numbers: float32 [4] of `SamplingParams.numbers`.
        method: which of them count; static.

    Returns:
        int32 [B].
    """
    if method == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The release's floor: below it the quotients overflow.
    logits = logits / jnp.maximum(numbers[0], 1e-5)
    if method == "filtered":
        logits = keep_likely(logits, *numbers[1:])
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def keep_likely(logits: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Puts -inf to all but the likeliest tokens: top-k first, top-p and min-p among what it leaves.

    Args:
        logits: float32 [B, V].
        top_k, top_p, min_p: scalars, as in `SamplingParams`.

    Returns:
        float32 [B, V]; the likeliest token always stays.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # With p = 1, rounding of the sum must not cut the tail.
    unlikely = ((before >= top_p) & (top_p < 1)) | (probabilities < min_p * probabilities[:, :1])
    ordered = jnp.where(unlikely & (rank > 0), -jnp.inf, ordered)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, order].set(ordered, unique_indices=True)
