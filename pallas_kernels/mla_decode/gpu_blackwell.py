"""`mla_decode` on Blackwell (sm_100a, tcgen05). Compiled for sm_100a, not run on a GPU.

A thread block has a tile of 64 query rows of one batch row, and a split of its tokens, as on Hopper. Products of 64
rows run at half of the tensor cores' rate, but 128 rows leave no room: their 512 columns of results fill tensor memory,
and the queries shared memory, but for one block of entries. Two warpgroups compute, a third starts copies.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.gpu_blackwell_attention import BlackwellAttention
from pallas_kernels.mla_decode.gpu_call import call
from pallas_kernels.mla_decode.gpu_copies import copy_all, find_work, operand_refs
from pallas_kernels.mla_decode.gpu_plan import BLOCK, BUFFERS, TILE_ROWS, GpuPlan
from pallas_kernels.mla_decode.gpu_shared import scratch, shared_refs

COPY_THREAD = 2
REGISTERS = {False: (96, 208), True: (80, 216)}
"""FP8 cache or not -> registers of a thread that copies, and of one that computes: found by trying, none spill."""

TILE_COLUMNS = 32
"""Of a matrix [64 tokens, columns] tcgen05 takes 32 tokens to either half of the lanes."""


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
    """Arguments as of the public function; bfloat16 queries, a bfloat16 or float8_e4m3fn cache."""
    return call(
        functools.partial(_body, scale=scale),
        _scratch,
        q_latent,
        q_rope,
        cache,
        lengths,
        layer,
        cache_scales,
        page_table,
    )


def _scratch(plan: GpuPlan, out_dtype: Any) -> dict[str, Any]:
    def ordered(arrivals: int, barriers: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=barriers, orders_tensor_core=True)

    return scratch(plan, out_dtype, TILE_COLUMNS) | {
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS) if plan.scaled else ordered(1, BUFFERS),
        "score": plgpu.TMEM((TILE_ROWS, BLOCK), jnp.float32),
        "accumulator": [plgpu.TMEM((TILE_ROWS, plan.piece), jnp.float32)] * plan.pieces,
        "scored": ordered(1, 2),
        "multiplied": ordered(1),
        "shrunk": ordered(2, 2),
    }


def _body(*refs: Any, plan: GpuPlan, scale: float, out_dtype: Any, **scratch_refs: Any) -> None:
    operands = operand_refs(refs, plan)
    shared = shared_refs(scratch_refs, out_dtype)
    work = find_work(operands, plan)
    warpgroup = lax.axis_index("warpgroup")
    copy_registers, compute_registers = REGISTERS[plan.scaled]

    @pl.when(warpgroup == COPY_THREAD)
    def _copy() -> None:
        plgpu.set_max_registers(copy_registers, action="decrease")
        copy_all(shared, operands, plan, work)

    @pl.when(warpgroup < COPY_THREAD)
    def _compute() -> None:
        plgpu.set_max_registers(compute_registers, action="increase")
        attention = BlackwellAttention(
            shared, plan, scale, warpgroup, work.tile, work.length, work.first, work.end
        )
        place = (work.split, work.row, work.tile_rows)
        attention.run(operands.out.at[place], operands.lse.at[place])
