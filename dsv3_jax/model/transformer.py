"""The whole model: embedding, stacked decoder layers, norm, head, and the MTP modules (paper section 2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import DecoderLayer
from dsv3_jax.model.linear import Embedding, Parameters, PlainLinear, RMSNorm
from dsv3_jax.precision import Precision
from pallas_kernels.normalize import Norm


class SharedHead(nnx.Module):
    """Norm before the head of an MTP module; the head itself is the main model's."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        self.norm = RMSNorm(make, stack, make.config.hidden_size, make.config.rms_norm_eps)


class MTPLayers(DecoderLayer):
    """Multi-token prediction modules, stacked (paper section 2.2): one MoE layer each with its own input and norm."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        super().__init__(make, stack, moe=True)
        config = make.config
        self.enorm = RMSNorm(make, stack, config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(make, stack, config.hidden_size, config.rms_norm_eps)
        self.eh_proj = PlainLinear(make, stack, config.hidden_size, 2 * config.hidden_size)
        self.shared_head = SharedHead(make, stack)

    def combine(self, embedding: Array, hidden: Array, module: int) -> Array:
        """Input of a module from the next token's embedding and the hidden state, embedding first.

        The paper's equation 21 writes the hidden state first; the stored weights have it second.

        Args:
            embedding, hidden: [B, T, hidden_size].
            module: which module of the stack.
        """
        joined = [self.enorm(embedding, module), self.hnorm(hidden, module)]
        return self.eh_proj(jnp.concatenate(joined, axis=-1), module).astype(hidden.dtype)


class DeepseekV3(nnx.Module):
    """All parameters of a model; `dsv3_jax.model.functional` runs them.

    Layers of one kind are stacked: `dense_layers` first, then `moe_layers`, then `mtp_layers`.
    """

    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs):
        make = Parameters(config, precision, rngs)
        self.config = config
        self.embed_tokens = Embedding(make, config.vocab_size, config.hidden_size)
        if config.first_k_dense_replace:
            self.dense_layers = DecoderLayer(make, (config.first_k_dense_replace,), moe=False)
        if config.num_moe_layers:
            self.moe_layers = DecoderLayer(make, (config.num_moe_layers,), moe=True)
        self.norm = RMSNorm(make, (), config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = PlainLinear(make, (), config.vocab_size, config.hidden_size)
        if config.num_nextn_predict_layers:
            self.mtp_layers = MTPLayers(make, (config.num_nextn_predict_layers,))

    def groups(self) -> list[tuple[DecoderLayer, int]]:
        """The stacks of the main model in order, each with its number of layers."""
        config = self.config
        groups = []
        if config.first_k_dense_replace:
            groups.append((self.dense_layers, config.first_k_dense_replace))
        if config.num_moe_layers:
            groups.append((self.moe_layers, config.num_moe_layers))
        return groups

    def logits(self, hidden: Array, norm: Norm | None = None) -> Array:
        """[..., hidden_size] -> float32 [..., vocab_size]; through `norm` first, if it is given."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.logits(hidden, norm)
        return self.lm_head(hidden, norm=norm)


def abstract_model(config: ModelConfig, precision: Precision) -> DeepseekV3:
    """The model with `jax.ShapeDtypeStruct`s for parameters: nothing is allocated."""
    return nnx.eval_shape(lambda: DeepseekV3(config, precision, rngs=nnx.Rngs(0)))


def abstract_params(config: ModelConfig, weights: str) -> dict:
    """Shapes and dtypes of all parameters as a nested dict, paths as in a checkpoint but layers stacked.

    Args:
        weights: "float8", "bfloat16", "float16" or "float32".
    """
    return params_of(abstract_model(config, Precision(weights=weights)))  # type: ignore[arg-type]


def init_params(config: ModelConfig, precision: Precision, key: Array) -> dict:
    """Random parameters: normal with the config's `initializer_range`, norms 1, correction bias 0."""

    @jax.jit
    def init(key: Array) -> dict:
        return params_of(DeepseekV3(config, precision, rngs=nnx.Rngs(params=key)))

    return init(key)


def params_of(model: DeepseekV3) -> dict:
    """The parameters of a model as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])
