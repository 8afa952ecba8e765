"""What differs between the versions of Mosaic GPU that are supported."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chip import interpret

_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters
_STORE = getattr(plgpu, "store", None)


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> Array:
    """`plgpu.load` of a whole reference; before 0.11 it took an index beside it."""
    index = (...,) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store(ref: Any, value: Array) -> None:
    """ref[...] = value, also where the accesses of shared memory conflict; before 0.11 every store was of that kind."""
    if _STORE is None:
        ref[...] = value
    else:
        _STORE(ref, value, optimized=False)


def register_product(a: Array, b: Any) -> Array:
    """float32 a @ b by wgmma, a from registers and b in shared memory; the interpreter's takes both from there.

    Args:
        a: [64, K].
        b: reference [K, N].
    """
    if interpret():
        read = b[...]
        plgpu.commit_smem()  # Unlike wgmma this reads as threads do, and a copy may overwrite it.
        return jnp.dot(a, read, preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(values: tuple[Array, ...], multiply: Callable[..., None]) -> tuple[Array, ...]:
    """Adds wgmma's products to values in registers, in place; the interpreter adds them afterwards.

    Args:
        values: float32, each [64, N].
        multiply: adds products to as many accumulator references.
    """
    if not interpret():
        initial: Any = tuple(plgpu.WGMMAAccumulatorRef.init(value) for value in values)
        return pl.run_state(lambda references: multiply(*references))(initial)

    def products(*references: Any) -> tuple[Array, ...]:
        multiply(*references)
        return tuple(reference[...] for reference in references)

    fresh = [plgpu.WGMMAAccumulatorRef((value.shape[0], value.shape[1]), jnp.float32) for value in values]
    return tuple(
        value + product for value, product in zip(values, pl.run_scoped(products, *fresh), strict=True)
    )
