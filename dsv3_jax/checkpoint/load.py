"""Import: the tensors of a checkpoint straight into (sharded) JAX arrays, each byte read once.

A leaf of params is allocated once, stacked, and every tensor's bytes are read into its slot. On a CPU that
memory becomes the JAX array as it is, so all leaves are filled together, in the order of the files. For an
accelerator the memory of one linear at a time is filled, handed over and freed.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from dsv3_jax.checkpoint.folder import Checkpoint
from dsv3_jax.checkpoint.names import ExpectedTensor, expected_tensors
from dsv3_jax.checkpoint.reading import Job, in_file_order
from dsv3_jax.checkpoint.regions import Region, leaf_array, leaf_regions, slots_of
from dsv3_jax.checkpoint.safetensors_file import DTYPES, OpenFiles
from dsv3_jax.checkpoint.verify import verify
from dsv3_jax.checkpoint.workers import progress_bar, run
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.model import abstract_params
from dsv3_jax.precision import WeightFormat

LeafPath = tuple[str, ...]
Leaves = dict[LeafPath, jax.ShapeDtypeStruct]
Regions = dict[LeafPath, list[Region]]
Groups = dict[tuple[LeafPath, ...], list[Job]]

_logger = logging.getLogger(__name__)


def stored_format(checkpoint: Checkpoint) -> WeightFormat:
    """The format of a checkpoint's linears, which `weights="stored"` keeps.

    "float8" where config.json has a `quantization_config`, else the narrowest type that holds all of them
    exactly.
    """
    if checkpoint.config.quantization_config is not None:
        return "float8"
    linears = [tensor.name for tensor in expected_tensors(checkpoint.config).values() if tensor.linear]
    stored = {checkpoint.tensors[name].dtype for name in linears if name in checkpoint.tensors}
    formats: dict[str, WeightFormat] = {"BF16": "bfloat16", "F16": "float16"}
    return formats.get(stored.pop(), "float32") if len(stored) == 1 else "float32"


def load_params(
    checkpoint: Checkpoint,
    weights: Literal["stored", "float32", "bfloat16", "float8"],
    *,
    shardings: Mapping[str, Any] | None = None,
    mtp: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint into the nested dict of arrays that the model takes.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        weights: format of the result, as in `dsv3_jax.model.abstract_params`. FP8 becomes float32 or bfloat16
            as value * scale; anything else becomes "float8" by `fp8.quantize`. "stored" keeps each leaf's own
            dtype (the widest in a stack). `e_score_correction_bias` is float32 always.
        shardings: nested dict like the result, with a `jax.sharding.Sharding` or None at each leaf; None puts
            the leaf on the default device. A process reads what its own devices hold, once, however many of
            them hold it.
        mtp: read the multi-token prediction modules too.
        progress: called with the number of bytes just read, never by two threads at once. None: a bar on
            stderr with bytes and time left, if that is a terminal.

    Returns:
        Arrays in the tree of `dsv3_jax.model.abstract_params`; `mtp_layers` only where `mtp`.

    Raises:
        InputError: the tensors are not those of the model (the details list all of them), a file is truncated
            or corrupt, FP8 data holds NaN, or the files lack the MTP modules that `mtp` asks for.
        ValueError: `shardings` is not a tree like the result.
    """
    config = _config_to_read(checkpoint, mtp)
    tensors = list(expected_tensors(config).values())
    target = abstract_params(config, stored_format(checkpoint) if weights == "stored" else weights)
    leaves: Leaves = {_path(keys): leaf for keys, leaf in jax.tree.leaves_with_path(target)}
    if weights == "stored":
        _keep_stored_dtypes(checkpoint, tensors, leaves)
    chosen = {path: _sharding_of(shardings, path) for path in leaves}
    regions = {path: leaf_regions(leaf, chosen[path]) for path, leaf in leaves.items()}
    groups = _jobs_by_linear(checkpoint, tensors, regions)
    if all(_on_cpu(sharding) for sharding in chosen.values()):
        groups = {tuple(leaves): [job for jobs in groups.values() for job in jobs]}
    total = sum(job.nbytes() for jobs in groups.values() for job in jobs)
    shown = progress_bar("loading", total) if progress is None else contextlib.nullcontext(progress)
    arrays: dict[LeafPath, jax.Array] = {}
    with OpenFiles() as files, shown as report:
        for paths in list(groups):
            for path in paths:
                for region in regions[path]:
                    region.allocate()
            run(in_file_order(groups.pop(paths), files), report)
            filled = {path: leaf_array(leaves[path], chosen[path], regions.pop(path)) for path in paths}
            # On an accelerator, the host memory of this group is free once its arrays are there.
            arrays |= jax.block_until_ready(filled)
    return jax.tree.map_with_path(lambda keys, _: arrays[_path(keys)], target)


def _config_to_read(checkpoint: Checkpoint, mtp: bool) -> ModelConfig:
    """The verified config, with the MTP modules only if they are wanted."""
    config = verify(checkpoint)
    if mtp and not config.num_nextn_predict_layers:
        raise InputError(
            f"{checkpoint.folder}: no MTP module; expected model.layers.{config.num_hidden_layers}.*"
        )
    if config.num_nextn_predict_layers < checkpoint.config.num_nextn_predict_layers:
        _logger.warning("%s: loaded without the MTP modules that config.json announces", checkpoint.folder)
    return config if mtp else dataclasses.replace(config, num_nextn_predict_layers=0)


def _jobs_by_linear(checkpoint: Checkpoint, tensors: list[ExpectedTensor], regions: Regions) -> Groups:
    """All jobs, grouped by the leaves that they fill: one leaf, or an FP8 weight and its scales."""
    groups: Groups = {}
    for tensor in tensors:
        scale = tensor.scale() if tensor.linear else None
        info, slots = checkpoint.tensors[tensor.name], slots_of(tensor, regions[tensor.path])
        scale_info = checkpoint.tensors[scale.name] if scale and info.dtype == "F8_E4M3" else None
        if scale is None or scale.path not in regions:
            groups.setdefault((tensor.path,), []).append(Job(info, slots, scale_info))
            continue
        scale_slots = slots_of(scale, regions[scale.path])
        if scale_info is None:
            jobs = [Job(info, slots, scale_slots=scale_slots)]
        else:
            jobs = [Job(info, slots), Job(scale_info, scale_slots)]
        groups.setdefault((tensor.path, scale.path), []).extend(jobs)
    return groups


def _keep_stored_dtypes(checkpoint: Checkpoint, tensors: list[ExpectedTensor], leaves: Leaves) -> None:
    """Gives every leaf the widest dtype of its tensors in the files."""
    stored: dict[LeafPath, set[np.dtype]] = {}
    for tensor in tensors:
        if tensor.path[-1] != "e_score_correction_bias":
            stored.setdefault(tensor.path, set()).add(DTYPES[checkpoint.tensors[tensor.name].dtype])
    for path, dtypes in stored.items():
        leaves[path] = jax.ShapeDtypeStruct(leaves[path].shape, jnp.result_type(*dtypes))


def _path(keys: tuple[Any, ...]) -> LeafPath:
    return tuple(key.key for key in keys)


def _sharding_of(shardings: Mapping[str, Any] | None, path: LeafPath) -> Sharding | None:
    if shardings is None:
        return None
    node: Any = shardings
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            raise ValueError(f"shardings has no leaf {'.'.join(path)}; expected the tree of the parameters")
        node = node[key]
    return node


def _on_cpu(sharding: Sharding | None) -> bool:
    devices = jax.devices()[:1] if sharding is None else sharding.addressable_devices
    return all(device.platform == "cpu" for device in devices)
