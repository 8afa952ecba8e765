"""The model over devices that share every layer: heads, widths and vocabulary are cut by the rules of `sharding`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import Cache
from dsv3_jax.model.transformer import abstract_params
from dsv3_jax.precision import Precision
from sharding import TENSOR, partition_spec, tree_shardings

Step = Callable[..., tuple[Array, Cache]]
"""`prefill`, `extend` or `decode_step`: (params, arrays ..., cache, config=, precision=) -> (logits, cache)."""


def tensor_parallel(step: Step, mesh: Mesh, config: ModelConfig, precision: Precision) -> Step:
    """`step` under `shard_map` over the mesh's axis `tensor`: two all-reduces a layer, one gather of the embedding.

    Every device routes all tokens and holds a slice of each expert; the cache is whole on every device.

    Args:
        step: a function of `dsv3_jax.model.functional` that returns logits and cache.
        mesh: its axes other than `tensor` see copies.

    Returns:
        A function of the same arrays, without config and precision. The parameters lie as `tensor_shardings` says;
        the vocabulary of the logits is cut.

    Raises:
        ValueError: a matrix does not divide; see `tensor_shardings`.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, tensor_shardings(mesh, config, precision))
    local = functools.partial(step, config=config, precision=precision)

    def run(params: dict, *arrays: Any) -> tuple[Array, Cache]:
        # check_vma: Pallas calls do not say over which axes their results vary.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, *[P()] * len(arrays)),
            out_specs=(P(None, TENSOR), P()),
            check_vma=False,
        )(params, *arrays)

    return run


def tensor_shardings(mesh: Mesh | AbstractMesh, config: ModelConfig, precision: Precision) -> dict:
    """Where `tensor_parallel` wants the parameters: a nested dict of `NamedSharding`s.

    Raises:
        ValueError: the heads or a matrix do not divide by the mesh's `tensor` (into whole blocks of 128, where it has
            scales), or the head is tied to the embedding.
    """
    size = mesh.shape[TENSOR]
    if config.tie_word_embeddings:
        raise ValueError("tensor_parallel: expected tie_word_embeddings false; a tied head cannot be cut")
    if config.num_attention_heads % size:
        raise ValueError(
            f"tensor_parallel: num_attention_heads = {config.num_attention_heads} does not divide by tensor = {size}"
        )
    params = abstract_params(config, precision.weights)
    shardings = tree_shardings(params, mesh)
    _check_cut(params, shardings, size, "")
    return shardings


def _check_cut(params: Mapping[str, Any], shardings: Mapping[str, Any], size: int, prefix: str) -> None:
    """Every dimension that the rules cut must have been cut: a copy would be summed as if it were a slice."""
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            _check_cut(value, shardings[key], size, f"{path}.")
            continue
        sharding: NamedSharding = shardings[key]
        wanted = partition_spec(path, value.ndim)
        for dimension, axis in enumerate(wanted):
            if axis == TENSOR and sharding.spec[dimension] != TENSOR:
                raise ValueError(
                    f"tensor_parallel: dimension {dimension} of {path} {list(value.shape)} does not divide by "
                    f"tensor = {size}" + (" into blocks of 128" if "weight_scale_inv" in params else "")
                )
