"""The router: which experts a token goes to and with which weights, all in float32 (paper section 2.1.2)."""

from typing import Any

from flax import nnx
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.linear import Layer, Parameters, PlainLinear
from pallas_kernels.normalize import Norm
from pallas_kernels.route import Routed, route


class Router(PlainLinear):
    """`mlp.gate` of a checkpoint: scores by a linear, and V3's correction bias for the choice alone."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        config = make.config
        super().__init__(make, stack, config.n_routed_experts, config.hidden_size)
        self.e_score_correction_bias = nnx.data(None)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = make.zeros_float32((*stack, config.n_routed_experts))
        self.config = config

    def routed(self, x: Array, layer: Layer, norm: Norm) -> tuple[Routed, Array]:
        """Routes tokens.

        Args:
            x: [M, hidden_size], before `norm`.

        Returns:
            Expert ids [M, K], their weights [M, K] and all scores [M, E]; and the normed tokens [M, hidden_size].
        """
        bias = self.e_score_correction_bias
        routed = route(
            x,
            self.weight[...],
            None if bias is None else bias[...],
            layer=layer,
            norm=norm,
            implementation=self.implementation,
            **routing_rule(self.config),
        )
        assert routed.normed is not None
        return routed, routed.normed


def routing_rule(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `route` that a config decides."""
    biased = config.topk_method == "noaux_tc"
    return {
        "top_k": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "group_score": "top2" if biased else "max",
        "scoring": "sigmoid" if biased else "softmax",
        "normalize": config.norm_topk_prob,
        "scale": config.routed_scaling_factor,
    }
