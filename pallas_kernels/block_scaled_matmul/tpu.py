"""Block-scaled matmul on a TPU: weights stream through VMEM once, the rows stay there.

One kernel for all: one weight or a SwiGLU pair, FP8 or plain, FP8 activations, RMSNorm in front, residual behind.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight
from pallas_kernels.block_scaled_matmul import reference
from pallas_kernels.block_scaled_matmul.tpu_tile import TILE_COLUMNS, TILE_ROWS, Operand, multiply_tile
from pallas_kernels.chip import chip, compiler_params, interpret
from pallas_kernels.gradient import with_gradient_of
from pallas_kernels.normalize import Norm, normalize, rms_norm
from pallas_kernels.quantize import ScaleFormat, quantize_activations
from pallas_kernels.stack import float_values, layer_index, row_of_layer, stacked, vector_spec

MAX_ROWS = 512
"""Rows that are kept in VMEM; more are taken in turns against every block of the weight."""


def unsupported(weight: Weight) -> str | None:
    """Why the kernel cannot multiply by `weight`; None if it can."""
    return "a float16 weight" if float_values(weight).dtype == jnp.float16 else None


def block_scaled_matmul(
    x: Array,
    weights: tuple[Weight, ...],
    layer: Array | int | None,
    norm: Norm | None,
    residual: Array | None,
    activations: str,
    scale_fmt: ScaleFormat,
    out_dtype: jnp.dtype,
) -> Array:
    """One weight, or gate and up of SwiGLU; arguments as of the public functions."""
    formats = {"activations": activations, "scale_fmt": scale_fmt, "out_dtype": out_dtype}
    function = with_gradient_of(
        functools.partial(reference.block_scaled_matmul, **formats), functools.partial(_forward, **formats)
    )
    return function(x, weights, layer, norm, residual)


def _forward(
    x: Array,
    weights: tuple[Weight, ...],
    layer: Array | int | None,
    norm: Norm | None,
    residual: Array | None,
    activations: str,
    scale_fmt: ScaleFormat,
    out_dtype: jnp.dtype,
) -> Array:
    num_columns = weights[0].shape[-2]
    rows, row_scales = x.reshape(-1, x.shape[-1]), None
    quantized = activations == "float8" and isinstance(weights[0], BlockScaled)
    if quantized:
        rows, row_scales = quantize_activations(
            rows, scale_fmt=scale_fmt, norm=norm, layer=layer, implementation="pallas"
        )
        norm = None
        if not chip().native_float8:
            rows = rows.astype(jnp.bfloat16)
    if norm is not None and rows.shape[0] > MAX_ROWS:
        rows, norm = rms_norm(rows, norm, layer), None
    flat_residual = None if residual is None else residual.reshape(-1, num_columns)
    out = _call(rows, row_scales, weights, layer, norm, flat_residual, out_dtype)
    return out.reshape(*x.shape[:-1], num_columns)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the product is cut.

    Attributes:
        rows: of x at a time; all of K.
        columns: of the result at a time; all of K.
        turns: blocks of columns for each core.
        cores: over which they are split.
    """

    rows: int
    columns: int
    turns: int
    cores: int


