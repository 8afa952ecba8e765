import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, named_config
from dsv3_jax.model.router import routing_rule
from pallas_kernels.route import route

EXPERTS, CHOSEN = 32, 5
V3, V2 = (
    dataclasses.replace(
        named_config(name), n_routed_experts=EXPERTS, n_group=8, topk_group=3, num_experts_per_tok=CHOSEN
    )
    for name in ("deepseek-v3", "deepseek-v2")
)
LITE = dataclasses.replace(
    named_config("deepseek-v2-lite"), n_routed_experts=EXPERTS, num_experts_per_tok=CHOSEN
)


def choose_one(choice: np.ndarray, config: ModelConfig) -> set[int]:
    """The rule in words: best groups, then the best experts in them."""
    size = len(choice) // config.n_group
    groups = [range(g * size, g * size + size) for g in range(config.n_group)]
    count = 2 if config.topk_method == "noaux_tc" else 1
    best = sorted(groups, key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:count]))
    allowed = [e for group in best[: config.topk_group] for e in group]
    return set(sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok])


@pytest.mark.parametrize(
    ("config", "shift"),
    [(V3, 0.0), (V3, -5.0), (V2, None), (LITE, None)],
    ids=["noaux_tc", "noaux_tc-negative", "group_limited_greedy", "greedy"],
)
def test_rule_of_a_config(config: ModelConfig, shift: float | None) -> None:
    logits = np.random.default_rng(0).standard_normal((200, EXPERTS)).astype(np.float32)
    bias = None if shift is None else np.linspace(0, 0.3, EXPERTS, dtype=np.float32) + np.float32(shift)
    # The identity as the router's weight: what goes in are the logits.
    routed = route(
        jnp.asarray(logits),
        jnp.eye(EXPERTS),
        None if bias is None else jnp.asarray(bias),
        **routing_rule(config),
    )
    scores = np.asarray(routed.scores)
    exponents = np.exp(logits)
    expected = 1 / (1 + 1 / exponents) if bias is not None else exponents / exponents.sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    choice = scores if bias is None else scores + bias
    ids = np.asarray(routed.ids)
    assert [set(row.tolist()) for row in ids] == [choose_one(row, config) for row in choice]
    weights = np.take_along_axis(scores, ids, axis=1)
    if config.norm_topk_prob:
        weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(routed.weights, weights * config.routed_scaling_factor, rtol=1e-5)
