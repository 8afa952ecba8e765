"""`mla_prefill`: causal attention with expanded heads, where queries and keys are wider than values."""

from collections.abc import Callable

from jax import Array

from pallas_kernels.implementation import Kernel, choose
from pallas_kernels.mla_prefill import cpu, gpu, reference, tpu

__all__ = ["mla_prefill"]


def mla_prefill(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    *,
    scale: float,
    start: Array | None = None,
    segment_ids: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Causal attention of a chunk of each sequence to its prefix and to itself (paper section 2.1.1).

    scores = scale * (q_nope . k_nope + q_rope . k_rope), softmax in float32. Query t of row b stands at position
    start[b] + t and sees the keys 0 ... start[b] + t, of which all must be written; what lies beyond
    start[b] + T - 1 never reaches a result, whatever it holds. Padding on the right of a row needs no mask: no
    earlier query sees it.

    The TPU kernel wants [B, T, H * D] in memory: give it reshaped results of projections, and XLA copies nothing.

    Args:
        q_nope: bfloat16 or float32 [B, T, H, Dn].
        q_rope: [B, T, H, Dr], rotated.
        k_nope: [B, S, H, Dn].
        k_rope: [B, S, Dr], rotated, common to all heads.
        v: [B, S, H, Dv].
        scale: factor of the scores, positive.
        start: int32 [B], position of the first query of each row, at most S - T; zeros if None.
        segment_ids: int32 [B, T], the document that each token belongs to, where several are packed into a row: a
            query sees only keys of its own. Only for rows that begin at position 0.
        implementation: "pallas", "reference", "cpu" (short rows from position 0, one document each), or None for
            the platform's own.

    Returns:
        [B, T, H, Dv] in v's dtype. Differentiable in all five arrays.

    Raises:
        ValueError: the implementation does not exist here or does not take these arguments, or both `start` and
            `segment_ids` were given.
    """
    if start is not None and segment_ids is not None:
        raise ValueError("mla_prefill: expected at most one of start and segment_ids")
    short = start is None and segment_ids is None and q_nope.shape[1] <= cpu.MAX_LENGTH
    function: Callable[..., Array] = choose(
        "mla_prefill",
        implementation,
        reference=reference.mla_prefill,
        tpu=Kernel(tpu.mla_prefill, lambda: tpu.unsupported(q_nope, q_rope, k_nope, k_rope, v)),
        gpu=Kernel(gpu.mla_prefill, lambda: gpu.unsupported(q_nope, q_rope, k_nope, k_rope, v)),
        cpu=cpu.mla_prefill_by_head if short else None,
    )
    return function(q_nope, q_rope, k_nope, k_rope, v, scale, start, segment_ids)
