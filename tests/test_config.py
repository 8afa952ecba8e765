import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config import (
    BlockQuantization,
    ModelConfig,
    YarnScaling,
    config_names,
    configs_folder,
    named_config,
)
from dsv3_jax.errors import InputError


def released() -> dict[str, Any]:
    return json.loads((configs_folder() / "deepseek-v3.json").read_text())


def test_bundled_names() -> None:
    assert set(config_names()) == {
        "deepseek-r1",
        "deepseek-v2",
        "deepseek-v2-lite",
        "deepseek-v3",
        "deepseek-v3.1",
        "kimi-k2",
        "moonlight-16b-a3b",
        "tiny",
    }


def test_released_spelling() -> None:
    config = named_config("deepseek-v3.1")
    assert config.rope_scaling == YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.quantization_config == BlockQuantization((128, 128), "ue8m0")
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    assert config.num_nextn_predict_layers == 1
    assert config.num_moe_layers == 58


def test_spelling_of_transformers_5_is_the_same_config() -> None:
    hf = released()
    rope = hf.pop("rope_scaling")
    hf["rope_parameters"] = {"rope_theta": hf.pop("rope_theta"), "rope_type": rope.pop("type"), **rope}
    hf["num_mtp_layers"] = hf.pop("num_nextn_predict_layers")
    hf["dtype"] = hf.pop("torch_dtype")
    for field in ("scoring_func", "topk_method", "moe_layer_freq"):
        del hf[field]
    assert ModelConfig.from_dict(hf) == named_config("deepseek-v3")


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v2-lite"])
def test_v2_router_follows_from_its_model_type(name: str) -> None:
    hf = json.loads((configs_folder() / f"{name}.json").read_text())
    del hf["scoring_func"]
    if name == "deepseek-v2-lite":
        del hf["topk_method"], hf["n_group"], hf["topk_group"]
    assert ModelConfig.from_dict(hf) == named_config(name)


def test_default_rope_parameters_mean_no_scaling() -> None:
    hf = released() | {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50000}}
    config = ModelConfig.from_dict(hf)
    assert (config.rope_theta, config.rope_scaling) == (50000, None)


def test_list_of_eos_ids() -> None:
    assert ModelConfig.from_dict(released() | {"eos_token_id": [1, 7]}).eos_token_id == (1, 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("scoring_func", "tanh"),
        ("topk_method", "greedy"),
        ("topk_method", "random"),
        ("hidden_size", "7168"),
        ("hidden_size", 0),
        ("kv_lora_rank", None),
        ("n_routed_experts", None),
        ("n_group", 7),
        ("topk_group", 9),
        ("num_experts_per_tok", 200),
        ("first_k_dense_replace", 62),
        ("qk_rope_head_dim", 63),
        ("rms_norm_eps", 0),
        ("rope_theta", -1),
        ("eos_token_id", "stop"),
        ("torch_dtype", "int8"),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_scaling", {"type": "yarn", "factor": 40}),
        ("quantization_config", {"quant_method": "awq"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "x"}),
    ],
)
def test_unsupported_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^here/config\.json: {field}.*expected"):
        ModelConfig.from_dict(released() | {field: value}, "here/config.json")


def test_softmax_with_normalised_weights_is_refused() -> None:
    hf = json.loads((configs_folder() / "deepseek-v2.json").read_text()) | {"norm_topk_prob": True}
    with pytest.raises(InputError, match="norm_topk_prob"):
        ModelConfig.from_dict(hf)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_unreadable_file_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        ModelConfig.from_file(path)


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(InputError, match=r"no-such-model.*deepseek-v3"):
        named_config("no-such-model")


def test_config_can_be_a_static_argument() -> None:
    config = named_config("tiny")
    assert hash(config) == hash(dataclasses.replace(config))
