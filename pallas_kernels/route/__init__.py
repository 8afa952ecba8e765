"""`route`: the router of a mixture of experts, from the tokens to the chosen experts and their weights."""

from jax import Array

from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.normalize import Norm
from pallas_kernels.route import gpu, reference, tpu
from pallas_kernels.route.rule import GroupScore, Routed, Rule, Scoring

__all__ = ["GroupScore", "Routed", "Scoring", "route"]


def route(
    x: Array,
    weight: Array,
    bias: Array | None,
    *,
    layer: Array | int | None = None,
    top_k: int,
    n_group: int,
    topk_group: int,
    group_score: GroupScore,
    scoring: Scoring,
    normalize: bool,
    scale: float,
    norm: Norm | None = None,
    implementation: str | None = None,
) -> Routed:
    """Scores all experts, chooses `top_k` of them a token and weighs them (paper section 2.1.2, `Gate` of model.py).

    Logits, scores and weights are float32. The choice is by scores plus bias, the weights by scores alone. Among
    equal scores the lower index wins. Gradients flow into weights, scores and the normed tokens, never through the
    choice.

    Args:
        x: [M, H], bfloat16 or float32.
        weight: [L, E, H] with `layer`, [E, H] without; bfloat16 or float32.
        bias: float32 [L, E] or [E], or None (V3's `e_score_correction_bias`).
        layer: index into the stacks, a scalar, possibly traced.
        top_k: K, experts a token.
        n_group: groups that the experts are divided into, consecutive and equally large.
        topk_group: groups whose experts can be chosen.
        group_score: of a group: the sum of its two best experts' scores (noaux_tc), or its best expert's
            (group_limited_greedy).
        scoring: what makes scores of logits.
        normalize: divides the chosen experts' weights by their sum.
        scale: multiplies the weights afterwards.
        norm: RMSNorm that tokens pass first, its weight stacked as `weight` is; None where they come normed.
        implementation: None, "reference" or "pallas".

    Raises:
        ValueError: the experts do not divide into n_group groups, or there are too few to choose from.
    """
    _check(weight.shape[-2], top_k, n_group, topk_group, group_score)
    rule = Rule(top_k, n_group, topk_group, group_score, scoring, normalize, scale)
    function = choose(
        "route",
        implementation,
        reference=reference.route,
        tpu=Kernel(tpu.route, lambda: tpu.unsupported(x, weight)),
        # XLA routes a prompt's many tokens as fast.
        gpu=Kernel(gpu.route) if 0 < x.shape[0] <= gpu.MAX_TOKENS else None,
    )
    return function(x, weight, bias, layer, rule, norm)


def _check(num_experts: int, top_k: int, n_group: int, topk_group: int, group_score: GroupScore) -> None:
    if num_experts % n_group:
        raise ValueError(
            f"route: {num_experts} experts in {n_group} groups; expected a divisor of {num_experts}"
        )
    group_size = num_experts // n_group
    if n_group == 1:
        topk_group = 1
    elif topk_group > n_group:
        raise ValueError(f"route: topk_group is {topk_group}; expected at most n_group = {n_group}")
    elif group_score == "top2" and group_size < 2:
        raise ValueError("route: group_score is 'top2' for groups of one expert; expected 'max'")
    if top_k > topk_group * group_size:
        raise ValueError(f"route: top_k is {top_k}; expected at most {topk_group} groups of {group_size}")
