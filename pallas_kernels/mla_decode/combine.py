"""Joining attention over parts of a sequence by their log-sum-exp."""

import jax.numpy as jnp
from jax import Array


def combine(out: Array, lse: Array) -> tuple[Array, Array]:
    """Attention over the whole of a sequence, from attention over its parts.

    Args:
        out: [parts, ..., D], each part's result, normalised within the part.
        lse: float32 [parts, ...], log-sum-exp of each part's scores; -inf where a query sees nothing of a part.

    Returns:
        float32 [..., D] and float32 [...]; 0 and -inf where a query sees nothing at all.
    """
    peak = jnp.max(lse, axis=0)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(peak), 0, peak))
    total = jnp.sum(weights, axis=0)
    seen = total > 0
    mean = jnp.sum(weights[..., None] * out, axis=0) / jnp.where(seen, total, 1)[..., None]
    return mean, jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
