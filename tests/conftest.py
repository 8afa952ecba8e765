"""Fixtures that several parts of the suite share: a small config with all of V3, and a folder of it."""

import os
from pathlib import Path

import hypothesis
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.config import ModelConfig
from tests.tiny import write_tokenizer_files

if hasattr(plgpu, "InterpretGPUParams"):
    # An interpreted warpgroup that waits holds one of the CPU backend's threads, of which there is one a core.
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, 16)))

# Shrinking an example that has to be compiled anew at every step takes minutes and says little more.
hypothesis.settings.register_profile(
    "no shrinking",
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("no shrinking")


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """All of V3 in small: q LoRA, experts in groups, one dense layer, YaRN. 4 ids belong to no token."""
    return ModelConfig.from_dict(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 304,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "max_position_embeddings": 256,
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 64,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            # Wide enough that the next token of a random model depends on the ones before it.
            "initializer_range": 0.15,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        }
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """`tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of `tiny_checkpoint`."""
    return write_tokenizer_files(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_tokenizer_files: list[Path]
) -> Path:
    """A folder with `tiny_config`, random float32 weights, tokenizer, chat template. Not to be written to."""
    import jax

    from dsv3_jax.checkpoint import save_checkpoint
    from dsv3_jax.model import init_params
    from dsv3_jax.precision import Precision

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    params = init_params(tiny_config, Precision(weights="float32", dtype="float32"), jax.random.key(0))
    save_checkpoint(folder, tiny_config, params, tokenizer_files=tiny_tokenizer_files)
    return folder
