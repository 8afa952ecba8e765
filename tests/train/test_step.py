import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import init_params
from dsv3_jax.model.functional import head, train_hidden
from dsv3_jax.model.rope import rope_table
from dsv3_jax.train.optimizer import make_optimizer
from dsv3_jax.train.step import (
    ROUTER_BIAS_RATE,
    TRAIN_PRECISION,
    TrainStep,
    expert_load,
    init_state,
    make_train_step,
    token_losses,
    updated_router_bias,
)

LOSSES = jax.jit(token_losses, static_argnames=("config", "precision"))
OPTIMIZER = make_optimizer(1e-2, 200)


@pytest.fixture(scope="module")
def config(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, initializer_range=0.05)


@pytest.fixture(scope="module")
def train_step(config: ModelConfig) -> TrainStep:
    return make_train_step(config, OPTIMIZER)


@pytest.fixture(scope="module")
def batch() -> jax.Array:
    return (
        jnp.tile(jnp.arange(17, dtype=jnp.int32) * 7 % 304, (4, 1)) + jnp.arange(4, dtype=jnp.int32)[:, None]
    )


def test_bias_rises_where_load_is_below_the_mean_and_falls_above() -> None:
    load = jnp.array([[1.0, 2, 3, 2], [0, 0, 0, 8], [2, 2, 2, 2]])
    bias = jnp.array([[0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], [1, 2, 3, 4]])
    expected = [[0.6, 0.5, 0.4, 0.5], [0.1, 0.1, 0.1, -0.1], [1, 2, 3, 4]]
    np.testing.assert_allclose(updated_router_bias(bias, load, 0.1), expected, rtol=1e-6)


def test_load_counts_every_choice_of_every_layer() -> None:
    ids = jnp.array([[[0, 1], [0, 3]], [[2, 1], [2, 1]]], jnp.int32)
    np.testing.assert_array_equal(expert_load(ids, 4), [[2, 1, 0, 1], [0, 2, 2, 0]])


def test_losses_are_those_of_the_plain_model(config: ModelConfig, batch: jax.Array) -> None:
    params = init_params(config, TRAIN_PRECISION, jax.random.key(0))
    losses, ids = LOSSES(params, batch, config=config, precision=TRAIN_PRECISION)
    hidden, routing = train_hidden(
        params, batch[:, :-1], jnp.asarray(rope_table(config, 16)), config=config, precision=TRAIN_PRECISION
    )
    logits = np.asarray(head(params, hidden, config=config, precision=TRAIN_PRECISION), np.float64)
    log_total = np.log(np.exp(logits).sum(axis=-1))
    expected = log_total - np.take_along_axis(logits, np.asarray(batch)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert routing is not None
    np.testing.assert_array_equal(ids, routing[0])


def test_a_step_moves_the_bias_by_its_rule_alone(
    config: ModelConfig, batch: jax.Array, train_step: TrainStep
) -> None:
    params = init_params(config, TRAIN_PRECISION, jax.random.key(0))
    _, ids = LOSSES(params, batch, config=config, precision=TRAIN_PRECISION)
    assert ids is not None
    load = np.asarray(expert_load(ids, config.n_routed_experts))
    state, metrics = train_step(init_state(params, OPTIMIZER), batch)
    bias = state.params["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"]
    np.testing.assert_allclose(
        bias, ROUTER_BIAS_RATE * np.sign(load.mean(axis=1, keepdims=True) - load), rtol=1e-6
    )
    assert metrics["imbalance"] == pytest.approx((load.max(axis=1) / load.mean(axis=1)).max())
    assert int(state.step) == 1


def test_a_few_steps_learn_a_batch_by_heart(
    config: ModelConfig, batch: jax.Array, train_step: TrainStep
) -> None:
    state = init_state(init_params(config, TRAIN_PRECISION, jax.random.key(0)), OPTIMIZER)
    losses = []
    for _ in range(40):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(304), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]
    assert all(np.isfinite(losses))
