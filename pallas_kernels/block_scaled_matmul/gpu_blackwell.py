"""Products by block-scaled FP8 weights on Blackwell (sm_100a, tcgen05)."""

import jax.numpy as jnp
from jax import Array


def multiply(
    x: Array,
    x_scales: Array | None,
    values: tuple[Array, ...],
    scales: tuple[Array, ...],
    group_sizes: Array | None,
    row_scale: Array | None,
    layer: Array,
    out_dtype: jnp.dtype,
    name: str,
) -> Array:
    """x @ W.T, or silu(x @ G.T) * (x @ U.T) of a pair; each group of rows by its own matrix.

    Args:
        x: [M, K], bfloat16, or float8_e4m3fn with `x_scales`.
        x_scales: float32 [ceil(K / 128), M], or None: products in bfloat16.
        values: one weight or a pair, each [L, E, N, K], float8_e4m3fn with `scales`, bfloat16 without.
        scales: () or as many as values, float32 [L, E, ceil(N / 128), ceil(K / 128)].
        group_sizes: int32 [E], consecutive rows of each matrix; None: E is 1, and has all rows.
        row_scale: float32 [M], multiplies the rows of the result in float32, or None.
        layer: int32 [1], index into L.
        out_dtype: bfloat16 or float32.
        name: of the kernel.

    Returns:
        [M, N] in `out_dtype`; rows beyond the last group are zeros.
    """
    raise NotImplementedError