def choose_blocks(num_rows: int, num_columns: int, bytes_a_column: int) -> Blocks:
    """Blocks of 2 MB, of 4 MB where arithmetic counts more: the transfer of the first one is not hidden.

    Args:
        num_rows: M.
        num_columns: N.
        bytes_a_column: of what makes one column: a row of every weight.
    """
    rows, cores = min(num_rows, MAX_ROWS), chip().cores
    limit = (2 if num_rows <= 32 else 4) << 20
    widest = max(limit // bytes_a_column // TILE_COLUMNS, 1) * TILE_COLUMNS
    if num_columns <= TILE_COLUMNS or (num_columns <= widest and cores == 1 and num_rows > 32):
        return Blocks(rows, num_columns, 1, 1)

    def turns(columns: int) -> int:
        return -(-num_columns // (columns * cores))

    columns = min(range(TILE_COLUMNS, widest + 1, TILE_COLUMNS), key=lambda c: (turns(c) * c, -c))
    return Blocks(rows, columns, turns(columns), cores)


def _call(
    x: Array,
    row_scales: Array | None,
    weights: tuple[Weight, ...],
    layer: Array | int | None,
    norm: Norm | None,
    residual: Array | None,
    out_dtype: jnp.dtype,
) -> Array:
    num_rows, depth = x.shape
    num_columns = weights[0].shape[-2]
    values = [stacked(float_values(w), layer, 3) for w in weights]
    blocks = choose_blocks(num_rows, num_columns, sum(v.dtype.itemsize for v in values) * depth)
    last = -(-num_columns // blocks.columns) - 1

    def column_block(core: Array, turn: Array) -> Array:
        # With an odd number of blocks for two cores the last one is made twice.
        return jnp.minimum(core * blocks.turns + turn, last)

    operands, specs = [x], [pl.BlockSpec((blocks.rows, depth), lambda c, n, m, _: (m, 0))]
    if row_scales is not None:
        operands.append(row_scales)
        specs.append(pl.BlockSpec((blocks.rows, row_scales.shape[1]), lambda c, n, m, _: (m, 0)))
    if norm is not None:
        operands.append(stacked(float_values(norm.weight), layer, 2))
        specs.append(vector_spec(operands[-1]))
    for weight, value in zip(weights, values, strict=True):
        operands.append(value)
        specs.append(
            pl.BlockSpec((1, blocks.columns, depth), lambda c, n, m, index: (index[0], column_block(c, n), 0))
        )
        if isinstance(weight, BlockScaled):
            operands.append(stacked(weight.scales, layer, 3))
            specs.append(
                pl.BlockSpec(
                    (1, *weight.scales.shape[-2:]),
                    lambda c, n, m, index: (index[0], 0, 0),
                    memory_space=pltpu.SMEM,
                )
            )
    tile_spec = pl.BlockSpec((blocks.rows, blocks.columns), lambda c, n, m, _: (m, column_block(c, n)))
    if residual is not None:
        operands.append(residual)
        specs.append(tile_spec)
    # x, result and residual twice, for the pipeline, and x once more where it is normed here.
    row_bytes = (2 + (norm is not None)) * depth * x.dtype.itemsize + 16 * blocks.columns
    if row_scales is not None:
        # Scales of rows, spread over whole registers; the compiler keeps some of them for later blocks.
        row_bytes += 4 * 4 * -(-row_scales.shape[1] // 128) * 128
    vmem = blocks.rows * row_bytes + 2 * blocks.columns * depth * sum(v.dtype.itemsize for v in values)
    scratch = [] if norm is None else [pltpu.VMEM((blocks.rows, depth), x.dtype)]
    kernel = functools.partial(
        _kernel,
        num_weights=len(weights),
        scaled=isinstance(weights[0], BlockScaled),
        quantized=row_scales is not None,
        eps=None if norm is None else norm.eps,
        has_residual=residual is not None,
        column_block=column_block,
        blocks=blocks,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks.cores, blocks.turns, -(-num_rows // blocks.rows)),
            in_specs=specs,
            out_specs=tile_spec,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype),
        compiler_params=compiler_params(("parallel", "arbitrary", "arbitrary"), vmem),
        name="dsv3_block_scaled_" + ("matmul" if len(weights) == 1 else "swiglu"),
        interpret=interpret(),
    )(layer_index(layer), *operands)


def _kernel(
    layer: Any,
    x: Any,
    *refs: Any,
    num_weights: int,
    scaled: bool,
    quantized: bool,
    eps: float | None,
    has_residual: bool,
    column_block: Any,
    blocks: Blocks,
) -> None:
    remaining = list(refs)
    row_scales = remaining.pop(0) if quantized else None
    norm_weight = remaining.pop(0) if eps is not None else None
    operands = [Operand(remaining.pop(0), remaining.pop(0) if scaled else None) for _ in range(num_weights)]
    residual = remaining.pop(0) if has_residual else None
    out = remaining.pop(0)
    if norm_weight is not None and eps is not None:
        normed = remaining.pop(0)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            normed[...] = normalize(x[...], row_of_layer(norm_weight, layer[0]), eps)

        x = normed
    first = column_block(pl.program_id(0), pl.program_id(1)) * (blocks.columns // BLOCK)

    def tile(rows: Any, column: Array | int, width: int) -> None:
        block = first + column // BLOCK
        products = [multiply_tile(x, row_scales, w, rows, column, width, block) for w in operands]
        parts = (
            products[0] if num_weights == 1 else [jax.nn.silu(g) * u for g, u in zip(*products, strict=True)]
        )
        for i, part in enumerate(parts):
            lanes = pl.ds(column + i * BLOCK, part.shape[-1])
            if residual is not None:
                rounded = part.astype(out.dtype).astype(jnp.float32)
                part = residual[rows, lanes].astype(jnp.float32) + rounded
            out[rows, lanes] = part.astype(out.dtype)

    for_tiles(blocks.rows, blocks.columns, _tile_rows(num_weights, quantized, x.shape[-1]), tile)


def _tile_rows(num_weights: int, quantized: bool, depth: int) -> int:
    """Rows of a tile: as many as the registers take, fewer where every row has scales of its own."""
    if not quantized:
        return TILE_ROWS // num_weights
    return 64 // num_weights if chip().native_float8 and depth <= 8192 else 32


def for_tiles(num_rows: int, num_columns: int, tile_rows: int, tile: Any) -> None:
    """Calls tile(rows, column, width) for all tiles of a block, one column of tiles after the other.

    Full tiles are one loop in the compiled kernel, whose size does not grow with the block.
    """
    row_tiles, rest_rows = divmod(num_rows, tile_rows)

    def column_of_tiles(column: Array | int, width: int) -> None:
        if row_tiles == 1:
            tile(pl.ds(0, tile_rows), column, width)
        elif row_tiles:

            def step(i: Array, carry: int) -> int:
                tile(pl.ds(pl.multiple_of(i * tile_rows, tile_rows), tile_rows), column, width)
                return carry

            lax.fori_loop(0, row_tiles, step, 0)
        if rest_rows:
            tile(pl.ds(row_tiles * tile_rows, rest_rows), column, width)

    full, rest = divmod(num_columns, TILE_COLUMNS)
    if full == 1:
        column_of_tiles(0, TILE_COLUMNS)
    elif full:

        def column_step(i: Array, carry: int) -> int:
            column_of_tiles(pl.multiple_of(i * TILE_COLUMNS, TILE_COLUMNS), TILE_COLUMNS)
            return carry

        lax.fori_loop(0, full, column_step, 0)
    if rest:
        column_of_tiles(full * TILE_COLUMNS, rest)
