"""Grouped matmul on a TPU: every chosen matrix streams through VMEM once, whatever the number of its rows.

The grid walks along the blocks of columns and, within one, along the visits: the pairs of a group and a row tile that
share rows. All of K is in a block, so that consecutive visits of a group find its weights in place; inside a visit
only the chunks of rows that the group has are multiplied.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_scaled import BLOCK, BlockScaled, Weight, num_blocks
from pallas_kernels.block_scaled_matmul.tpu_tile import TILE_COLUMNS, Operand, multiply_tile
from pallas_kernels.chip import chip, compiler_params, interpret
from pallas_kernels.gradient import with_gradient_of
from pallas_kernels.group_rows import Visits, plan_visits
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.rows import chunk_rows, row_tile
from pallas_kernels.quantize import ScaleFormat, quantize_activations
from pallas_kernels.stack import float_values, layer_index, stacked

Index = tuple[Any, ...]


def unsupported(weight: Weight) -> str | None:
    """Why the kernel cannot multiply by `weight`; None if it can."""
    return "a float16 weight" if float_values(weight).dtype == jnp.float16 else None


def grouped_matmul(
    x: Array,
    weights: tuple[Weight, ...],
    group_sizes: Array,
    visits: Visits | None,
    row_scale: Array | None,
    layer: Array | int | None,
    activations: str,
    scale_fmt: ScaleFormat,
) -> Array:
    """One matrix a group, or gate and up of SwiGLU; arguments as of the public functions."""
    if visits is None:
        tile = row_tile(x.shape[0], group_sizes.shape[0])
        visits = plan_visits(group_sizes, num_rows=x.shape[0], row_tile=tile)
    formats = {"activations": activations, "scale_fmt": scale_fmt}
    function = with_gradient_of(
        functools.partial(reference.grouped_matmul, **formats), functools.partial(_forward, **formats)
    )
    return function(x, weights, group_sizes, visits, row_scale, layer)


def _forward(
    x: Array,
    weights: tuple[Weight, ...],
    group_sizes: Array,
    visits: Visits,
    row_scale: Array | None,
    layer: Array | int | None,
    activations: str,
    scale_fmt: ScaleFormat,
) -> Array:
    row_scales = None
    out_dtype = x.dtype
    if activations == "float8" and isinstance(weights[0], BlockScaled):
        x, row_scales = quantize_activations(x, scale_fmt=scale_fmt, implementation="pallas")
        # FP8 rows come in tiles of 32: smaller chunks, and chips without FP8 products, take them in bfloat16.
        if not chip().native_float8 or chunk_rows(x.shape[0], group_sizes.shape[0]) < 32:
            x = x.astype(jnp.bfloat16)
    num_rows, depth = x.shape
    num_columns = weights[0].shape[-2]
    values = [stacked(float_values(w), layer, 4) for w in weights]
    tile = row_tile(num_rows, values[0].shape[1])
    bytes_a_column = sum(v.dtype.itemsize for v in values) * depth
    columns = block_columns(num_columns, bytes_a_column)

    operands, specs = [x], [pl.BlockSpec((tile, depth), rows_index)]
    if row_scales is not None:
        operands.append(row_scales)
        specs.append(pl.BlockSpec((tile, row_scales.shape[1]), rows_index))
    for weight, value in zip(weights, values, strict=True):
        operands.append(value)
        specs.append(pl.BlockSpec((1, 1, columns, depth), weight_index))
        if isinstance(weight, BlockScaled):
            operands.append(stacked(weight.scales, layer, 4))
            scale_block = (1, 1, *weight.scales.shape[-2:])
            specs.append(pl.BlockSpec(scale_block, scale_index, memory_space=pltpu.SMEM))
    if row_scale is not None:
        operands.append(row_scale.astype(jnp.float32)[:, None])
        specs.append(pl.BlockSpec((tile, 1), rows_index))
    row_bytes = depth * x.dtype.itemsize + columns * out_dtype.itemsize
    # Numbers of a row fill whole registers.
    row_bytes += (
        4 * BLOCK * ((row_scale is not None) + (0 if row_scales is None else num_blocks(row_scales.shape[1])))
    )
    vmem = 2 * (tile * row_bytes + columns * bytes_a_column)
    last_tile = -(-num_rows // tile) - 1
    kernel = functools.partial(
        _kernel,
        num_weights=len(weights),
        scaled=isinstance(weights[0], BlockScaled),
        quantized=row_scales is not None,
        has_row_scale=row_scale is not None,
        chunk=chunk_rows(num_rows, values[0].shape[1]),
        last_tile=last_tile,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(-(-num_columns // columns), visits.visit_group.shape[0]),
            in_specs=specs,
            out_specs=pl.BlockSpec((tile, columns), functools.partial(out_index, last_tile=last_tile)),
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype),
        compiler_params=compiler_params(("parallel", "arbitrary"), vmem + 8 * tile * TILE_COLUMNS),
        name="dsv3_grouped_" + ("matmul" if len(weights) == 1 else "swiglu"),
        interpret=interpret(),
    )(
        layer_index(layer),
        visits.visit_group,
        visits.visit_tile,
        visits.num_visits,
        visits.starts,
        *operands,
    )


def block_columns(num_columns: int, bytes_a_column: int) -> int:
    """Columns of a block of about 4 MB of weights, such that few hang over the edge.

    Args:
        num_columns: N.
        bytes_a_column: of what makes one column: a row of every weight.
    """
    widest = max((4 << 20) // bytes_a_column // TILE_COLUMNS, 1) * TILE_COLUMNS
    if num_columns <= widest:
        return num_columns
    return min(range(TILE_COLUMNS, widest + 1, TILE_COLUMNS), key=lambda c: (-(-num_columns // c) * c, -c))


def rows_index(n: Any, v: Any, layer: Any, group: Any, tile: Any, count: Any, starts: Any) -> Index:
    """Block of x at grid step (n, v)."""
    return tile[v], 0


def weight_index(n: Any, v: Any, layer: Any, group: Any, tile: Any, count: Any, starts: Any) -> Index:
    """Block of a weight: its index stays what it is while a group lasts, and after the last visit."""
    return layer[0], group[v], n, 0


def scale_index(n: Any, v: Any, layer: Any, group: Any, tile: Any, count: Any, starts: Any) -> Index:
    """All scales of the group's matrix."""
    return layer[0], group[v], 0, 0


