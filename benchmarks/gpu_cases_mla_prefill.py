"""Cases of `mla_prefill` on GPUs: V3's attention over whole sequences, a chunk behind a prefix, packed documents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import gpu_xla
from benchmarks.gpu_case import GpuCase, Tile
from pallas_kernels.mla_prefill import gpu, reference
from pallas_kernels.mla_prefill.gpu_blocks import KEYS, QUERIES, STAGES

NOPE, ROPE, VALUE = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
HEADS = (128, 16)
BF16 = jnp.dtype(jnp.bfloat16).itemsize
WGMMA, TCGEN05 = r"^wgmma\.mma_async.*f32\.bf16\.bf16", r"^tcgen05\.mma.*kind::f16"
INSTRUCTIONS = {"h100": WGMMA, "h200": WGMMA, "b200": TCGEN05}


def mla_prefill_cases() -> list[GpuCase]:
    """Forward kernels; the derivative is the definition's."""
    cases = []
    for heads in HEADS:
        cases += [_case(heads, 4096, 4096, ""), _case(heads, 2048, 8192, "start")]
    return [*cases, _case(HEADS[-1], 4096, 4096, "segments")]


def _case(heads: int, queries: int, keys: int, beside: str) -> GpuCase:
    """`beside`: "start", "segments", or nothing."""

    def run(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array, *rest: Array) -> Array:
        start, segments = (rest[0] if beside == name else None for name in ("start", "segments"))
        return gpu.mla_prefill(q_nope, q_rope, k_nope, k_rope, v, SCALE, start, segments)

    def run_xla(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array, *rest: Array) -> Array:
        start, segments = (rest[0] if beside == name else None for name in ("start", "segments"))
        return reference.mla_prefill(q_nope, q_rope, k_nope, k_rope, v, SCALE, start, segments)

    integers = {"start": keys - queries, "segments": np.arange(queries, dtype=np.int32)[None] // 1024}
    abstract: Any = jax.ShapeDtypeStruct
    shapes = [
        (1, queries, heads, NOPE),
        (1, queries, heads, ROPE),
        (1, keys, heads, NOPE),
        (1, keys, ROPE),
        (1, keys, heads, VALUE),
    ]
    arrays = [abstract(shape, jnp.bfloat16) for shape in shapes]
    extra = {"start": [abstract((1,), jnp.int32)], "segments": [abstract((1, queries), jnp.int32)]}
    pairs = queries * keys - queries * (queries - 1) // 2
    return GpuCase(
        kernel="dsv3_mla_prefill",
        label=f"{queries} queries, {keys} keys, {heads} heads" + (f", {beside}" if beside else ""),
        function=run,
        arguments=(*arrays, *extra.get(beside, [])),
        instructions=INSTRUCTIONS,
        ideal_bytes=sum(a.size for a in arrays) * BF16 + queries * heads * VALUE * BF16,
        flops=2 * heads * pairs * (NOPE + ROPE + VALUE),
        tile=Tile(
            bytes=KEYS * (NOPE + ROPE + VALUE) * BF16,
            flops=2 * QUERIES * KEYS * (NOPE + ROPE + VALUE),
            stages=STAGES,
            blocks=heads * -(-queries // QUERIES),
        ),
        integers=(integers[beside],) if beside else (),
        xla=run_xla if beside else gpu_xla.causal_attention,
    )
