"""Run by test_tensor_parallel.py in a process with four simulated devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import named_config
from dsv3_jax.model import init_params
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import decode_step, prefill
from dsv3_jax.model.tensor_parallel import tensor_parallel, tensor_shardings
from dsv3_jax.precision import Precision

CONFIG = dataclasses.replace(
    named_config("deepseek-v3"),
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=8,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    num_nextn_predict_layers=0,
)
PRECISION = Precision(weights="float32", dtype="float32")
TOLERANCE = 2e-5
"""Of the logits' standard deviation: sums of four parts in another order."""


def check() -> None:
    """Logits of prompts and of two decode steps, cut over four devices and on one."""
    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    params = init_params(CONFIG, PRECISION, jax.random.key(1))
    # Random scores are too close to one another for a choice of experts that rounding leaves alone.
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, params)
    sharded = jax.device_put(params, tensor_shardings(mesh, CONFIG, PRECISION))
    tokens = jax.random.randint(jax.random.key(2), (3, 9), 0, CONFIG.vocab_size)
    lengths = jnp.array([9, 4, 1])

    def run(params: dict, prefill_step, step) -> list[jax.Array]:
        cache = init_cache(CONFIG, 3, 128, "float32")
        logits, cache = jax.jit(prefill_step)(params, tokens, lengths, cache)
        results = [logits]
        for i in range(2):
            logits, cache = jax.jit(step)(params, tokens[:, i], cache)
            results.append(logits)
        return results

    cut = run(sharded, *(tensor_parallel(step, mesh, CONFIG, PRECISION) for step in (prefill, decode_step)))
    fixed = {"config": CONFIG, "precision": PRECISION}
    whole = run(params, *(functools.partial(step, **fixed) for step in (prefill, decode_step)))
    for ours, expected in zip(cut, whole, strict=True):
        assert ours.sharding.num_devices == 4
        deviation = float(jnp.max(jnp.abs(jax.device_get(ours) - expected)))
        assert deviation < TOLERANCE * float(jnp.std(expected)), deviation


if __name__ == "__main__":
    check()
