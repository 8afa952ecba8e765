"""Parameters in the form in which a platform's programs read them without a copy."""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from dsv3_jax.precision import Precision
from pallas_kernels.decode import bit_patterns


def for_reading(params: dict, precision: Precision) -> dict:
    """Parameters for the default device: see `bit_patterns` for a CPU, `row_major_scales` for a TPU.

    No weight is copied; on a TPU the scales are, which are a five-thousandth of them.
    """
    platform = jax.default_backend()
    if platform == "cpu" and precision.implementation != "pallas":
        return bit_patterns(params)
    return row_major_scales(params) if platform == "tpu" else params


def row_major_scales(params: dict) -> dict:
    """Pins the layout of block scales, whose narrow rows a TPU would otherwise hold in another order.

    The kernels read rows; without this every program would begin by turning the scales of all layers over.

    Args:
        params: nested dict of arrays, or of `jax.ShapeDtypeStruct`s with a sharding.
    """

    def place(path: tuple, leaf: Any) -> Any:
        if getattr(path[-1], "key", None) != "weight_scale_inv":
            return leaf
        wanted = Format(Layout(major_to_minor=tuple(range(leaf.ndim))), leaf.sharding)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted)
        return jax.device_put(leaf, wanted)

    return jax.tree_util.tree_map_with_path(place, params)
