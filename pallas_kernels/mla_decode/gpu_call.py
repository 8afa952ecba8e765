"""The call of `mla_decode`'s GPU kernels, and what XLA does around them: padding, and joining the splits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chip import gpu_chip, interpret
from pallas_kernels.mla_decode.combine import combine
from pallas_kernels.mla_decode.gpu_plan import ROPE_COLUMNS, TILE_ROWS, GpuPlan, make_plan
from pallas_kernels.stack import layer_index

WARPGROUPS = 3


def call(
    body: Callable[..., None],
    scratch: Callable[[GpuPlan, Any], dict[str, Any]],
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    layer: Array | int,
    cache_scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array]:
    """Runs a kernel of three warpgroups on every (batch row, split of its tokens, tile of its query rows).

    Args:
        body: takes references to the operands (those of `Operands`), to scratch by name, `plan` and `out_dtype`.
        scratch: types of the scratch, from plan and type of the results.
        q_latent, ...: as of the public function.
    """
    chip = gpu_chip()
    assert chip is not None
    plan = make_plan(q_latent.shape, cache, page_table, chip)
    operands = [lengths, layer_index(layer)] + ([] if page_table is None else [page_table])
    operands += [_rows(q_latent, plan, plan.rank), _rows(q_rope, plan, ROPE_COLUMNS)]
    operands += [cache] + ([] if cache_scales is None else [cache_scales])
    out_dtype = q_latent.dtype if plan.splits == 1 else jnp.dtype(jnp.float32)
    out, lse = plgpu.kernel(
        functools.partial(body, plan=plan, out_dtype=out_dtype),
        out_type=[
            jax.ShapeDtypeStruct((plan.splits, plan.batch, plan.padded_rows, plan.rank), out_dtype),
            jax.ShapeDtypeStruct((plan.splits, plan.batch, plan.tiles * TILE_ROWS), jnp.float32),
        ],
        scratch_types=scratch(plan, out_dtype),
        grid=(plan.batch, plan.splits, plan.tiles),
        grid_names=("row", "split", "tile"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret(),
        kernel_name="dsv3_mla_decode",
    )(*operands)
    out, lse = out[:, :, : plan.rows], lse[..., : plan.rows]
    out, lse = (out[0], lse[0]) if plan.splits == 1 else combine(out, lse)
    return out.astype(q_latent.dtype).reshape(q_latent.shape), lse.reshape(q_latent.shape[:-1])


def _rows(query: Array, plan: GpuPlan, columns: int) -> Array:
    """[B, Q, H, D] as [B, padded_rows, columns], with zeros."""
    rows = query.reshape(plan.batch, plan.rows, query.shape[-1])
    return jnp.pad(rows, ((0, 0), (0, plan.padded_rows - plan.rows), (0, columns - rows.shape[-1])))
