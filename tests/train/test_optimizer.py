import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.train.optimizer import WARM_UP_STEPS, learning_rate_at, make_optimizer


def test_schedule_warms_up_stays_and_decays_to_nothing() -> None:
    rates = np.array([learning_rate_at(step, peak=2.0, num_steps=1000) for step in range(1000)])
    assert rates[0] == pytest.approx(2 / WARM_UP_STEPS)
    assert (rates[WARM_UP_STEPS - 1 : 500] == 2).all()
    assert (np.diff(rates[500:]) < 0).all()
    assert rates[-1] == pytest.approx(2 / 500)


def test_until_the_decay_the_schedule_does_not_know_the_end() -> None:
    for step in (0, 50, 100, 499):
        short, long = (learning_rate_at(step, peak=1.0, num_steps=total) for total in (1000, 5000))
        assert short == long


def test_only_matrices_decay_and_the_router_bias_stays() -> None:
    params = {
        "norm": {"weight": jnp.ones(4)},
        "layers": {
            "input_layernorm": {"weight": jnp.ones((2, 4))},
            "mlp": {"gate": {"weight": jnp.ones((2, 4)), "e_score_correction_bias": jnp.ones((2, 4))}},
        },
    }
    optimizer = make_optimizer(1.0, 1000)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    changed = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if leaf.any()
    }
    assert changed == {"['layers']['mlp']['gate']['weight']"}
