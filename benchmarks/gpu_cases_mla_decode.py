"""Cases of `mla_decode` on GPUs: V3's latent attention of one to four new tokens, all heads and an eighth of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu_case import GpuCase, Tile
from pallas_kernels.gpu_chip import gpu_chip
from pallas_kernels.mla_decode import cache_width, gpu, reference
from pallas_kernels.mla_decode.gpu_plan import BLOCK, BUFFERS, TILE_ROWS, make_plan

LAYERS, RANK, ROPE = 2, 512, 64
SCALE = 0.1147
INSTRUCTIONS = {
    "h100": r"^wgmma\.mma_async.*f32\.bf16\.bf16",
    "h200": r"^wgmma\.mma_async.*f32\.bf16\.bf16",
    "b200": r"^tcgen05\.mma.*kind::f16",
}


@dataclasses.dataclass(frozen=True)
class Decode:
    """Rows of the batch that all have `tokens` tokens.

    Attributes:
        batch, queries, heads, tokens: B, Q, H and the length of each row.
        page: tokens of a page; 0 for a contiguous cache.
        float8: the cache is FP8 with a scale for each token.
    """

    batch: int
    queries: int
    heads: int
    tokens: int
    page: int = 0
    float8: bool = False

    @property
    def label(self) -> str:
        kind = ("FP8" if self.float8 else "bfloat16") + (f", pages of {self.page}" if self.page else "")
        rows = f"{self.batch} rows of {self.tokens} tokens"
        return f"{rows}, {self.queries} new, {self.heads} heads, {kind}"

    @property
    def entry_bytes(self) -> int:
        """Of a token, what has to be read: padding is not."""
        return (RANK + ROPE) + 4 if self.float8 else 2 * (RANK + ROPE)


DECODES = (
    Decode(8, 1, 128, 4096),
    Decode(8, 2, 128, 4096, page=64),
    Decode(64, 1, 128, 4096, page=64),
    Decode(64, 4, 128, 2048),
    Decode(128, 1, 128, 8192, page=64),
    Decode(1, 1, 128, 131072, page=64),
    Decode(8, 1, 16, 8192),
    Decode(128, 2, 16, 4096, page=64),
    Decode(8, 1, 128, 4096, float8=True),
    Decode(128, 1, 128, 4096, page=64, float8=True),
    Decode(128, 2, 16, 4096, page=64, float8=True),
    Decode(1, 4, 16, 131072, page=64, float8=True),
)


def mla_decode_cases() -> list[GpuCase]:
    """bfloat16 queries and results."""
    return [_case(decode) for decode in DECODES]


def _case(decode: Decode) -> GpuCase:
    def function(
        q_latent: Array, q_rope: Array, cache: Array, lengths: Array, layer: Array, *rest: Array
    ) -> tuple[Array, Array]:
        return gpu.mla_decode(q_latent, q_rope, cache, lengths, SCALE, layer, *_optional(decode, rest))

    def xla(
        q_latent: Array, q_rope: Array, cache: Array, lengths: Array, layer: Array, *rest: Array
    ) -> tuple[Array, Array]:
        return reference.mla_decode(q_latent, q_rope, cache, lengths, SCALE, layer, *_optional(decode, rest))

    page = decode.page or decode.tokens
    pages = decode.batch * decode.tokens // page
    dtype = jnp.float8_e4m3fn if decode.float8 else jnp.bfloat16
    queries = (decode.batch, decode.queries, decode.heads)
    arguments = [
        jax.ShapeDtypeStruct((*queries, RANK), jnp.bfloat16),
        jax.ShapeDtypeStruct((*queries, ROPE), jnp.bfloat16),
        jax.ShapeDtypeStruct((LAYERS, pages, page, cache_width(RANK, ROPE)), dtype),
        jax.ShapeDtypeStruct((decode.batch,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    ]
    integers: list[np.ndarray | int] = [np.full(decode.batch, decode.tokens, np.int32), 1]
    if decode.float8:
        arguments.append(jax.ShapeDtypeStruct((LAYERS, pages, 1, page), jnp.float32))
    if decode.page:
        arguments.append(jax.ShapeDtypeStruct((decode.batch, pages // decode.batch), jnp.int32))
        integers.append(
            np.random.default_rng(0).permutation(pages).reshape(decode.batch, -1).astype(np.int32)
        )
    rows = decode.batch * decode.queries * decode.heads
    return GpuCase(
        kernel="dsv3_mla_decode",
        label=decode.label,
        function=function,
        arguments=tuple(arguments),
        instructions=INSTRUCTIONS,
        ideal_bytes=decode.batch * decode.tokens * decode.entry_bytes + rows * 2 * (2 * RANK + ROPE),
        flops=2 * rows * decode.tokens * (2 * RANK + ROPE),
        tile=_tile(decode, arguments[0].shape, arguments[2], arguments[-1] if decode.page else None),
        integers=tuple(integers),
        xla=xla,
    )


def _optional(decode: Decode, rest: tuple[Array, ...]) -> tuple[Array | None, Array | None]:
    """Scales and page table, of those that the case has."""
    remaining = list(rest)
    return (
        remaining.pop(0) if decode.float8 else None,
        remaining.pop(0) if decode.page else None,
    )


def _tile(
    decode: Decode,
    queries: tuple[int, ...],
    cache: jax.ShapeDtypeStruct,
    table: jax.ShapeDtypeStruct | None,
) -> Tile:
    chip = gpu_chip()
    assert chip is not None
    plan = make_plan(queries, cache, table, chip)
    return Tile(
        bytes=BLOCK * decode.entry_bytes,
        flops=2 * TILE_ROWS * BLOCK * (2 * RANK + ROPE),
        stages=BUFFERS,
        blocks=plan.batch * plan.splits * plan.tiles,
    )
