"""Scales and rounding of FP8 e4m3, for references and kernels."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.target import target

FLOAT8_MAX = 448.0
AMAX_FLOOR = 1e-4


def float8_scales(amax: Array, scale_fmt: str | None, *, in_kernel: bool = False) -> Array:
    """Scale of what has the largest magnitude `amax`: max(amax, 1e-4) / 448, float32 of its shape.

    Args:
        scale_fmt: "ue8m0" rounds up to a power of two.
        in_kernel: as of `divide`.
    """
    scales = divide(jnp.maximum(amax, AMAX_FLOOR), FLOAT8_MAX, in_kernel=in_kernel)
    return round_up_to_power_of_two(scales) if scale_fmt == "ue8m0" else scales


def round_to_float8(x: Array, scales: Array, *, in_kernel: bool = False) -> Array:
    """x / scales in float8_e4m3fn, rounded to nearest even.

    Nothing is clipped: casts of more than 464 differ between platforms, but a quotient by `float8_scales` exceeds 448
    by an ulp at most, and is rounded to 448.

    Args:
        x: float32, at most 448 times its scale.
        scales: float32, broadcastable to x.
        in_kernel: as of `divide`.
    """
    return divide(x, scales, in_kernel=in_kernel).astype(jnp.float8_e4m3fn)


def round_up_to_power_of_two(x: Array) -> Array:
    """Least power of two that is not below x, for positive normal float32 x.

    By exponent and mantissa bits: neither log2 nor exp2 is exact on every platform.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def divide(x: Array, divisor: Array | float, *, in_kernel: bool = False) -> Array:
    """x / divisor, rounded once: newer XLA multiplies by the reciprocal of what is broadcast, an ulp off.

    Args:
        in_kernel: inside a Pallas kernel; there is no barrier in one that is compiled, whose division has an error
            of about an ulp.
    """
    broadcast = jnp.broadcast_to(jnp.asarray(divisor, x.dtype), x.shape)
    if in_kernel and target()[0] == "tpu":
        return x / broadcast
    if target()[0] == "gpu":
        # A barrier would write the divisors to memory, as many as x has elements; these are no broadcast either.
        return x / jnp.where(x == 0, 1, broadcast)
    return x / lax.optimization_barrier(broadcast)
