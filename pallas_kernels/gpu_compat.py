"""What differs between the versions of Mosaic GPU that are supported."""

import inspect
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chip import interpret

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


def register_product(a: Array, b: Any) -> Array:
    """float32 a @ b by wgmma, a from registers and b in shared memory; the interpreter's takes both from there.

    Args:
        a: [64, K].
        b: reference [K, N].
    """
    if interpret():
        return jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
