import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, named_config
from dsv3_jax.errors import InputError
from dsv3_jax.model import abstract_params, init_params
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import (
    Params,
    decode_hidden,
    decode_step,
    extend,
    head,
    prefill,
    prefill_hidden,
)
from dsv3_jax.precision import Precision

FLOAT32 = Precision(weights="float32", dtype="float32")


@pytest.fixture(scope="module")
def params(tiny_config: ModelConfig) -> Params:
    return init_params(tiny_config, FLOAT32, jax.random.key(1))


def tokens_of(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


def test_extending_a_cache_equals_reading_it_whole(tiny_config: ModelConfig, params: Params) -> None:
    static = {"config": tiny_config, "precision": FLOAT32}
    tokens = tokens_of(tiny_config, 2, 40)
    first, second = np.array([20, 7], np.int32), np.array([20, 11], np.int32)
    whole = [tokens[0], np.concatenate([tokens[1, :7], tokens[1, 20:31], np.zeros(22, np.int32)])]
    cache = init_cache(tiny_config, 2, 48, "float32")
    expected, _ = prefill(params, jnp.asarray(whole), jnp.asarray(first + second), cache, **static)
    _, cache = prefill(params, jnp.asarray(tokens[:, :20]), jnp.asarray(first), cache, **static)
    got, cache = extend(params, jnp.asarray(tokens[:, 20:]), jnp.asarray(second), cache, **static)
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=2e-5 * float(expected.std()))
    np.testing.assert_array_equal(np.asarray(cache.lengths), first + second)


def test_several_tokens_a_step_equal_one_at_a_time(tiny_config: ModelConfig, params: Params) -> None:
    static = {"config": tiny_config, "precision": FLOAT32}
    tokens = jnp.asarray(tokens_of(tiny_config, 2, 3))
    together, _ = decode_hidden(params, tokens, init_cache(tiny_config, 2, 16, "float32"), **static)
    cache = init_cache(tiny_config, 2, 16, "float32")
    for t in range(3):
        logits, cache = decode_step(params, tokens[:, t], cache, **static)
        expected = head(params, together[:, t], **static)
        np.testing.assert_allclose(np.asarray(logits), np.asarray(expected), atol=2e-5 * float(logits.std()))


def test_finished_rows_keep_their_cache(tiny_config: ModelConfig, params: Params) -> None:
    static = {"config": tiny_config, "precision": FLOAT32}
    cache = init_cache(tiny_config, 2, 16, "float32")
    tokens = jnp.asarray(tokens_of(tiny_config, 2, 4))
    _, cache = prefill(params, tokens, jnp.asarray([4, 4]), cache, **static)
    _, after = decode_step(params, tokens[:, 0], cache, jnp.asarray([True, False]), **static)
    np.testing.assert_array_equal(np.asarray(after.lengths), [5, 4])
    np.testing.assert_array_equal(np.asarray(after.entries[:, 1]), np.asarray(cache.entries[:, 1]))
    assert np.abs(np.asarray(after.entries[:, 0, 4])).max() > 0


def test_padding_does_not_reach_a_row(tiny_config: ModelConfig, params: Params) -> None:
    static = {"config": tiny_config, "precision": FLOAT32}
    tokens = tokens_of(tiny_config, 1, 16)
    other = tokens.copy()
    other[:, 9:] = 5
    hidden = [
        prefill_hidden(
            params, jnp.asarray(t), jnp.asarray([9]), init_cache(tiny_config, 1, 16, "float32"), **static
        )[0][:, :9]
        for t in (tokens, other)
    ]
    np.testing.assert_array_equal(np.asarray(hidden[0]), np.asarray(hidden[1]))


def test_bfloat16_stays_near_float32(tiny_config: ModelConfig, params: Params) -> None:
    tokens, lengths = jnp.asarray(tokens_of(tiny_config, 2, 12)), jnp.asarray([12, 12])
    results = []
    for dtype in ("float32", "bfloat16"):
        static = {"config": tiny_config, "precision": dataclasses.replace(FLOAT32, dtype=dtype)}
        results.append(prefill(params, tokens, lengths, init_cache(tiny_config, 2, 16, dtype), **static)[0])
    wide, narrow = (np.asarray(r, np.float64) for r in results)
    # 8 significant bits through three layers; a routing flip moves single rows by more.
    assert np.corrcoef(wide.ravel(), narrow.ravel())[0, 1] > 0.98


def test_tied_head_is_the_embedding(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    params = init_params(config, FLOAT32, jax.random.key(0))
    assert "lm_head" not in params
    untied = params | {"lm_head": params["embed_tokens"]}
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, config.hidden_size)), jnp.float32)
    tied = head(params, hidden, config=config, precision=FLOAT32)
    expected = head(untied, hidden, config=tiny_config, precision=FLOAT32)
    np.testing.assert_allclose(np.asarray(tied), np.asarray(expected), rtol=1e-5, atol=1e-5)


def test_capacity_beyond_the_context_is_refused(tiny_config: ModelConfig) -> None:
    with pytest.raises(InputError, match=r"257 tokens.*max_position_embeddings = 256"):
        init_cache(tiny_config, 1, 257, "float32")


def test_compiled_size_does_not_grow_with_depth(tiny_config: ModelConfig) -> None:
    def program(num_hidden_layers: int) -> str:
        config = dataclasses.replace(tiny_config, num_hidden_layers=num_hidden_layers)
        cache = jax.eval_shape(lambda: init_cache(config, 1, 16, "float32"))
        step = jax.jit(decode_step, static_argnames=("config", "precision"))
        token = jax.ShapeDtypeStruct((1,), jnp.int32)
        lowered = step.lower(
            abstract_params(config, "float32"), token, cache, config=config, precision=FLOAT32
        )
        return lowered.as_text()

    assert abs(len(program(40)) - len(program(4))) < 2000


@pytest.mark.parametrize(
    ("name", "billions"), [("deepseek-v3", 671.0), ("deepseek-v2", 235.7), ("kimi-k2", 1026.4)]
)
def test_published_parameter_counts(name: str, billions: float) -> None:
    config = dataclasses.replace(named_config(name), num_nextn_predict_layers=0)
    leaves = jax.tree.leaves(abstract_params(config, "bfloat16"))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) / 1e9 == pytest.approx(billions, abs=0.06)
