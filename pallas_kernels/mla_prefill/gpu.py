"""`mla_prefill` on a GPU: a forward kernel for each generation, differentiated as the definition is."""

from jax import Array

from pallas_kernels.gpu_chip import of_generation
from pallas_kernels.gradient import with_gradient_of
from pallas_kernels.mla_prefill import gpu_blackwell, gpu_hopper, reference
from pallas_kernels.mla_prefill.gpu_blocks import Work

Heads = tuple[Array, Array, Array, Array, Array]
WIDEST, WIDEST_ROPE = 128, 64
"""Dims of a head whose chunks fit into shared memory, without position and rotary."""


def unsupported(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array) -> str | None:
    """Why the kernels cannot take these arrays; None if they can."""
    dtypes = {a.dtype.name for a in (q_nope, q_rope, k_nope, k_rope, v)}
    if dtypes != {"bfloat16"}:
        return f"arrays of {' and '.join(sorted(dtypes))} (expected all bfloat16)"
    if max(q_nope.shape[-1], v.shape[-1]) > WIDEST or q_rope.shape[-1] > WIDEST_ROPE:
        widths = f"{q_nope.shape[-1]} + {q_rope.shape[-1]} and {v.shape[-1]}"
        return f"heads of {widths} dims (expected at most {WIDEST} + {WIDEST_ROPE} and {WIDEST})"
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
    def definition(arrays: Heads, start: Array | None, segment_ids: Array | None) -> Array:
        return reference.mla_prefill(*arrays, scale, start, segment_ids)

    def kernel(arrays: Heads, start: Array | None, segment_ids: Array | None) -> Array:
        kernels = of_generation(gpu_hopper, gpu_blackwell)
        out = kernels.attend(Work.of(*arrays, scale, start, segment_ids))
        return out[..., : v.shape[-1]]

    arrays = (q_nope, q_rope, k_nope, k_rope, v)
    return with_gradient_of(definition, kernel)(arrays, start, segment_ids)
