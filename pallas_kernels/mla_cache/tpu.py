"""`write_entries` on a TPU: two latencies of the memory, and no traffic but the tiles that hold new tokens."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import compiler_params, interpret
from pallas_kernels.mla_cache.plan import LANES, Plan, make_plan, vmem_bytes
from pallas_kernels.mla_cache.tpu_kernel import kernel
from pallas_kernels.stack import float_values, layer_index, stacked


def write_entries(
    cache: Array,
    compressed: Array,
    norm_weight: Array,
    norm_eps: float,
    rope: Array,
    start: Array,
    counts: Array,
    layer: Array | int,
    norm_layer: Array | int | None,
    cache_scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array | None]:
    plan = make_plan(cache, compressed, norm_weight.shape[-1], page_table)
    caches = [cache] if cache_scales is None else [cache, cache_scales]
    scalars = [layer_index(layer), layer_index(norm_layer), start, counts]
    scalars += [] if page_table is None else [_window_pages(plan, start, page_table)]
    weight = stacked(float_values(norm_weight), norm_layer, 2)
    operands = [compressed.reshape(-1, compressed.shape[-1]), rope.reshape(-1, rope.shape[-1]), weight]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    first_cache = len(scalars) + len(operands)
    out = pl.pallas_call(
        functools.partial(
            kernel, plan=plan, eps=norm_eps, paged=page_table is not None, scaled=cache_scales is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.steps,),
            in_specs=[anywhere] * (len(operands) + len(caches)),
            out_specs=[anywhere] * len(caches),
            scratch_shapes=_scratch(plan, operands, caches),
        ),
        out_shape=[jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches],
        input_output_aliases={first_cache + i: i for i in range(len(caches))},
        compiler_params=compiler_params(("parallel",), vmem_bytes(plan)),
        name="dsv3_write_entries",
        interpret=interpret(),
    )(*scalars, *operands, *caches)
    return (out[0], None) if cache_scales is None else (out[0], out[1])


def _window_pages(plan: Plan, start: Array, page_table: Array) -> Array:
    """The page of every window that a row may write to, int32 [windows, B]: the whole table may outgrow SMEM.

    A search instead of a gather, since XLA makes one operation of it.
    """
    first = start // plan.window + jnp.arange(plan.windows)[:, None]
    wanted = (first * plan.window // plan.page_size)[..., None] == jnp.arange(page_table.shape[1])
    return jnp.max(jnp.where(wanted, page_table, -1), axis=2)


def _scratch(plan: Plan, operands: list[Array], caches: list[Array]) -> list:
    """In the order of `Refs`: operands, new entries, tiles, semaphores."""
    tokens, windows = plan.rows * plan.queries, plan.rows * plan.windows
    compressed, rope, weight = operands
    scratch = [
        pltpu.VMEM((tokens, compressed.shape[-1]), compressed.dtype),
        pltpu.VMEM((tokens, rope.shape[-1]), rope.dtype),
        pltpu.VMEM(weight.shape, weight.dtype),
        pltpu.VMEM((tokens, plan.width), jnp.int32),
        pltpu.VMEM((windows, plan.window, plan.width), caches[0].dtype),
        pltpu.SemaphoreType.DMA((3,)),
    ]
    if len(caches) == 2:
        scratch.insert(4, pltpu.VMEM((tokens, LANES), jnp.float32))
        scratch.insert(6, pltpu.VMEM((windows, 1, LANES), jnp.float32))
    return scratch
