"""What differs between the versions of Mosaic GPU that are supported."""

import inspect
from typing import Any

from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> Array:
    """`plgpu.load` of a whole reference; before 0.11 it took an index beside it."""
    index = (...,) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)
