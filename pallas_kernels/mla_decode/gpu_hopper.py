"""`mla_decode` on Hopper (sm_90a, wgmma). Compiled for sm_90a, not run on a GPU.

A thread block has a tile of 64 query rows of one batch row, and a split of its tokens. Two warpgroups compute, a third
starts copies.
"""

import functools
from typing import Any

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.gpu_call import call
from pallas_kernels.mla_decode.gpu_copies import copy_all, find_work, operand_refs
from pallas_kernels.mla_decode.gpu_hopper_attention import HopperAttention
from pallas_kernels.mla_decode.gpu_plan import GpuPlan
from pallas_kernels.mla_decode.gpu_shared import scratch, shared_refs

COPY_THREAD = 2
COPY_REGISTERS, COMPUTE_REGISTERS = 24, 240
TILE_COLUMNS = 64


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
        functools.partial(scratch, tile_columns=TILE_COLUMNS),
        q_latent,
        q_rope,
        cache,
        lengths,
        layer,
        cache_scales,
        page_table,
    )


def _body(*refs: Any, plan: GpuPlan, scale: float, out_dtype: Any, **scratch_refs: Any) -> None:
    operands = operand_refs(refs, plan)
    shared = shared_refs(scratch_refs, out_dtype)
    work = find_work(operands, plan)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == COPY_THREAD)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy_all(shared, operands, plan, work)

    @pl.when(warpgroup < COPY_THREAD)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        attention = HopperAttention(
            shared, plan, scale, warpgroup, work.tile, work.length, work.first, work.end
        )
        place = (work.split, work.row, work.tile_rows)
        attention.run(operands.out.at[place], operands.lse.at[place])
