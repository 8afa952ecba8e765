"""What a program under `shard_map` over the axis `tensor` exchanges: the sums of row-parallel products, and columns."""

import jax
from jax import Array, lax

TENSOR = "tensor"


def over_tensor() -> bool:
    """Whether this is traced inside a `shard_map` over `tensor`, where weights are one device's slices."""
    return TENSOR in jax.sharding.get_abstract_mesh().manual_axes


def sum_over_tensor(partial: Array) -> Array:
    """The sum of all devices' partial products; the argument itself outside of such a `shard_map`."""
    return lax.psum(partial, TENSOR) if over_tensor() else partial


def gather_columns(x: Array) -> Array:
    """All devices' columns side by side, [..., C / n] -> [..., C]; the argument itself outside."""
    return lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True) if over_tensor() else x
