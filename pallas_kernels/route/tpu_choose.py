"""The choice of experts inside the TPU kernel: experts along sublanes, tokens along lanes.

That way a maximum over experts is one of whole registers, for 128 tokens at once; along lanes every step of it would
wait for the cross-lane unit.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.route.rule import Rule

LOWEST = float(jnp.finfo(jnp.float32).min)


def choose_columns(choice: Array, scores: Array, rule: Rule) -> tuple[Array, Array]:
    """The best experts of every column, the lowest index first among equals.

    Args:
        choice: float32 [E, M], scores by which experts are chosen.
        scores: float32 [E, M], scores that the weights are made of.

    Returns:
        int32 [K, M] ids and float32 [K, M] weights.
    """
    # What lies below every finite score marks experts already taken, also where a token's scores are all NaN.
    choice = jnp.where(choice >= LOWEST, choice, LOWEST)
    index = lax.broadcasted_iota(jnp.int32, choice.shape, 0).astype(jnp.float32)
    if rule.topk_group < rule.n_group:
        choice, scores, index = _kept_groups(choice, scores, rule)
    ids, weights = [], []
    for _ in range(rule.top_k):
        best = _top(choice)
        first = jnp.min(jnp.where(choice == best, index, jnp.inf), axis=0, keepdims=True)
        hit = index == first
        ids.append(first)
        weights.append(jnp.sum(jnp.where(hit, scores, 0), axis=0, keepdims=True))
        choice = jnp.where(hit, -jnp.inf, choice)
    return jnp.concatenate(ids).astype(jnp.int32), _combine(jnp.concatenate(weights), rule)


def _combine(weights: Array, rule: Rule) -> Array:
    if rule.normalize:
        weights = weights / (jnp.sum(weights, axis=0, keepdims=True) + 1e-20)
    return weights * rule.scale


def _kept_groups(choice: Array, scores: Array, rule: Rule) -> tuple[Array, Array, Array]:
    """The experts of the `topk_group` best groups, moved together: choice, scores, index of [candidates, M]."""
    size = choice.shape[0] // rule.n_group
    groups = [slice(g * size, (g + 1) * size) for g in range(rule.n_group)]
    best = jnp.concatenate([_group_score(choice[group], rule) for group in groups])
    # A group that lacks finite scores for its sum ranks with the empty ones, as if nothing had been raised to LOWEST.
    best = jnp.where(best > LOWEST, best, -jnp.inf)
    kept = _rank(best) < rule.topk_group
    slot = _count_above(kept)
    within = lax.broadcasted_iota(jnp.int32, (size, choice.shape[1]), 0).astype(jnp.float32)
    columns: list[tuple[Array, Array, Array]] = []
    for j in range(rule.topk_group):
        # The j-th kept group is none of the first j, and leaves room for those that follow it.
        candidates = range(j, rule.n_group - rule.topk_group + j + 1)
        values, kept_scores, first = choice[groups[j]], scores[groups[j]], jnp.full_like(best[:1], j * size)
        for g in candidates[1:]:
            is_it = kept[g : g + 1] & (slot[g : g + 1] == j)
            values = jnp.where(is_it, choice[groups[g]], values)
            kept_scores = jnp.where(is_it, scores[groups[g]], kept_scores)
            first = jnp.where(is_it, float(g * size), first)
        columns.append((values, kept_scores, within + first))
    values, kept_scores, index = (jnp.concatenate(parts) for parts in zip(*columns, strict=True))
    return values, kept_scores, index


def _group_score(group: Array, rule: Rule) -> Array:
    best = _top(group)
    if rule.group_score == "max":
        return best
    index = lax.broadcasted_iota(jnp.int32, group.shape, 0).astype(jnp.float32)
    first = jnp.min(jnp.where(group == best, index, jnp.inf), axis=0, keepdims=True)
    return best + _top(jnp.where(index == first, -jnp.inf, group))


def _rank(best: Array) -> Array:
    """int32 [G, M]: how many groups come before each."""
    index = lax.broadcasted_iota(jnp.int32, best.shape, 0)
    rank = jnp.zeros_like(index)
    for g in range(best.shape[0]):
        other = best[g : g + 1]
        rank += ((other > best) | ((other == best) & (index > g))).astype(jnp.int32)
    return rank


def _count_above(kept: Array) -> Array:
    """int32 [G, M]: how many of the groups with a lower index are kept."""
    index = lax.broadcasted_iota(jnp.int32, kept.shape, 0)
    ones = kept.astype(jnp.int32)
    count = jnp.zeros_like(index)
    for g in range(kept.shape[0] - 1):
        count += jnp.where(index > g, ones[g : g + 1], 0)
    return count


def _top(values: Array) -> Array:
    return jnp.max(values, axis=0, keepdims=True)
