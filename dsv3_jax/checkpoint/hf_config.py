"""The JSON files of the folders that we write, in the spelling of the release, which all engines read."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.safetensors_file import SCRATCH_SUFFIX
from dsv3_jax.config import BlockQuantization, ModelConfig
from dsv3_jax.errors import InputError

_ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM"}  # all later ones are DeepseekV3ForCausalLM


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """The JSON object of a config; `ModelConfig.from_dict` gives the same config back."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["architectures"] = [_ARCHITECTURES.get(config.model_type, "DeepseekV3ForCausalLM")]
    fields["attention_bias"] = False
    fields["hidden_act"] = "silu"
    fields["moe_layer_freq"] = 1
    fields["num_key_value_heads"] = config.num_attention_heads
    ids = list(config.eos_token_id)
    fields["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    del fields["quantization_config"]
    if config.quantization_config is not None:
        fields["quantization_config"] = quantization_fields(config.quantization_config)
    return dict(sorted(fields.items()))


def quantization_fields(quantization: BlockQuantization) -> dict[str, Any]:
    """The `quantization_config` object of an FP8 checkpoint."""
    fields: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(quantization.weight_block_size),
    }
    if quantization.scale_fmt is not None:
        fields["scale_fmt"] = quantization.scale_fmt
    return fields


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file so that it is there whole or not at all. Raises InputError where that fails."""
    scratch = path.with_name(path.name + SCRATCH_SUFFIX)
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write_index(path: Path, sizes: dict[str, tuple[str, int]]) -> None:
    """Writes `model.safetensors.index.json`.

    Args:
        sizes: tensor name -> (file name, bytes of data).
    """
    total = sum(nbytes for _, nbytes in sizes.values())
    weight_map = {name: file for name, (file, _) in sorted(sizes.items())}
    write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map})
