"""The small random checkpoints on which parity is shown, in the real formats, made without this project's code.

Weights come from the raw bits of a generator whose stream NumPy guarantees, so that a golden file needs none of them.
"""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 160,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 2,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint: its config, how its linears are stored, and the seed of its weights."""

    name: str
    config: dict[str, Any]
    storage: str
    seed: int


CASES = (
    Case("v3-fp8", V3 | {"quantization_config": FP8}, "F8_E4M3", 1),
    Case("v3-ue8m0", V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}, "F8_E4M3", 2),
    Case("v3-bf16-no-q-lora", V3 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, "BF16", 13),
    Case("v2-lite-greedy", V2 | {"q_lora_rank": None}, "BF16", 4),
    Case(
        "v2-group-limited",
        V2
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "torch_dtype": "float32",
        },
        "F32",
        5,
    ),
    Case(
        "moonlight-plain-rope",
        V3
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.446,
            "rope_scaling": None,
            "rope_theta": 50000.0,
            # Large, so that the norms whose eps it does not set show: they keep 1e-6.
            "rms_norm_eps": 1e-2,
        },
        "BF16",
        17,
    ),
    Case(
        "kimi-step-ramp-tied",
        V3
        | {
            "n_group": 1,
            "topk_group": 1,
            "rope_theta": 50000.0,
            "rope_scaling": YARN | {"factor": 32, "beta_fast": 1},
            "tie_word_embeddings": True,
        },
        "BF16",
        8,
    ),
    Case("v3-mtp", V3 | {"num_nextn_predict_layers": 1, "torch_dtype": "float16"}, "F16", 6),
)

KERNELS = Case(
    "v3-heads-of-128",
    V3
    | {
        "hidden_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "q_lora_rank": 136,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "quantization_config": FP8,
    },
    "F8_E4M3",
    21,
)
"""The smallest that all kernels take: they need heads as large as those of the real models."""

CASES = (*CASES, KERNELS)

QUANTISED = ("_proj.weight", "_proj_with_mqa.weight")
DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, from the table of the release (section 1 of its weight documentation)."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    qk = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    out = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], hidden)

    def mlp(prefix: str, width: int) -> None:
        out[f"{prefix}.gate_proj.weight"] = (width, hidden)
        out[f"{prefix}.up_proj.weight"] = (width, hidden)
        out[f"{prefix}.down_proj.weight"] = (hidden, width)

    main_layers = config["num_hidden_layers"]
    for i in range(main_layers + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        out[f"{layer}.input_layernorm.weight"] = (hidden,)
        out[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if q_rank is None:
            out[f"{attention}.q_proj.weight"] = (heads * qk, hidden)
        else:
            out[f"{attention}.q_a_proj.weight"] = (q_rank, hidden)
            out[f"{attention}.q_a_layernorm.weight"] = (q_rank,)
            out[f"{attention}.q_b_proj.weight"] = (heads * qk, q_rank)
        out[f"{attention}.kv_a_proj_with_mqa.weight"] = (rank + config["qk_rope_head_dim"], hidden)
        out[f"{attention}.kv_a_layernorm.weight"] = (rank,)
        kv_width = config["qk_nope_head_dim"] + config["v_head_dim"]
        out[f"{attention}.kv_b_proj.weight"] = (heads * kv_width, rank)
        out[f"{attention}.o_proj.weight"] = (hidden, heads * config["v_head_dim"])
        if i < config["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        out[f"{layer}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
        if config["topk_method"] == "noaux_tc":
            out[f"{layer}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        for e in range(config["n_routed_experts"]):
            mlp(f"{layer}.mlp.experts.{e}", config["moe_intermediate_size"])
        mlp(f"{layer}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
        if i >= main_layers:
            out[f"{layer}.enorm.weight"] = (hidden,)
            out[f"{layer}.hnorm.weight"] = (hidden,)
            out[f"{layer}.eh_proj.weight"] = (hidden, 2 * hidden)
            out[f"{layer}.shared_head.norm.weight"] = (hidden,)
    return out


def random_weights(case: Case) -> dict[str, np.ndarray]:
    """float32 weights before they are stored: norms near 1, the rest uniform with std 0.1 (bias 0.05)."""
    bits = np.random.PCG64(case.seed)
    weights = {}
    for name, shape in shapes(case.config).items():
        count = int(np.prod(shape))
        uniform = (bits.random_raw(count) >> np.uint64(40)).astype(np.float64) / 2**23 - 1
        values = (uniform * 0.1 * 3**0.5).astype(np.float32).reshape(shape)
        if "norm" in name:
            values = 1 + values
        elif name.endswith("e_score_correction_bias"):
            values = values / 2
        weights[name] = values
    return weights


def quantise(weight: np.ndarray, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] in blocks of 128 x 128: float8 values and float32 scales, edge blocks short."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    values = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            scale = np.float32(np.abs(weight[block]).max()) / np.float32(448)
            if ue8m0:
                mantissa, exponent = np.frexp(scale)
                scale = np.float32(np.ldexp(1.0, exponent - (mantissa == 0.5)))
            values[block] = np.clip(weight[block] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            scales[i, j] = scale
    return values, scales


def stored_tensors(case: Case) -> dict[str, np.ndarray]:
    """The checkpoint as the release stores it: linears in `case.storage`, bias float32, the rest BF16 if FP8."""
    tensors: dict[str, np.ndarray] = {}
    for name, weight in random_weights(case).items():
        is_linear = name.endswith(QUANTISED) and "eh_proj" not in name
        if case.storage == "F8_E4M3" and is_linear:
            ue8m0 = "scale_fmt" in case.config["quantization_config"]
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(weight, ue8m0)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = weight
        else:
            plain = "BF16" if case.storage == "F8_E4M3" else case.storage
            tensors[name] = weight.astype(DTYPES[plain])
    return tensors


def dequantised(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the stored tensors stand for, float32: FP8 value times its block's scale."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        values = tensor.astype(np.float32)
        if f"{name}_scale_inv" in tensors:
            scales = tensors[f"{name}_scale_inv"].repeat(128, 0).repeat(128, 1)
            values = values * scales[: values.shape[0], : values.shape[1]]
        out[name] = values
    return out


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Writes config.json and one model.safetensors (format: length, JSON header, bytes)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
    return folder


def prompts(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A batch of mixed lengths, most beyond YaRN's original context of 32: int32 [4, 80] and its lengths."""
    lengths = np.array([80, 67, 66, 1], np.int32)
    tokens = np.random.PCG64(case.seed + 100).random_raw(4 * 80) % np.uint64(case.config["vocab_size"] - 2)
    tokens = tokens.astype(np.int32).reshape(4, 80) + 2
    return np.where(np.arange(80) < lengths[:, None], tokens, 0).astype(np.int32), lengths
