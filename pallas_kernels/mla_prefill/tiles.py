"""Operations inside the kernels of `mla_prefill`."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import MIB, chip, interpret
from pallas_kernels.mla_prefill.blocks import LANES, Attention

MASKED = -1e30
"""A score that no softmax sees; finite, for a chunk may hide every key from a query and -inf - -inf is NaN."""
PIECE = 32
"""Rows of scores between a load and a store; more of them spill."""
SPARE_BYTES = 2 * MIB
"""Vector memory for what the compiler keeps beside blocks and scratch, registers that it spills among it."""
LOG2_E = math.log2(math.e)


def dot(x: Array, y: Array) -> Array:
    """Matrix product in float32; float32 operands keep all of their digits."""
    if interpret() is not False:
        # XLA for CPUs lacks some products of bfloat16; that of float32 is the same, for products are exact in it.
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=precision)


def columns(head: int, width: int) -> slice:
    """Lanes of one head of a group."""
    return slice(head * width, (head + 1) * width)


def by_lanes(row: Array) -> Array:
    """[1, N] along lanes -> [N, 128] along sublanes, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def repeat_lanes(x: Array, width: int) -> Array:
    """[N, 128], all lanes alike -> [N, width]."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def zero_beyond(x: Array, valid: Any) -> Array:
    """`x` [D, N] with zeros from lane `valid` on: 0 * NaN is NaN, so a mask on the other factor does not do."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane < valid, x.astype(jnp.float32), 0).astype(x.dtype)


def row_minus_lane(rows: int, lanes: int) -> Array:
    """int32 [rows, lanes]."""
    shape = (rows, lanes)
    return lax.broadcasted_iota(jnp.int32, shape, 0) - lax.broadcasted_iota(jnp.int32, shape, 1)


def like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Result of a kernel, which under `shard_map` differs over the mesh axes over which `x` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def compiler_params(
    semantics: tuple[Literal["parallel", "arbitrary"], ...], blocks: Any, dtype: Any, scratch: list[Any]
) -> pltpu.CompilerParams:
    """Dimension semantics, and as much vector memory as two of each block and the scratch need."""
    need = 2 * sum(_padded_bytes(spec.block_shape, dtype) for spec in blocks)
    need += sum(_padded_bytes(x.shape, x.dtype) for x in scratch) + SPARE_BYTES
    limit = need if need > chip().scoped_vmem_bytes else None
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def _padded_bytes(shape: tuple[int | None, ...], dtype: Any) -> int:
    """Bytes of an array in tiles of 32 bits x 8 x 128."""
    *outer, rows, lanes = (1 if size is None else size for size in shape)
    item = jnp.dtype(dtype).itemsize
    tile = 32 // item
    return math.prod(outer) * pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, LANES) * LANES * item


def load_transposed(ref: Any, head: int, nope: Any, rope: Any, attention: Attention) -> None:
    """Puts both parts of a head's queries (or, `rope` being of all heads, keys), transposed, into `ref[head]`."""
    ref[head, : attention.nope] = nope[:, columns(head, attention.nope)].T
    shared = rope.shape[1] == attention.rope
    ref[head, attention.nope :] = rope[...].T[columns(0 if shared else head, attention.rope)]


def keys(nope: Any, rope: Any, rows: Any, head: int, attention: Attention) -> Array:
    """Both parts of a head's keys, [rows, Dn + Dr]."""
    return jnp.concatenate([nope[rows, columns(head, attention.nope)], rope[rows]], axis=1)


def pieces(chunk: int) -> list[slice]:
    """Rows of a chunk that are in registers at a time."""
    return [slice(first, first + PIECE) for first in range(0, chunk, PIECE)]


def fold(reduce: Any, x: Array) -> Array:
    """[N, M] -> [8, M]: reduces rows that lie in the same sublane, which takes no shuffles."""
    return reduce(x.reshape(-1, 8, x.shape[1]), axis=0)
