"""`mla_decode` on a TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.chip import chip, compiler_params, interpret
from pallas_kernels.mla_decode.combine import combine
from pallas_kernels.mla_decode.plan import BUFFERS, Plan, make_plan, vmem_bytes
from pallas_kernels.mla_decode.tpu_kernel import kernel
from pallas_kernels.mla_decode.tpu_refs import LANES, Refs
from pallas_kernels.stack import layer_index


def mla_decode(
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    scale: float,
    layer: Array | int,
    cache_scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array]:
    pages_a_row = 0 if page_table is None else page_table.shape[1]
    plan = make_plan(q_latent.shape, q_rope.shape[-1], cache.shape, cache.dtype, pages_a_row, chip())
    wide = jnp.float32 in (q_latent.dtype, cache.dtype)
    compute_dtype = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
    body = functools.partial(
        _body, plan=plan, scale=scale, compute_dtype=compute_dtype, scaled=cache_scales is not None
    )
    scalars = [lengths, layer_index(layer)]
    scalars += [] if page_table is None else [page_table.reshape(-1)]
    queries = [q.reshape(plan.batch, plan.rows, q.shape[-1]) for q in (q_latent, q_rope)]
    operands = [*queries, cache] + ([] if cache_scales is None else [cache_scales])
    out_dtype = jnp.float32 if plan.split else q_latent.dtype
    parts = (plan.parts,) if plan.split else ()
    need = vmem_bytes(plan, q_latent.dtype, compute_dtype, cache.dtype)
    out, lse = pl.pallas_call(
        body,
        out_shape=[
            _result((*parts, plan.batch, plan.rows, plan.rank), out_dtype, operands),
            _result((*parts, plan.batch, 1, plan.rows), jnp.float32, operands),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.parts, plan.rows_a_part),
            in_specs=[
                _row_spec(plan, (plan.rows, plan.rank), False),
                _row_spec(plan, (plan.rows, plan.rope), False),
                *[pl.BlockSpec(memory_space=pltpu.HBM)] * (len(operands) - 2),
            ],
            out_specs=[
                _row_spec(plan, (plan.rows, plan.rank), plan.split),
                _row_spec(plan, (1, plan.rows), plan.split),
            ],
            scratch_shapes=_scratch(plan, compute_dtype, cache.dtype, cache_scales is not None),
        ),
        compiler_params=compiler_params(("parallel", "arbitrary"), need),
        interpret=interpret(),
        name="dsv3_mla_decode",
    )(*scalars, *operands)
    shape = q_latent.shape
    if plan.split:
        out, lse = combine(out, lse[..., 0, :])
    return out.astype(q_latent.dtype).reshape(shape), lse.reshape(shape[:-1])


def _result(shape: tuple[int, ...], dtype: DTypeLike, operands: list[Array]) -> jax.ShapeDtypeStruct:
    """A result that under `shard_map` differs over the mesh axes over which any operand does."""
    types = [jax.typeof(operand).manual_axis_type for operand in operands]
    varying = frozenset().union(*(axes.varying for axes in types))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=types[0].update(varying=varying))


def _row_spec(plan: Plan, shape: tuple[int, int], split: bool) -> pl.BlockSpec:
    """The matrix of a batch row; of one part's share of it where the results are `split`."""

    def index(part: Array, step: Array, *_: Array) -> tuple[Array | int, ...]:
        row = step if plan.split else part * plan.rows_a_part + step
        return (part, row, 0, 0) if split else (row, 0, 0)

    return pl.BlockSpec((*((1,) if split else ()), 1, *shape), index)


def _scratch(plan: Plan, compute_dtype: jnp.dtype, cache_dtype: jnp.dtype, scaled: bool) -> list:
    rows = plan.groups * plan.group_rows
    scores = pltpu.VMEM((plan.group_rows, plan.sub_block), jnp.float32)
    return [
        pltpu.VMEM((BUFFERS, plan.block, plan.width), cache_dtype),
        *([pltpu.VMEM((BUFFERS, 1, plan.block), jnp.float32)] if scaled else []),
        pltpu.SemaphoreType.DMA((1 + scaled, BUFFERS)),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.VMEM((rows, plan.width), compute_dtype),
        scores,
        scores,
        pltpu.VMEM((rows, plan.columns), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
    ]


def _body(*refs: Any, plan: Plan, scale: float, compute_dtype: jnp.dtype, scaled: bool) -> None:
    absent = {"table": plan.pages_a_row == 0, "scales": not scaled, "scale_buffer": not scaled}
    present = iter(refs)
    kernel(
        Refs(*(None if absent.get(name) else next(present) for name in Refs._fields)),
        plan,
        scale,
        compute_dtype,
    )
