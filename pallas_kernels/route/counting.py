"""The choice of experts on GPUs, by ranks: every expert's score is compared with every other's.

XLA makes a kernel of its own of every `top_k`, gather and sort, microseconds whatever it does; comparisons that are
summed at once fuse with what stands around them.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.normalize import Norm
from pallas_kernels.route.reference import choice_of, logits_of, score
from pallas_kernels.route.rule import Routed, Rule

MAX_TOKENS = 512
"""The comparisons are E * E a token; from here on `top_k` is faster."""

LOWEST = float(jnp.finfo(jnp.float32).min)


def route(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, rule: Rule, norm: Norm | None
) -> Routed:
    """Arguments as of the public function."""
    logits, normed = logits_of(x, weight, layer, norm, None)
    scores = score(logits, rule)
    ids, weights = choose(choice_of(scores, bias, layer), scores, rule)
    return Routed(ids, weights, scores, normed)


def choose(choice: Array, scores: Array, rule: Rule) -> tuple[Array, Array]:
    """The best experts and their weights.

    Args:
        choice: float32 [M, E], scores by which experts are chosen.
        scores: float32 [M, E], scores that the weights are made of.

    Returns:
        int32 [M, K] ids and float32 [M, K] weights.
    """
    # NaN compares with nothing: as the lowest number it has a rank, and ids stay in range.
    choice = jnp.where(choice >= LOWEST, choice, LOWEST)
    if rule.topk_group < rule.n_group:
        choice = _of_kept_groups(choice, rule)
    rank = _ranks(choice)
    hit = rank[:, None, :] == jnp.arange(rule.top_k)[:, None]
    ids = jnp.sum(jnp.where(hit, jnp.arange(choice.shape[1]), 0), axis=-1, dtype=jnp.int32)
    weights = jnp.sum(jnp.where(hit, scores[:, None, :], 0), axis=-1)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * rule.scale


def _of_kept_groups(choice: Array, rule: Rule) -> Array:
    """-inf for the experts of all groups but the `topk_group` best."""
    groups = choice.reshape(choice.shape[0], rule.n_group, -1)
    counted = 2 if rule.group_score == "top2" else 1
    best = jnp.sum(jnp.where(_ranks(groups) < counted, groups, 0), axis=-1)
    # A group that lacks finite scores for its sum ranks with the empty ones, as if nothing had been raised to LOWEST.
    best = jnp.where(best > LOWEST, best, -jnp.inf)
    kept = _ranks(best) < rule.topk_group
    return jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(choice.shape)


def _ranks(values: Array) -> Array:
    """int32 [..., N]: how many of the last axis come before each, the lower index first among equals."""
    index = lax.iota(jnp.int32, values.shape[-1])
    other, own = values[..., None, :], values[..., :, None]
    before = (other > own) | ((other == own) & (index < index[:, None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)