def out_index(
    n: Any, v: Any, layer: Any, group: Any, tile: Any, count: Any, starts: Any, last_tile: int
) -> Index:
    """Block of the result."""
    return out_tile(v, tile, count, last_tile), n


def out_tile(v: Any, tile: Any, count: Any, last_tile: int) -> Any:
    """Row tile of the result at visit v: beyond the last visit come the tiles without rows, to be zeroed."""
    final = jnp.where(count[0] > 0, tile[jnp.maximum(count[0] - 1, 0)], -1)
    return jnp.where(v < count[0], tile[v], jnp.minimum(final + 1 + v - count[0], last_tile))


def _kernel(
    layer: Any,
    group: Any,
    tile: Any,
    count: Any,
    starts: Any,
    x: Any,
    *refs: Any,
    num_weights: int,
    scaled: bool,
    quantized: bool,
    has_row_scale: bool,
    chunk: int,
    last_tile: int,
) -> None:
    remaining = list(refs)
    row_scales = remaining.pop(0) if quantized else None
    operands = [Operand(remaining.pop(0), remaining.pop(0) if scaled else None) for _ in range(num_weights)]
    row_scale = remaining.pop(0) if has_row_scale else None
    (out,) = remaining
    tile_rows, columns = out.shape
    n, v = pl.program_id(0), pl.program_id(1)
    here, before = (out_tile(u, tile, count, last_tile) for u in (v, jnp.maximum(v - 1, 0)))

    @pl.when((v == 0) | (here != before))
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    def multiply(i: Array, carry: int, column: Any, width: int) -> int:
        start = pl.multiple_of(i * chunk, chunk)
        rows = pl.ds(start, chunk)
        block = n * (columns // BLOCK) + column // BLOCK
        products = [multiply_tile(x, row_scales, w, rows, column, width, block) for w in operands]
        parts = (
            products[0] if num_weights == 1 else [jax.nn.silu(g) * u for g, u in zip(*products, strict=True)]
        )
        row = tile[v] * tile_rows + start + lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
        inside = (row >= starts[group[v]]) & (row < starts[group[v] + 1])
        for j, part in enumerate(parts):
            lanes = pl.ds(column + j * BLOCK, part.shape[-1])
            if row_scale is not None:
                part = part * row_scale[rows, :]
            out[rows, lanes] = jnp.where(inside, part.astype(out.dtype), out[rows, lanes])
        return carry

    @pl.when(v < count[0])
    def _() -> None:
        base = tile[v] * tile_rows
        first = jnp.maximum(starts[group[v]] - base, 0) // chunk
        end = (jnp.minimum(starts[group[v] + 1] - base, tile_rows) + chunk - 1) // chunk
        full, rest = divmod(columns, TILE_COLUMNS)
        for column in range(full):
            lax.fori_loop(
                first, end, functools.partial(multiply, column=column * TILE_COLUMNS, width=TILE_COLUMNS), 0
            )
        if rest:
            lax.fori_loop(first, end, functools.partial(multiply, column=full * TILE_COLUMNS, width=rest), 0)
