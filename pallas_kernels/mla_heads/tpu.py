"""The per-head products on a TPU: each kernel streams its half of kv_b_proj once, a group of heads at a time."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight
from pallas_kernels.chip import compiler_params, interpret
from pallas_kernels.rotary import rotate_by_matmul
from pallas_kernels.stack import float_values, layer_index, stacked

if TYPE_CHECKING:
    from pallas_kernels.mla_heads import HeadDims

MAX_ROWS = 128
HEADS = 16
NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def unsupported(kv_b: Weight, dims: HeadDims) -> str | None:
    """Why the kernels cannot take these weights; None if they can."""
    if float_values(kv_b).dtype == jnp.float16:
        return "a float16 weight"
    if dims.qk_nope_head_dim != dims.v_head_dim or dims.v_head_dim % BLOCK or kv_b.shape[-1] % BLOCK:
        return (
            f"heads of {dims.qk_nope_head_dim} and {dims.v_head_dim} dims over a latent of {kv_b.shape[-1]} "
            f"(expected equal ones, and multiples of {BLOCK})"
        )
    return None


def absorb_queries(
    q: Array, rope: Array, kv_b: Weight, dims: HeadDims, layer: Array | int | None
) -> tuple[Array, Array]:
    head_width = dims.qk_nope_head_dim + dims.qk_rope_head_dim
    heads, rank = q.shape[1] // head_width, kv_b.shape[-1]
    rows, size = min(q.shape[0], MAX_ROWS), _heads_a_step(heads)
    weight_operands, weight_specs = _halves(kv_b, layer, heads, size, 0)
    vmem = 2 * rows * size * (head_width + 128 + rank) * q.dtype.itemsize + 2 * size * BLOCK * rank
    return pl.pallas_call(
        functools.partial(_absorb_kernel, dims=dims, size=size, scaled=isinstance(kv_b, BlockScaled)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // size, -(-q.shape[0] // rows)),
            in_specs=[
                pl.BlockSpec((rows, size * head_width), lambda h, m, _: (m, h)),
                pl.BlockSpec((rows, dims.qk_rope_head_dim), lambda h, m, _: (m, 0)),
                *weight_specs,
            ],
            out_specs=[
                pl.BlockSpec((rows, size, rank), lambda h, m, _: (m, h, 0)),
                pl.BlockSpec((rows, size, dims.qk_rope_head_dim), lambda h, m, _: (m, h, 0)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((q.shape[0], heads, rank), q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], heads, dims.qk_rope_head_dim), q.dtype),
        ],
        compiler_params=compiler_params(("parallel", "arbitrary"), 2 * vmem),
        name="dsv3_absorb_queries",
        interpret=interpret(),
    )(layer_index(layer), q, rope, *weight_operands)


def head_values(context: Array, kv_b: Weight, dims: HeadDims, layer: Array | int | None) -> Array:
    num_rows, heads, rank = context.shape
    rows, size = min(num_rows, MAX_ROWS), _heads_a_step(heads)
    weight_operands, weight_specs = _halves(kv_b, layer, heads, size, 1)
    vmem = 2 * rows * size * (dims.v_head_dim + rank) * context.dtype.itemsize + 2 * size * BLOCK * rank
    return pl.pallas_call(
        functools.partial(_values_kernel, dims=dims, size=size, scaled=isinstance(kv_b, BlockScaled)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // size, -(-num_rows // rows)),
            in_specs=[pl.BlockSpec((rows, size, rank), lambda h, m, _: (m, h, 0)), *weight_specs],
            out_specs=pl.BlockSpec((rows, size * dims.v_head_dim), lambda h, m, _: (m, h)),
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, heads * dims.v_head_dim), context.dtype),
        compiler_params=compiler_params(("parallel", "arbitrary"), 2 * vmem),
        name="dsv3_head_values",
        interpret=interpret(),
    )(layer_index(layer), context, *weight_operands)


def _heads_a_step(heads: int) -> int:
    """A divisor of all heads: 16 where possible, all where no multiple of 8 divides them."""
    return next((size for size in (HEADS, 8) if heads % size == 0), heads)


def _halves(
    kv_b: Weight, layer: Array | int | None, heads: int, size: int, half: int
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Operands and blocks that read only the key rows (half 0) or the value rows (half 1) of a group of heads."""
    values = stacked(float_values(kv_b), layer, 3)
    rank = values.shape[-1]
    by_half = values.reshape(values.shape[0], heads, 2, -1, rank)
    block = (1, size, 1, by_half.shape[3], rank)
    operands = [by_half]
    specs = [pl.BlockSpec(block, lambda h, m, index: (index[0], h, half, 0, 0))]
    if isinstance(kv_b, BlockScaled):
        operands.append(stacked(kv_b.scales, layer, 3))
        scale_block = (1, *kv_b.scales.shape[-2:])
        specs.append(pl.BlockSpec(scale_block, lambda h, m, index: (index[0], 0, 0), memory_space=pltpu.SMEM))
    return operands, specs


def _absorb_kernel(
    layer: Any, q: Any, rope: Any, *refs: Any, dims: HeadDims, size: int, scaled: bool
) -> None:
    weight, scales = refs[0], refs[1] if scaled else None
    latent_out, rope_out = refs[-2:]
    nope, width = dims.qk_nope_head_dim, dims.qk_nope_head_dim + dims.qk_rope_head_dim
    blocks_a_head = 2 * nope // BLOCK
    for i in range(size):
        first = (pl.program_id(0) * size + i) * blocks_a_head
        head = q[:, i * width : (i + 1) * width]
        products = []
        for block in range(nope // BLOCK):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            product = _dot(head[:, rows], weight[0, i, 0, rows, :], NN)
            products.append(product if scales is None else _scale_columns(product, scales, first + block))
        latent_out[:, i, :] = functools.reduce(jnp.add, products).astype(latent_out.dtype)
        rope_out[:, i, :] = rotate_by_matmul(head[:, nope:], rope[...])


def _scale_columns(product: Array, scales: Any, row: Array) -> Array:
    parts = [
        product[:, b * BLOCK : (b + 1) * BLOCK] * scales[0, row, b] for b in range(product.shape[1] // BLOCK)
    ]
    return jnp.concatenate(parts, axis=1)


def _values_kernel(layer: Any, context: Any, *refs: Any, dims: HeadDims, size: int, scaled: bool) -> None:
    weight, scales, out = refs[0], refs[1] if scaled else None, refs[-1]
    blocks_a_head = 2 * dims.v_head_dim // BLOCK
    for i in range(size):
        for block in range(dims.v_head_dim // BLOCK):
            row = (pl.program_id(0) * size + i) * blocks_a_head + blocks_a_head // 2 + block
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            products = []
            for k in range(context.shape[-1] // BLOCK):
                columns = slice(k * BLOCK, (k + 1) * BLOCK)
                product = _dot(context[:, i, columns], weight[0, i, 0, rows, columns], NT)
                products.append(product if scales is None else product * scales[0, row, k])
            start = i * dims.v_head_dim + block * BLOCK
            out[:, start : start + BLOCK] = functools.reduce(jnp.add, products).astype(out.dtype)


def _dot(x: Array, w: Array, dimensions: Any) -> Array:
    if x.dtype == jnp.float32 or w.dtype == jnp.float32:
        return lax.dot_general(
            x.astype(jnp.float32),
            w.astype(jnp.float32),
            dimensions,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
    return lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)
