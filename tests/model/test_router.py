import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, named_config
from dsv3_jax.model.mlp import sort_by_expert
from dsv3_jax.model.router import choose_experts, combine_weights

V3 = dataclasses.replace(
    named_config("deepseek-v3"), n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=5
)
V2 = dataclasses.replace(
    named_config("deepseek-v2"), n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=5
)
LITE = dataclasses.replace(named_config("deepseek-v2-lite"), n_routed_experts=32, num_experts_per_tok=5)


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
    [(V3, 0.0), (V3, -5.0), (V2, 0.0), (LITE, 0.0)],
    ids=["noaux_tc", "noaux_tc-negative", "group_limited_greedy", "greedy"],
)
def test_choice(config: ModelConfig, shift: float) -> None:
    choice = np.random.default_rng(0).random((200, 32)).astype(np.float32) + np.float32(shift)
    ids = np.asarray(choose_experts(jnp.asarray(choice), config))
    assert [set(row.tolist()) for row in ids] == [choose_one(row, config) for row in choice]


def test_weights_are_normalised_then_scaled() -> None:
    scores = jnp.asarray([[0.1, 0.2, 0.3, 0.4]])
    ids = jnp.asarray([[3, 1]])
    v3 = np.asarray(combine_weights(scores, ids, V3))
    np.testing.assert_allclose(v3, [[0.4 / 0.6 * 2.5, 0.2 / 0.6 * 2.5]], rtol=1e-6)
    v2 = np.asarray(combine_weights(scores, ids, V2))
    np.testing.assert_allclose(v2, [[0.4 * 16, 0.2 * 16]], rtol=1e-6)


def test_sorting_groups_pairs_and_leaves_padding_last() -> None:
    ids = jnp.asarray([[2, 0], [1, 2], [0, 1]])
    order, sizes = sort_by_expert(ids, jnp.asarray([True, False, True]), 4)
    np.testing.assert_array_equal(np.asarray(sizes), [2, 1, 1, 0])
    np.testing.assert_array_equal(np.asarray(order), [1, 4, 5, 0, 2, 3])
