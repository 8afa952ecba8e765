"""Definition of the router: scores by a linear, the choice of experts, their weights."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_scaled_matmul import block_scaled_matmul
from pallas_kernels.normalize import Norm, rms_norm
from pallas_kernels.route.rule import Routed, Rule


def route(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, rule: Rule, norm: Norm | None
) -> Routed:
    """Arguments as of the public function."""
    logits, normed = logits_of(x, weight, layer, norm, "reference")
    scores = score(logits, rule)
    ids = choose_experts(choice_of(scores, bias, layer), rule)
    return Routed(ids, combine_weights(scores, ids, rule), scores, normed)


def logits_of(
    x: Array, weight: Array, layer: Array | int | None, norm: Norm | None, implementation: str | None
) -> tuple[Array, Array | None]:
    """float32 [M, E], and the normed tokens [M, H] where there is a norm."""
    normed = None if norm is None else rms_norm(x, norm, layer)
    logits = block_scaled_matmul(
        x if normed is None else normed,
        weight,
        layer=layer,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    return logits, normed


def choice_of(scores: Array, bias: Array | None, layer: Array | int | None) -> Array:
    """What experts are chosen by: their scores, and the bias if there is one."""
    if bias is None:
        return scores
    return scores + (bias if layer is None else bias[layer])


def score(logits: Array, rule: Rule) -> Array:
    """float32 [M, E] -> float32 [M, E]."""
    return jax.nn.sigmoid(logits) if rule.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def choose_experts(choice: Array, rule: Rule) -> Array:
    """The `top_k` best experts among those of the `topk_group` best groups, the lowest index first among equals.

    Args:
        choice: float32 [M, E], scores by which experts are chosen (with the bias, which weights never see).

    Returns:
        int32 [M, top_k].
    """
    choice = jax.lax.stop_gradient(choice)
    if rule.n_group > 1:
        groups = choice.reshape(choice.shape[0], rule.n_group, -1)
        best = jax.lax.top_k(groups, 2 if rule.group_score == "top2" else 1)[0].sum(-1)
        kept = jax.lax.top_k(best, rule.topk_group)[1]
        is_kept = (kept[:, :, None] == jnp.arange(rule.n_group)).any(axis=1)
        # Not 0: it would win over negative scores. For softmax, which has none, the two agree.
        choice = jnp.where(is_kept[:, :, None], groups, -jnp.inf).reshape(choice.shape)
    return jax.lax.top_k(choice, rule.top_k)[1]


def combine_weights(scores: Array, ids: Array, rule: Rule) -> Array:
    """Weights of the chosen experts: their scores, normalised if the rule says so, then scaled.

    Args:
        scores: float32 [M, E], without bias.
        ids: int32 [M, K].

    Returns:
        float32 [M, K].
    """
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * rule.scale
