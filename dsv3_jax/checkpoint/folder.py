"""A checkpoint folder as Hugging Face lays it out: `config.json`, safetensors files, maybe an index."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv3_jax.checkpoint.safetensors_file import TensorInfo, read_header
from dsv3_jax.config import ModelConfig, read_json_object
from dsv3_jax.errors import InputError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_HEADER_THREADS = 8  # reading 163 headers from a network file system is latency


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which only the headers have been read.

    Attributes:
        folder: where it lies.
        config: its `config.json`, with `num_nextn_predict_layers` as announced there.
        tensors: name -> where the tensor lies, for every tensor of every file.
        misplaced: name -> file of tensors that the index promises in a file which does not hold them.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    misplaced: dict[str, str]

    def files(self) -> list[Path]:
        """The safetensors files that hold tensors, sorted."""
        return sorted({info.path for info in self.tensors.values()})


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads config, index and the headers of all files.

    Raises:
        InputError: not a checkpoint folder, a config that is not supported, a file that is missing, truncated
            or corrupt. The file is named. Whether the tensors are those of the model is not looked at (see
            `verify`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a checkpoint folder")
    if not (folder / CONFIG_FILE).exists():
        raise InputError(f"{folder}: not a checkpoint folder: it has no {CONFIG_FILE}")
    config = ModelConfig.from_file(folder / CONFIG_FILE)
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"{folder / missing[0]}: shard file is missing; {INDEX_FILE} names it"
            + (f" ({len(missing)} of {len(names)} are missing)" if len(missing) > 1 else ""),
            tuple(missing) if len(missing) > 1 else (),
        )
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        headers = dict(zip(names, pool.map(lambda name: read_header(folder / name), names), strict=True))
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    misplaced = {}
    for name, file in (weight_map or {}).items():
        if name in headers[file]:
            tensors[name] = headers[file][name]
        else:
            misplaced[name] = file
            tensors.pop(name, None)
    return Checkpoint(folder, config, tensors, misplaced)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index's tensor -> file, or None for a single-file checkpoint."""
    path = folder / INDEX_FILE
    if not path.exists():
        if not (folder / SINGLE_FILE).exists():
            raise InputError(
                f"{folder}: not a checkpoint folder: it has neither {INDEX_FILE} nor {SINGLE_FILE}"
            )
        return None
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing or empty; expected tensor names and their files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise InputError(
                f"{path}: weight_map[{name!r}] is {file!r}; expected a file name in the same folder"
            )
    return weight_map
