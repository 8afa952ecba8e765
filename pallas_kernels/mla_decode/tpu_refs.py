"""What the parts of `mla_decode`'s TPU kernel work on."""

from typing import Any, NamedTuple

LANES = 128


class Refs(NamedTuple):
    """The kernel's references: prefetched scalars, operands, results, scratch. `None`s where a variant has none."""

    lengths: Any
    layer: Any
    table: Any
    q_latent: Any
    q_rope: Any
    cache: Any
    scales: Any
    out: Any
    lse: Any
    buffer: Any
    scale_buffer: Any
    semaphore: Any
    slot: Any
    query: Any
    scores: Any
    other_scores: Any
    accumulator: Any
    peak: Any
    total: Any
