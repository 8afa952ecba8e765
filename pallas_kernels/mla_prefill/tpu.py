"""`mla_prefill` on a TPU: forward kernel, and two kernels for its derivative."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.mla_prefill.blocks import LANES, Attention
from pallas_kernels.mla_prefill.tpu_forward import forward
from pallas_kernels.mla_prefill.tpu_key_gradient import key_gradient
from pallas_kernels.mla_prefill.tpu_query_gradient import query_gradient

ROPE_MULTIPLE = 64


def unsupported(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array) -> str | None:
    """Why the kernel cannot take these arrays; None if it can."""
    dtypes = {a.dtype.name for a in (q_nope, q_rope, k_nope, k_rope, v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"arrays of {' and '.join(sorted(dtypes))} (expected all bfloat16 or all float32)"
    return None


def mla_prefill(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    scale: float,
    start: Array | None,
    segment_ids: Array | None,
) -> Array:
    batch, length, heads = q_nope.shape[:3]
    width = v.shape[-1]
    q_nope, k_nope, v = (_pad(_pad(a, LANES, 3), 2 if heads > 1 else 1, 2) for a in (q_nope, k_nope, v))
    q_rope, k_rope = (
        _pad(_pad(q_rope, ROPE_MULTIPLE, 3), 2 if heads > 1 else 1, 2),
        _pad(k_rope, ROPE_MULTIPLE, 2),
    )
    padded = q_nope.shape[2]
    attention = Attention(padded, min(padded, 2), q_nope.shape[-1], k_rope.shape[-1], v.shape[-1], scale)
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    segments = None if segment_ids is None else segment_ids[:, None]
    arrays = _alike(*(_side_by_side(x) for x in (q_nope, q_rope, k_nope)), k_rope, _side_by_side(v))
    out: Array = _attend(attention, arrays, start, segments)
    return out.reshape(batch, length, padded, -1)[:, :, :heads, :width]


def _pad(x: Array, multiple: int, axis: int) -> Array:
    """Zeros up to a multiple; real models need none."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _side_by_side(x: Array) -> Array:
    """[B, T, H, D] -> [B, T, H * D]."""
    return x.reshape(*x.shape[:2], -1)


def _alike(*arrays: Array) -> tuple[Array, ...]:
    """Arrays which all differ over the mesh axes over which any does, under a `shard_map` that keeps track of it.

    What was the same on all devices (k_rope, where they have a part of the heads each) gets the sum of the derivatives.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    axes = frozenset[str]().union(*varying)
    return tuple(
        lax.pcast(x, tuple(axes - own), to="varying") if own != axes else x
        for x, own in zip(arrays, varying, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(attention: Attention, arrays: tuple[Array, ...], start: Array, segments: Array | None) -> Array:
    return forward(attention, arrays, start, segments)[0]


def _forward(attention: Attention, arrays: tuple[Array, ...], start: Array, segments: Array | None) -> Any:
    out, lse = forward(attention, arrays, start, segments)
    return out, (arrays, start, segments, out, lse)


def _backward(attention: Attention, residuals: Any, d_out: Array) -> Any:
    arrays, start, segments, out, lse = residuals
    dq_nope, dq_rope, delta = query_gradient(attention, arrays, start, segments, out, lse, d_out)
    dk_nope, dk_rope, dv = key_gradient(attention, arrays, start, segments, lse, delta, d_out)
    return (dq_nope, dq_rope, dk_nope, dk_rope, dv), None, None


_attend.defvjp(_forward, _backward)
