"""What the GPU kernels of `mla_heads` share: kv_b_proj as they read it, and tiles in shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight
from pallas_kernels.stack import float_values, layer_index, stacked


@dataclasses.dataclass(frozen=True)
class KeyValueWeights:
    """kv_b_proj whose heads have 128 key rows, then 128 value rows.

    Attributes:
        layer: int32 [1], index into the stacks.
        values: float8_e4m3fn or bfloat16 [L, H * 256, R].
        scales: float32 [L, H * 2, R / 128], a row for every half of a head; None for bfloat16 values.
    """

    layer: Array
    values: Array
    scales: Array | None

    @classmethod
    def of(cls, kv_b: Weight, layer: Array | int | None) -> KeyValueWeights:
        scales = stacked(kv_b.scales, layer, 3) if isinstance(kv_b, BlockScaled) else None
        return cls(layer_index(layer), stacked(float_values(kv_b), layer, 3), scales)

    @property
    def operands(self) -> list[Array]:
        """Of a kernel; without scales the layer stands in for them, unread."""
        return [self.layer, self.layer if self.scales is None else self.scales, self.values]

    @property
    def heads(self) -> int:
        return self.values.shape[1] // (2 * BLOCK)

    @property
    def rank(self) -> int:
        return self.values.shape[2]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tiles of one of the two kernels on one chip.

    Attributes:
        rows: tokens of a tile.
        width: output columns of a block.
        slots: tiles of tokens that are in shared memory or on their way.
    """

    rows: int
    width: int
    slots: int


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory whose tiles of 8 rows of 128 bytes lie as the tensor cores want them."""
    per_row = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, per_row)), plgpu.SwizzleTransform(128))
    )


def convert(stored: Any, weight: Any) -> None:
    """Writes the weights of one tile as bfloat16, which holds every number of float8_e4m3fn."""
    for row in range(0, stored.shape[0], 64):
        rows = slice(row, row + 64)
        weight[rows] = _layout(stored[rows]).astype(jnp.float32).astype(weight.dtype)


def _layout(x: Array) -> Array:
    """Registers as loads of 4 bytes fill them."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA_UPCAST_2X)
