"""One decoder layer, or a stack of them: attention and feed-forward, each after a norm and with a residual."""

from flax import nnx
from jax import Array

from dsv3_jax.model.attention import MLA
from dsv3_jax.model.linear import Layer, Parameters, RMSNorm
from dsv3_jax.model.mlp import MLP, MoE, Routing


class DecoderLayer(nnx.Module):
    """x += Attention(RMSNorm(x)); x += FFN(RMSNorm(x))."""

    def __init__(self, make: Parameters, stack: tuple[int, ...], *, moe: bool):
        config = make.config
        self.input_layernorm = RMSNorm(make, stack, config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(make, stack)
        self.post_attention_layernorm = RMSNorm(make, stack, config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(make, stack) if moe else MLP(make, stack, config.intermediate_size)

    def feed_forward(self, x: Array, valid: Array, layer: Layer) -> tuple[Array, Routing | None]:
        """The second half, residual included: [B, T, hidden_size], and the routing of a MoE layer."""
        norm = self.post_attention_layernorm.parameters()
        if isinstance(self.mlp, MoE):
            return self.mlp(x, valid, layer, norm)
        return self.mlp(x, layer, norm=norm, residual=x), None
