"""Cases of `absorb_queries` and `head_values`: the halves of V3's kv_b_proj, for all 128 heads and for shards."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.tpu_case import Case
from benchmarks.tpu_cases_matmul import stack_of
from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.mla_heads import HeadDims, absorb_queries, head_values

LAYERS, RANK = 61, 512
DIMS = HeadDims(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
ROWS, HEADS = (8, 128, 512), (128, 16)


def mla_heads_cases() -> list[Case]:
    """bfloat16 activations, FP8 weights."""
    return [case for heads in HEADS for rows in ROWS for case in _cases(rows, heads)]


def _cases(rows: int, heads: int) -> Iterator[Case]:
    def absorb(q: Array, rope: Array, layer: Array, kv_b: BlockScaled) -> tuple[Array, Array]:
        return absorb_queries(q, rope, kv_b, DIMS, layer=layer, implementation="pallas")

    def values(context: Array, layer: Array, kv_b: BlockScaled) -> Array:
        return head_values(context, kv_b, DIMS, layer=layer, implementation="pallas")

    abstract = jax.ShapeDtypeStruct
    layer = abstract((), jnp.int32)
    kv_b = stack_of(LAYERS, shape=(heads * (DIMS.qk_nope_head_dim + DIMS.v_head_dim), RANK))
    head_width, rope_width = DIMS.qk_nope_head_dim + DIMS.qk_rope_head_dim, DIMS.qk_rope_head_dim
    label = f"{heads} heads, FP8 weight, M = {rows}"
    yield Case(
        kernel="dsv3_absorb_queries",
        label=label,
        function=absorb,
        arguments=(
            abstract((rows, heads * head_width), jnp.bfloat16),
            abstract((rows, rope_width), jnp.float32),
            layer,
            kv_b,
        ),
        ideal_bytes=_half_bytes(heads)
        + rows * (heads * (head_width + RANK + rope_width) * 2 + rope_width * 4),
    )
    yield Case(
        kernel="dsv3_head_values",
        label=label,
        function=values,
        arguments=(abstract((rows, heads, RANK), jnp.bfloat16), layer, kv_b),
        ideal_bytes=_half_bytes(heads) + rows * heads * (RANK + DIMS.v_head_dim) * 2,
    )


def _half_bytes(heads: int) -> int:
    """FP8 values and float32 scales of the key rows, or of the value rows, of kv_b_proj."""
    return heads * (128 * RANK + RANK // 128 * 4)
