"""What block scales cost: the same product by a plain blocked kernel that leaves the scales out.

The yardstick of `dsv3_block_scaled_matmul` where arithmetic counts more than memory; the best of its blocks and both
orientations of the weight stands for what the matrix unit takes.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_case import Case
from pallas_kernels.chip import compiler_params

ROWS = (128, 512)
OUT, IN = 2048, 7168
LAYERS = 37
"""More than VMEM holds, as in `tpu_cases_matmul`."""
BLOCKS = ((1792, 1024), (1024, 1024), (1024, 512))
"""Of K and N."""


def unscaled_cases() -> list[Case]:
    """bfloat16 rows times one FP8 matrix [2048, 7168] of a stack, without scales."""
    return [case for rows in ROWS for case in _cases(rows)]


def _cases(rows: int) -> Iterator[Case]:
    for depth, columns in BLOCKS:
        for transposed in (True, False):
            shape = (OUT, IN) if transposed else (IN, OUT)
            order = "(out, in)" if transposed else "(in, out)"
            yield Case(
                kernel="unscaled_matmul",
                label=f"{order} in blocks of {depth} x {columns}, M = {rows}",
                function=functools.partial(_product, depth, columns, transposed),
                arguments=(
                    jax.ShapeDtypeStruct((rows, IN), jnp.bfloat16),
                    jax.ShapeDtypeStruct((1,), jnp.int32),
                    jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float8_e4m3fn),
                ),
                ideal_bytes=OUT * IN + 2 * rows * (IN + OUT),
            )


def _product(depth: int, columns: int, transposed: bool, x: Array, layer: Array, weight: Array) -> Array:
    rows = x.shape[0]
    if transposed:
        weight_spec = pl.BlockSpec((1, columns, depth), lambda n, k, index: (index[0], n, k))
    else:
        weight_spec = pl.BlockSpec((1, depth, columns), lambda n, k, index: (index[0], k, n))
    return pl.pallas_call(
        functools.partial(_kernel, 1 if transposed else 0),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(OUT // columns, IN // depth),
            in_specs=[pl.BlockSpec((rows, depth), lambda n, k, _: (0, k)), weight_spec],
            out_specs=pl.BlockSpec((rows, columns), lambda n, k, _: (0, n)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, OUT), x.dtype),
        compiler_params=compiler_params(
            ("parallel", "arbitrary"), 2 * (rows * (2 * depth + 6 * columns) + depth * columns)
        ),
        name="unscaled_matmul",
    )(layer, x, weight)


def _kernel(contract: int, layer: Any, x: Any, weight: Any, out: Any, total: Any) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    dimensions = (((1,), (contract,)), ((), ()))
    total[...] += lax.dot_general(x[...], weight[0], dimensions, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)
