"""`mla_heads`: what absorbed attention does head by head with the two halves of kv_b_proj."""

import dataclasses

from jax import Array

from pallas_kernels.block_scaled import Weight
from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.mla_heads import gpu, reference, tpu

__all__ = ["HeadDims", "absorb_queries", "head_values"]


@dataclasses.dataclass(frozen=True)
class HeadDims:
    """Sizes of one head, under the names of a Hugging Face config."""

    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


def absorb_queries(
    q: Array,
    rope: Array,
    kv_b: Weight,
    dims: HeadDims,
    *,
    layer: Array | int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Queries as `mla_decode` takes them (`attn_impl = "absorb"` of the release's model.py; paper section 2.1.1).

    A head's part without position is multiplied by the key half of its rows of kv_b_proj; its rotary part is turned
    by its position, pairs (0, 1), (2, 3), ... with the even dims first in the result.

    Args:
        q: [M, H * (Dn + Dr)], the output of q_b_proj.
        rope: float32 [M, Dr], cosines, then sines.
        kv_b: [L, H * (Dn + Dv), kv_lora_rank] with `layer`, [H * (Dn + Dv), kv_lora_rank] without.
        layer: index into the stack, a scalar, possibly traced.

    Returns:
        [M, H, kv_lora_rank] and [M, H, Dr] in q's dtype. Inputs are not quantised, products accumulate in float32.
    """
    function = choose(
        "absorb_queries",
        implementation,
        reference=reference.absorb_queries,
        tpu=Kernel(tpu.absorb_queries, lambda: tpu.unsupported(kv_b, dims)),
        gpu=Kernel(gpu.absorb_queries, lambda: gpu.unsupported(q, kv_b, dims)),
    )
    return function(q, rope, kv_b, dims, layer)


def head_values(
    context: Array,
    kv_b: Weight,
    dims: HeadDims,
    *,
    layer: Array | int | None = None,
    implementation: str | None = None,
) -> Array:
    """Values of every head from its attention-weighted latent, by the value half of its rows of kv_b_proj.

    Args:
        context: [M, H, kv_lora_rank], the result of `mla_decode`.
        kv_b, dims, layer: as in `absorb_queries`.

    Returns:
        [M, H * Dv] in context's dtype.
    """
    function = choose(
        "head_values",
        implementation,
        reference=reference.head_values,
        tpu=Kernel(tpu.head_values, lambda: tpu.unsupported(kv_b, dims)),
        gpu=Kernel(gpu.head_values, lambda: gpu.unsupported(context, kv_b, dims)),
    )
    return function(context, kv_b, dims, layer)
