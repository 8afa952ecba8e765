"""The router: which experts a token goes to and with which weights, all in float32 (paper section 2.1.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.linear import Layer, Parameters, PlainLinear


class Router(PlainLinear):
    """`mlp.gate` of a checkpoint: scores by a linear, and V3's correction bias for the choice alone."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        config = make.config
        super().__init__(make, stack, config.n_routed_experts, config.hidden_size)
        self.e_score_correction_bias = nnx.data(None)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = make.zeros_float32((*stack, config.n_routed_experts))
        self.config = config

    def __call__(self, x: Array, layer: Layer = None) -> tuple[Array, Array, Array]:
        """Routes tokens.

        Args:
            x: [M, hidden_size].

        Returns:
            expert ids int32 [M, K], their weights float32 [M, K], and all scores float32 [M, E].
        """
        logits = super().__call__(x, layer)
        if self.e_score_correction_bias is None:
            scores = jax.nn.softmax(logits, axis=-1)
            ids = choose_experts(scores, self.config)
        else:
            scores = jax.nn.sigmoid(logits)
            bias = self.e_score_correction_bias[...]
            ids = choose_experts(scores + (bias if layer is None else bias[layer]), self.config)
        return ids, combine_weights(scores, ids, self.config), scores


def choose_experts(choice: Array, config: ModelConfig) -> Array:
    """The `num_experts_per_tok` best experts among those of the `topk_group` best groups.

    A group's score is the sum of its two best experts' (noaux_tc) or its best expert's (group_limited_greedy).

    Args:
        choice: float32 [M, E], scores by which experts are chosen (with the bias, which weights never see).

    Returns:
        int32 [M, num_experts_per_tok].
    """
    choice = jax.lax.stop_gradient(choice)
    if config.n_group > 1:
        groups = choice.reshape(choice.shape[0], config.n_group, -1)
        best = jax.lax.top_k(groups, 2 if config.topk_method == "noaux_tc" else 1)[0].sum(-1)
        kept = jax.lax.top_k(best, config.topk_group)[1]
        is_kept = (kept[:, :, None] == jnp.arange(config.n_group)).any(axis=1)
        # Not 0: it would win over negative scores. For softmax, which has none, the two agree.
        choice = jnp.where(is_kept[:, :, None], groups, -jnp.inf).reshape(choice.shape)
    return jax.lax.top_k(choice, config.num_experts_per_tok)[1]


def combine_weights(scores: Array, ids: Array, config: ModelConfig) -> Array:
    """Weights of the chosen experts: their scores, normalised if the config says so, then scaled.

    Args:
        scores: float32 [M, E], without bias.
        ids: int32 [M, K].

    Returns:
        float32 [M, K].
    """
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * config.routed_scaling_factor
