import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import init_params
from dsv3_jax.train.evaluate import bits_per_byte, xz_bits_per_byte
from dsv3_jax.train.step import TRAIN_PRECISION, token_losses

LOSSES = jax.jit(token_losses, static_argnames=("config", "precision"))


@pytest.mark.parametrize("length, context", [(32, 0), (64, 32)])
def test_every_token_is_counted_once(tiny_config: ModelConfig, length: int, context: int) -> None:
    # Zero logits: every token costs log2 of the vocabulary, whatever it is.
    params = init_params(tiny_config, TRAIN_PRECISION, jax.random.key(0))
    params["lm_head"]["weight"] = jnp.zeros_like(params["lm_head"]["weight"])
    stream = np.arange(202, dtype=np.int32)
    bits = bits_per_byte(
        params, stream, 1000, length=length, context=context, config=tiny_config, precision=TRAIN_PRECISION
    )
    assert bits == pytest.approx(201 * np.log2(tiny_config.vocab_size) / 1000, rel=1e-5)


def test_windows_give_the_context_that_was_asked_for(tiny_config: ModelConfig) -> None:
    params = init_params(tiny_config, TRAIN_PRECISION, jax.random.key(1))
    stream = np.random.default_rng(0).integers(0, 300, 25).astype(np.int32)

    def nats(start: int, stop: int, counted_from: int) -> float:
        window = jnp.asarray(stream[None, start:stop])
        losses, _ = LOSSES(params, window, config=tiny_config, precision=TRAIN_PRECISION)
        return float(losses[0, counted_from:].sum())

    # 24 predictions: 0 ... 15, then 16 ... 23 after 8 of context.
    expected = (nats(0, 17, 0) + nats(8, 25, 8)) / np.log(2) / 100
    bits = bits_per_byte(
        params, stream, 100, length=16, context=8, config=tiny_config, precision=TRAIN_PRECISION
    )
    assert bits == pytest.approx(expected, rel=1e-5)


def test_xz_is_that_of_the_command() -> None:
    data = b"some text, some more text; " * 40
    # `printf 'some text, some more text; %.0s' $(seq 40) | xz -9 | wc -c`
    assert xz_bits_per_byte(data) == 8 * 96 / len(data)
