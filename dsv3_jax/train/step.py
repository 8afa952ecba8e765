"""One step of training: next-token loss, AdamW, and the update of the router's bias (no auxiliary loss)."""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.functional import Params, head, train_hidden
from dsv3_jax.model.rope import rope_table
from dsv3_jax.precision import Precision

TRAIN_PRECISION = Precision(weights="float32", activations="none", dtype="float32")
ROUTER_BIAS_RATE = 1e-2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run has learnt.

    Attributes:
        params: float32, nested as `abstract_params` says.
        opt_state: of the optimizer that made it.
        step: int32 scalar, steps taken.
    """

    params: Params
    opt_state: optax.OptState
    step: Array


Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Array], tuple[TrainState, Metrics]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A run that has taken no step yet."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def token_losses(
    params: Params, batch: Array, *, config: ModelConfig, precision: Precision
) -> tuple[Array, Array | None]:
    """Cross-entropy of every prediction.

    Args:
        batch: int32 [B, T + 1].

    Returns:
        float32 [B, T], nats; and the experts that were chosen, int32 [L, B * T, K], None without MoE layers.
    """
    rope = jnp.asarray(rope_table(config, batch.shape[1] - 1))
    hidden, routing = train_hidden(
        params, batch[:, :-1], rope, config=config, precision=precision, remat=False
    )
    logits = head(params, hidden, config=config, precision=precision)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses, None if routing is None else routing[0]


def expert_load(ids: Array, num_experts: int) -> Array:
    """Tokens that each expert got: int32 [L, M, K] -> float32 [L, E]."""
    return jax.vmap(lambda layer: jnp.bincount(layer.reshape(-1), length=num_experts))(ids).astype(
        jnp.float32
    )


def updated_router_bias(bias: Array, load: Array, rate: float) -> Array:
    """b += rate * sign(mean load - load), for every MoE layer by itself (paper section 2.1.2).

    Args:
        bias: float32 [L, E], `e_score_correction_bias`.
        load: float32 [L, E], tokens of the whole batch that each expert got.
        rate: the paper's gamma.
    """
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def make_train_step(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainStep:
    """The jitted `train_step(state, batch) -> state, metrics`; it takes over the state's memory.

    The batch is int32 [B, T + 1]. Metrics are scalars: `loss` in nats a token, and `imbalance`, the fullest
    expert's load over the mean (the worst layer's; 0 without MoE layers).
    """

    def loss_of(params: Params, batch: Array) -> tuple[Array, Array | None]:
        losses, ids = token_losses(params, batch, config=config, precision=TRAIN_PRECISION)
        return losses.mean(), ids

    def train_step(state: TrainState, batch: Array) -> tuple[TrainState, Metrics]:
        (loss, ids), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, batch)
        # The bias has no gradient and is not decayed, so that the optimizer leaves it alone.
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        imbalance = jnp.zeros(())
        if ids is not None:
            load = expert_load(ids, config.n_routed_experts)
            imbalance = (load.max(axis=-1) / load.mean(axis=-1)).max()
            params = _with_updated_bias(params, load)
        return TrainState(params, opt_state, state.step + 1), {"loss": loss, "imbalance": imbalance}

    return jax.jit(train_step, donate_argnums=0)


def _with_updated_bias(params: Params, load: Array) -> Params:
    gate = params["moe_layers"]["mlp"]["gate"]
    if "e_score_correction_bias" not in gate:
        return params
    gate = gate | {
        "e_score_correction_bias": updated_router_bias(
            gate["e_score_correction_bias"], load, ROUTER_BIAS_RATE
        )
    }
    layers = params["moe_layers"]
    return params | {"moe_layers": layers | {"mlp": layers["mlp"] | {"gate": gate}}}
