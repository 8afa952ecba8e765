"""Rotation of the rotary part of queries and keys by their positions."""

import jax.numpy as jnp
from jax import Array, lax


def rotate(x: Array, cos_sin: Array) -> Array:
    """Turns the pairs (0, 1), (2, 3), ... of the last dimension, in float32.

    The result has the even dims first and the odd ones last: queries and keys alike, so that scores are those of the
    interleaved order and no shuffle is needed to put it back.

    Args:
        x: [..., Dr].
        cos_sin: float32, broadcastable to x: cosines [..., Dr / 2], then sines.
    """
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.split(cos_sin, 2, axis=-1)
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1).astype(x.dtype)


def rotate_by_matmul(x: Array, cos_sin: Array) -> Array:
    """`rotate` for kernels on a TPU: the lanes are moved by a constant matrix on the MXU, not by shuffles.

    Every column of the matrix has a single 1 or -1, so the product is exact.

    Args:
        x: [M, Dr].
        cos_sin: float32 [M, Dr].
    """
    size = x.shape[-1]
    row = lax.broadcasted_iota(jnp.int32, (size, 2 * size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, 2 * size), 1)
    half, i = column // (size // 2), column % (size // 2)
    # Columns: even dims, odd dims, odd dims negated, even dims.
    source = jnp.where((half == 0) | (half == 3), 2 * i, 2 * i + 1)
    sign = jnp.where(half == 2, -1.0, 1.0)
    matrix = jnp.where(row == source, sign, 0.0).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    moved = jnp.dot(x, matrix, precision=precision, preferred_element_type=jnp.float32)
    cos, sin = cos_sin[:, : size // 2], cos_sin[:, size // 2 :]
    cos, sin = (jnp.concatenate([part, part], axis=1) for part in (cos, sin))
    return (moved[:, :size] * cos + moved[:, size:] * sin).astype(x.dtype)
