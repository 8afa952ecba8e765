"""`BlockScaled`: an FP8 matrix with one float32 scale for every block of 128 x 128, as DeepSeek-V3 stores weights."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 128


def num_blocks(size: int) -> int:
    """Number of blocks of 128 that cover `size` elements; the last may be short."""
    return -(-size // BLOCK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A matrix, or a stack of matrices, in block-scaled FP8.

    Element (n, k) has the value `values[..., n, k] * scales[..., n // 128, k // 128]` (the release's
    `weight_scale_inv`, which multiplies in spite of its name).

    Attributes:
        values: float8_e4m3fn [..., N, K], or uint8, its bit patterns.
        scales: float32 [..., ceil(N / 128), ceil(K / 128)].
    """

    values: Array
    scales: Array

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Weight = Array | BlockScaled
"""A matrix that an operation multiplies by: a plain array of any float type, or a `BlockScaled`."""
