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


def store(ref: Any, value: Array) -> None:
    """ref[...] = value, also where the accesses of shared memory conflict; before 0.11 every store was of that kind."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
