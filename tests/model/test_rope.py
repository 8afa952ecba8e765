import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import named_config
from dsv3_jax.model.rope import inverse_frequencies, rope_table, softmax_scale, yarn_mscale
from pallas_kernels.rotary import rotate


def test_published_numbers_of_yarn() -> None:
    v3, lite = named_config("deepseek-v3"), named_config("deepseek-v2-lite")
    assert yarn_mscale(40, 1.0) == pytest.approx(1.3688879, rel=1e-7)
    assert softmax_scale(v3) == pytest.approx(0.13523378, rel=1e-7)
    assert softmax_scale(lite) == pytest.approx(0.11472139, rel=1e-7)
    assert softmax_scale(named_config("moonlight-16b-a3b")) == pytest.approx(192**-0.5)


def test_ramp_of_v3_leaves_high_frequencies_and_divides_low_ones() -> None:
    config = named_config("deepseek-v3")
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    divisor = plain / inverse_frequencies(config)
    np.testing.assert_allclose(divisor[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(divisor[23:], 40, rtol=1e-6)
    assert divisor[16] == pytest.approx(1.818, abs=1e-3)
    np.testing.assert_allclose(plain, 10000.0 ** (-np.arange(32) / 32), rtol=1e-6)


def test_ramp_of_kimi_k2_is_a_step() -> None:
    config = named_config("kimi-k2")
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    divisor = plain / inverse_frequencies(config)
    np.testing.assert_allclose(divisor[:20], 1, rtol=1e-6)
    np.testing.assert_allclose(divisor[20:], 32, rtol=1e-6)


def test_table_is_accurate_at_the_end_of_the_context() -> None:
    config = named_config("deepseek-v3")
    table = rope_table(config, config.max_position_embeddings)
    position = config.max_position_embeddings - 1
    angles = (np.float32(position) * inverse_frequencies(config)).astype(np.float64)
    np.testing.assert_allclose(table[position], np.concatenate([np.cos(angles), np.sin(angles)]), atol=6e-8)
    np.testing.assert_allclose(table[0], np.repeat([1.0, 0.0], 32))


def test_rotation_is_of_complex_numbers() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    angle = rng.standard_normal((3, 4)).astype(np.float32)
    turned = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * angle)
    out = rotate(jnp.asarray(x), jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)], -1)))
    np.testing.assert_allclose(np.asarray(out), np.concatenate([turned.real, turned.imag], -1), atol=1e-6)
