"""Activations to FP8 on a TPU, with what makes them fused in front: RMSNorm or SwiGLU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_scaled import BLOCK, num_blocks
from pallas_kernels.chip import compiler_params, interpret
from pallas_kernels.normalize import Norm
from pallas_kernels.quantize.plan import CHUNK, block_rows
from pallas_kernels.quantize.rounding import float8_scales, round_to_float8
from pallas_kernels.stack import float_values, layer_index, stacked

GROUP = 8
"""Blocks that are written out in the kernel; the groups are a loop, so that its size does not grow with K."""

NORM_ROWS = 8
"""Rows of the stack of norm weights that are fetched together: its sublane tile."""

Columns = Callable[[Any, Any], Array]
"""(rows, columns) of a block in VMEM -> float32 values that are quantised."""


def quantize_activations(
    x: Array,
    scale_fmt: str | None,
    norm: Norm | None,
    layer: Array | int | None,
) -> tuple[Array, Array]:
    if norm is None:
        return _call(_plain, "dsv3_quantize_activations", [x], None, None, scale_fmt)
    kernel = functools.partial(_normed, eps=norm.eps)
    weights = stacked(float_values(norm.weight), layer, 2)
    return _call(kernel, "dsv3_quantize_rms_norm", [x], weights, layer, scale_fmt)


def swiglu_quantize(gate: Array, up: Array, scale_fmt: str | None) -> tuple[Array, Array]:
    return _call(_swiglu, "dsv3_quantize_swiglu", [gate, up], None, None, scale_fmt)


def _call(
    kernel: Callable,
    name: str,
    inputs: list[Array],
    norm_weights: Array | None,
    norm_layer: Array | int | None,
    scale_fmt: str | None,
) -> tuple[Array, Array]:
    shape, dtype = inputs[0].shape, inputs[0].dtype
    depth = shape[-1]
    operands = [x.reshape(-1, depth) for x in inputs]
    num_rows, blocks = operands[0].shape[0], num_blocks(depth)
    bytes_a_row = len(inputs) * depth * dtype.itemsize
    rows = block_rows(num_rows, bytes_a_row)
    vmem = 2 * rows * (bytes_a_row + depth + (-blocks % BLOCK + blocks) * 4)
    specs = [pl.BlockSpec((rows, depth), lambda m, _: (m, 0))] * len(inputs)
    if norm_weights is not None:
        norm_rows = min(NORM_ROWS, norm_weights.shape[0])
        operands.append(norm_weights)
        specs.append(pl.BlockSpec((norm_rows, depth), lambda m, layer: (layer[0] // norm_rows, 0)))
        vmem += 2 * 16 * depth * norm_weights.dtype.itemsize + rows * depth * 4
    values, scales = pl.pallas_call(
        functools.partial(kernel, scale_fmt=scale_fmt),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(num_rows, rows),),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((rows, depth), lambda m, _: (m, 0)),
                pl.BlockSpec((rows, blocks), lambda m, _: (m, 0)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, depth), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((num_rows, blocks), jnp.float32),
        ],
        compiler_params=compiler_params(("parallel",), vmem),
        name=name,
        interpret=interpret(),
    )(layer_index(norm_layer), *operands)
    return values.reshape(shape), scales.reshape(*shape[:-1], blocks)


def _plain(_: Any, x: Any, values: Any, scales: Any, *, scale_fmt: str | None) -> None:
    def columns(rows: Any, lanes: Any) -> Array:
        return x[rows, lanes].astype(jnp.float32)

    _for_chunks(x.shape[0], lambda rows: _quantize(columns, rows, values, scales, scale_fmt))


def _swiglu(_: Any, gate: Any, up: Any, values: Any, scales: Any, *, scale_fmt: str | None) -> None:
    def columns(rows: Any, lanes: Any) -> Array:
        hidden = jax.nn.silu(gate[rows, lanes].astype(jnp.float32)) * up[rows, lanes].astype(jnp.float32)
        return hidden.astype(gate.dtype).astype(jnp.float32)

    _for_chunks(gate.shape[0], lambda rows: _quantize(columns, rows, values, scales, scale_fmt))


def _normed(
    layer: Any, x: Any, weights: Any, values: Any, scales: Any, *, scale_fmt: str | None, eps: float
) -> None:
    depth = x.shape[1]
    row = layer[0] % weights.shape[0]

    def chunk(rows: Any) -> None:
        def add_squares(lanes: Any, _: Any, total: Array) -> Array:
            part = x[rows, lanes].astype(jnp.float32)
            return total + jnp.sum(part * part, axis=1, keepdims=True)

        total = _for_blocks(depth, add_squares, jnp.zeros((rows.size, 1), jnp.float32))
        factor = lax.rsqrt(total / depth + eps)

        def columns(rows: Any, lanes: Any) -> Array:
            normalised = (x[rows, lanes].astype(jnp.float32) * factor).astype(x.dtype)
            weight = weights[:, lanes].astype(jnp.float32)
            # A sum over rows, since packed rows can't be addressed one by one.
            chosen = lax.broadcasted_iota(jnp.int32, weight.shape, 0) == row
            weight = jnp.sum(jnp.where(chosen, weight, 0), axis=0, keepdims=True)
            return (weight.astype(x.dtype) * normalised).astype(jnp.float32)

        _quantize(columns, rows, values, scales, scale_fmt)

    _for_chunks(x.shape[0], chunk)


def _quantize(columns: Columns, rows: Any, values: Any, scales: Any, scale_fmt: str | None) -> None:
    lane = lax.broadcasted_iota(jnp.int32, (rows.size, scales.shape[1]), 1)

    def quantize_block(lanes: Any, block: Any, row_scales: Array) -> Array:
        part = columns(rows, lanes)
        amax = jnp.max(jnp.abs(part), axis=1, keepdims=True)
        scale = float8_scales(amax, scale_fmt, in_kernel=True)
        values[rows, lanes] = round_to_float8(part, scale, in_kernel=True)
        return jnp.where(lane == block, scale, row_scales)

    scales[rows, :] = _for_blocks(values.shape[1], quantize_block, jnp.zeros(lane.shape, jnp.float32))


def _for_chunks(num_rows: int, work: Callable[[Any], None]) -> None:
    chunks, rest = divmod(num_rows, CHUNK)

    def step(i: Array, carry: int) -> int:
        work(pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK))
        return carry

    if chunks:
        lax.fori_loop(0, chunks, step, 0)
    if rest:
        work(pl.ds(chunks * CHUNK, rest))


def _for_blocks(depth: int, work: Callable[[Any, Any, Array], Array], carry: Array) -> Array:
    """Folds work(lanes, number of the block, carry) over the blocks of 128 columns; the last one may be short."""

    def group(i: Array, carry: Array) -> Array:
        for j in range(GROUP):
            block = i * GROUP + j
            carry = work(pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK), block, carry)
        return carry

    groups = depth // (BLOCK * GROUP)
    if groups:
        carry = lax.fori_loop(0, groups, group, carry)
    for block in range(groups * GROUP, num_blocks(depth)):
        carry = work(pl.ds(block * BLOCK, min(BLOCK, depth - block * BLOCK)), block, carry)
    return carry
