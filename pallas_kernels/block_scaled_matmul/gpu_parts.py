"""Products whose K was split over thread blocks, put together by XLA."""

import jax
import jax.numpy as jnp
from jax import Array


def sum_parts(parts: Array, row_scale: Array | None, out_dtype: jnp.dtype) -> Array:
    """The result of one weight, or SwiGLU of a pair.

    Args:
        parts: float32 [splits, weights, M, N].
        row_scale: float32 [M], multiplies the rows, or None.

    Returns:
        [M, N] in `out_dtype`.
    """
    products = jnp.sum(parts, axis=0)
    whole = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
    if row_scale is not None:
        whole *= row_scale[:, None]
    return whole.astype(out_dtype)
