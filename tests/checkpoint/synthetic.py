"""Small checkpoint folders with edge blocks, written and read by the `safetensors` package."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from dsv3_jax.checkpoint.names import ExpectedTensor, expected_tensors
from dsv3_jax.config import ModelConfig

NUMPY_TYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
FIELDS: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 160,
    "intermediate_size": 264,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 144,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "max_position_embeddings": 128,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def fields_of(stored: str) -> dict[str, Any]:
    """`config.json` of a checkpoint whose linears are of a safetensors dtype."""
    if stored == "F8_E4M3":
        return FIELDS | {"quantization_config": QUANTIZATION}
    return FIELDS | {"torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[stored]}


def random_tensors(stored: str, fields: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Random tensors by Hugging Face's name. FP8: all finite codes, float32 scales, the rest BF16."""
    config = ModelConfig.from_dict(fields or fields_of(stored))
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for tensor in expected_tensors(config).values():
        if tensor.linear and stored == "F8_E4M3":
            codes = rng.integers(0, 255, tensor.shape, np.uint8)
            tensors[tensor.name] = np.where(codes == 0x7F, 0, codes).view(ml_dtypes.float8_e4m3fn)
            blocks = tuple(-(-size // 128) for size in tensor.shape)
            tensors[tensor.name + "_scale_inv"] = rng.uniform(1e-4, 1e-3, blocks).astype(np.float32)
        else:
            tensors[tensor.name] = rng.normal(size=tensor.shape).astype(_dtype(tensor, stored))
    return tensors


def _dtype(tensor: ExpectedTensor, stored: str) -> np.dtype:
    if tensor.name.endswith("e_score_correction_bias"):
        return np.dtype(np.float32)
    return NUMPY_TYPES["BF16" if stored == "F8_E4M3" else stored]


def write_folder(
    folder: Path, tensors: dict[str, np.ndarray], fields: dict[str, Any], *, shards: int = 1
) -> Path:
    """Writes a checkpoint folder. Of more than one shard, tensor i lies in shard i modulo `shards`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder; where there is an index, checks that it names every tensor's file."""
    tensors, found = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            dtype = NUMPY_TYPES[entry["dtype"]]
            tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
            found[name] = path.name
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == found
    return tensors


def dequantized(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor's values in float32, by the definition: value * scale of its block."""
    values = tensors[name].astype(np.float32)
    if name + "_scale_inv" not in tensors:
        return values
    scale = np.repeat(np.repeat(tensors[name + "_scale_inv"], 128, axis=0), 128, axis=1)
    return values * scale[: values.shape[0], : values.shape[1]]


def same_bits(left: Any, right: Any) -> bool:
    """Whether two arrays have the same dtype, shape and bytes."""
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
