"""The rules table: from an array's path to the mesh axes of its dimensions."""

import fnmatch
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "expert", "tensor", "context")
"""Names that mesh axes have: batch rows, experts, widths of matrices, positions of the cache."""

BLOCK = 128
"""Rows and columns that share a scale in a block-scaled matrix."""

WEIGHT_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # path                     the last dimensions' axes; dimensions before them are whole
    ("*.experts.down_proj.*", ("expert", None, "tensor")),
    ("*.experts.*", ("expert", "tensor", None)),
    ("*.o_proj.*", (None, "tensor")),
    ("*.down_proj.*", (None, "tensor")),
    ("*.q_b_proj.*", ("tensor", None)),
    ("*.q_proj.*", ("tensor", None)),
    ("*.kv_b_proj.*", ("tensor", None)),
    ("*.gate_proj.*", ("tensor", None)),
    ("*.up_proj.*", ("tensor", None)),
    ("embed_tokens.*", (None, "tensor")),
    ("lm_head.*", ("tensor", None)),
    ("*", ()),
)


def partition_spec(path: str, num_dimensions: int) -> PartitionSpec:
    """Axes of an array's dimensions by the first rule that matches its path.

    Args:
        path: keys joined by dots, such as "moe_layers.self_attn.o_proj.weight".
        num_dimensions: of the array; stacked layers come first.
    """
    axes = next(axes for pattern, axes in WEIGHT_RULES if fnmatch.fnmatchcase(path, pattern))
    return PartitionSpec(*[None] * (num_dimensions - len(axes)), *axes)


def tree_shardings(tree: Mapping[str, Any], mesh: Mesh | AbstractMesh, prefix: str = "") -> dict[str, Any]:
    """Shardings for a nested dict of arrays or shapes, by `WEIGHT_RULES`.

    Axes that the mesh lacks are left out. A matrix and its block scales are cut alike only where every piece is a
    whole number of blocks; arrays for which that does not hold, or whose size is no multiple of the axis, are
    replicated along it.

    Args:
        tree: as `dsv3_jax.model.abstract_params` gives it.
        mesh: with axes from `AXES`.

    Returns:
        A nested dict of the same keys with `NamedSharding`s.
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out[key] = tree_shardings(value, mesh, f"{path}.")
            continue
        is_blocked = "weight_scale_inv" in tree
        # A matrix and its scales are cut at the same blocks: the matrix decides for both.
        shape = tree["weight"].shape if is_blocked else value.shape
        units = [1] * (len(shape) - 2) + [BLOCK] * 2 if is_blocked else [1] * len(shape)
        spec = partition_spec(path, len(shape))
        kept = [
            axis if axis in mesh.shape and size % (mesh.shape[axis] * unit) == 0 else None
            for axis, size, unit in zip(spec, shape, units, strict=True)
        ]
        out[key] = NamedSharding(mesh, PartitionSpec(*kept))
    return out
