"""`mla_prefill`: causal attention with expanded heads, where queries and keys are wider than values."""

from collections.abc import Callable

import jax
from jax import Array

from pallas_kernels.implementation import choose
from pallas_kernels.mla_prefill import cpu, reference

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
    implementation: str | None = None,
) -> Array:
    """Causal attention of a chunk of each sequence to its prefix and to itself (paper section 2.1.1).

    scores = scale * (q_nope . k_nope + q_rope . k_rope), softmax in float32. Query t of row b stands at position
    start[b] + t and sees the keys 0 ... start[b] + t. Padding on the right of a row needs no mask: no earlier query
    sees it.

    Args:
        q_nope: [B, T, H, Dn].
        q_rope: [B, T, H, Dr], rotated.
        k_nope: [B, S, H, Dn].
        k_rope: [B, S, Dr], rotated, common to all heads.
        v: [B, S, H, Dv].
        scale: factor of the scores.
        start: int32 [B], position of the first query of each row; zeros if None.

    Returns:
        [B, T, H, Dv] in v's dtype.
    """
    implementations: dict[str, Callable[..., Array]] = {"reference": reference.mla_prefill}
    if start is None and jax.default_backend() == "cpu" and q_nope.shape[1] <= cpu.MAX_LENGTH:
        implementations = {"by_head": cpu.mla_prefill_by_head} | implementations
    function = choose("mla_prefill", implementation, implementations)
    return function(q_nope, q_rope, k_nope, k_rope, v, scale, start)
