"""Export: params to a checkpoint folder in Hugging Face's layout."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.checkpoint.folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from dsv3_jax.checkpoint.hf_config import config_fields, write_index, write_json
from dsv3_jax.checkpoint.names import expected_tensors
from dsv3_jax.checkpoint.safetensors_file import SafetensorsWriter, dtype_name
from dsv3_jax.config import BlockQuantization, ModelConfig
from dsv3_jax.errors import InputError

MAX_SHARD_BYTES = 5_000_000_000  # transformers' default is 50 GB; the releases have 4.3 GB


class _Tensor(NamedTuple):
    """One tensor to be written: entry `index` of a leaf."""

    name: str
    leaf: Any
    index: tuple[int, ...]

    def spec(self) -> tuple[str, tuple[int, ...]]:
        return dtype_name(self.leaf.dtype), tuple(self.leaf.shape[len(self.index) :])

    def nbytes(self) -> int:
        return int(np.prod(self.spec()[1], dtype=np.int64)) * self.leaf.dtype.itemsize


def save_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_files: Sequence[str | Path] = (),
) -> None:
    """Writes params as a checkpoint folder that transformers and vLLM load; files of the same names are
    replaced.

    Args:
        folder: made if it does not exist (its parent must).
        config: the model's. What it says of quantisation, dtype and MTP modules gives way to what `params`
            holds; of its `quantization_config` only `scale_fmt` is kept.
        params: nested dict of arrays as `load_params` returns it, in any of its formats.
        tokenizer_files: copied into the folder under their own names.

    Raises:
        InputError: the folder cannot be written, or `params` lacks a leaf that the config asks for.
    """
    folder = Path(folder)
    config = _config_of_params(config, params)
    shards = _shards(list(_tensors(config, params)))
    try:
        folder.mkdir(exist_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        for source in map(Path, tokenizer_files):
            shutil.copyfile(source, folder / source.name)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: cannot be written or read ({error.strerror})"
        ) from error
    write_json(folder / CONFIG_FILE, config_fields(config))
    sizes: dict[str, tuple[str, int]] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors" if len(shards) > 1 else SINGLE_FILE
        with SafetensorsWriter(folder / file, {tensor.name: tensor.spec() for tensor in shard}) as writer:
            for tensor in shard:
                writer.write(tensor.name, np.asarray(tensor.leaf[tensor.index]))
                sizes[tensor.name] = (file, tensor.nbytes())
    if len(shards) > 1:
        write_index(folder / INDEX_FILE, sizes)


def _config_of_params(config: ModelConfig, params: Mapping[str, Any]) -> ModelConfig:
    """The config of what is written."""
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    quantized = "float8_e4m3fn" in dtypes
    scale_fmt = config.quantization_config.scale_fmt if config.quantization_config else None
    return dataclasses.replace(
        config,
        quantization_config=BlockQuantization(scale_fmt=scale_fmt) if quantized else None,
        torch_dtype=params["embed_tokens"]["weight"].dtype.name,
        num_nextn_predict_layers=config.num_nextn_predict_layers if "mtp_layers" in params else 0,
    )


def _tensors(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[_Tensor]:
    for tensor in expected_tensors(config).values():
        yield _Tensor(tensor.name, _leaf(params, tensor.path), tensor.index)
        if tensor.linear and config.quantization_config is not None:
            scale = tensor.scale()
            yield _Tensor(scale.name, _leaf(params, scale.path), scale.index)


def _leaf(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = params
    for key in path:
        if key not in node:
            raise InputError(f"params has no {'.'.join(path)}; the config asks for it")
        node = node[key]
    return node


def _shards(tensors: list[_Tensor]) -> list[list[_Tensor]]:
    """Consecutive tensors in files of at most MAX_SHARD_BYTES."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes() > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes()
    return shards
