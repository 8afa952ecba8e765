"""Whole models on the GPU at hand: `python -m benchmarks.gpu_generate`.

The bundled `tiny` continues a prompt with the kernels and without, in bfloat16 (it prints how many tokens agree), and a
random model of DeepSeek-V2-Lite's shape (16 B parameters, FP8) generates greedily at batch 1, 8 and 64: milliseconds a
step, and the share of the chip's peak bandwidth that its weights and cache alone make up.
"""

import functools
import math
import sys
import time

import jax
import jax.numpy as jnp

import dsv3_jax
from benchmarks.gpu_kernels import gpu_at_hand, random_array
from dsv3_jax.aot import GpuModel
from dsv3_jax.config import ModelConfig, named_config
from dsv3_jax.generate.sampling import SamplingParams
from dsv3_jax.model import abstract_params
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import decode_step
from dsv3_jax.precision import Precision

PROMPT = "def fibonacci(n):"
STEPS = 64
CONTEXT = 1024


def generate_tiny() -> None:
    """Greedy tokens of `tiny`, by the kernels (where they take its shapes) and by plain XLA."""
    tokens = []
    for implementation in (None, "reference"):
        model = dsv3_jax.load(implementation=implementation)
        sampling = SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
        assert model.tokenizer is not None
        tokens.append(model.engine.generate([model.tokenizer.encode(PROMPT)], sampling)[0].token_ids)
    same = sum(a == b for a, b in zip(*tokens, strict=True))
    print(f"tiny: {same} of {STEPS} greedy tokens are those of plain XLA")


def bytes_of_a_step(config: ModelConfig, params: dict, batch: int) -> float:
    """Weights that a step of `batch` tokens touches under uniform routing, and its cache."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    experts = sum(leaf.nbytes for leaf in jax.tree.leaves(params["moe_layers"]["mlp"]["experts"]))
    missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    embedding = params["embed_tokens"]["weight"].nbytes
    cache = batch * CONTEXT * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    return total - embedding - experts * missed + cache


def decode_lite(gpu: GpuModel) -> None:
    """Steps of a random model of V2-Lite's shape at a full context."""
    config, precision = named_config("deepseek-v2-lite"), Precision(weights="float8")
    params = jax.tree.map(random_array, abstract_params(config, "float8"))
    step = jax.jit(functools.partial(decode_step, config=config, precision=precision), donate_argnums=2)
    for batch in (1, 8, 64):
        cache = init_cache(config, batch, CONTEXT + 2 * STEPS, "bfloat16")
        cache = type(cache)(cache.entries, jnp.full(batch, CONTEXT, jnp.int32), cache.rope)
        tokens = jnp.arange(batch, dtype=jnp.int32)
        start = math.nan
        for i in range(2 * STEPS):
            if i == STEPS:
                jax.block_until_ready(tokens)
                start = time.perf_counter()
            logits, cache = step(params, tokens, cache)
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        jax.block_until_ready(tokens)
        seconds = (time.perf_counter() - start) / STEPS
        share = bytes_of_a_step(config, params, batch) / seconds / gpu.hbm_bytes_per_s
        print(
            f"V2-Lite, batch {batch}: {seconds * 1e3:.2f} ms a step, {batch / seconds:.0f} tokens/s, "
            f"{share:.0%} of the bandwidth"
        )


def main() -> int:
    _, gpu = gpu_at_hand()
    print(f"{gpu.kind}, jax {jax.__version__}")
    generate_tiny()
    decode_lite(gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
