"""RMSNorm, as it is fused in front of other operations."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode import to_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """An RMSNorm's parameters.

    Attributes:
        weight: [L, K] with a layer index, [K] without.
        eps: added to the mean square.
    """

    weight: Array
    eps: float = dataclasses.field(metadata={"static": True})


def rms_norm(x: Array, norm: Norm, layer: Array | int | None = None) -> Array:
    """w * x / sqrt(mean(x^2) + eps), statistics in float32, rounded to x's dtype before w as `transformers` does.

    Args:
        x: [..., K].
        layer: which row of a stacked weight.

    Returns:
        [..., K] in x's dtype.
    """
    weight = norm.weight if layer is None else norm.weight[layer]
    return normalize(x, to_float32(weight), norm.eps)


def normalize(x: Array, weight: Array, eps: float) -> Array:
    """`rms_norm` with the weight's own row, float32 [K] or broadcastable; also used inside kernels."""
    wide = x.astype(jnp.float32)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normalised = (wide * jax.lax.rsqrt(variance + eps)).astype(x.dtype)
    return weight.astype(x.dtype) * normalised
