"""The Pallas kernels of a compiled TPU program: their pipelines' HBM bytes, and the VMEM that they use."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from dsv3_jax.aot.hlo_program import Computation, HloOp, HloProgram
from dsv3_jax.aot.pallas_blocks import PallasKernel, read_kernel


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One `pallas_call` of a program.

    Attributes:
        name: its `name=`, as long as that ends in no number.
        pipeline: grid, and what is moved of every operand and result.
        read_bytes, write_bytes: HBM bytes of the pipeline's blocks; NaN if the kernel moves HBM data by hand or has a
            dynamic grid.
        claimed_bytes: the author's `pl.CostEstimate`, which nothing checks, less the operands that the compiler has
            placed in VMEM; None without one.
        vmem_bytes: scoped VMEM in use.
        vmem_limit_bytes: scoped VMEM reserved.
    """

    name: str
    pipeline: PallasKernel
    read_bytes: float
    write_bytes: float
    claimed_bytes: int | None
    vmem_bytes: int
    vmem_limit_bytes: int


def is_kernel(op: HloOp) -> bool:
    """Whether `op` calls a Pallas TPU kernel."""
    return op.target == "tpu_custom_call"


def read_call(
    computation: Computation,
    op: HloOp,
    *,
    scalars: Sequence[np.ndarray] | None = None,
    grid: tuple[int, ...] | None = None,
) -> KernelCall:
    """The kernel that `op` calls; `scalars` and `grid` as in `pallas_blocks.read_kernel`."""
    operands, results = computation.operand_arrays(op), op.results()
    arrays = operands + results
    pipeline = read_kernel(
        op.attribute(r'"body":"([^"]*)"') or "",
        [array.elements for array in arrays],
        scalars=scalars,
        grid=grid,
    )
    parts = [
        array.hbm_bytes and (math.nan if moved is None else array.hbm_bytes * moved / array.elements)
        for array, moved in zip(arrays, pipeline.moved_elements, strict=True)
    ]
    claim = op.attribute(r'"bytes_accessed":"(\d+)"')
    in_vmem = sum(array.size_bytes for array in arrays if not array.hbm_bytes)
    return KernelCall(
        name=re.sub(r"\.\d+$", "", op.name),
        pipeline=pipeline,
        read_bytes=sum(parts[: len(operands)]),
        write_bytes=sum(parts[len(operands) :]),
        claimed_bytes=None if claim is None else max(0, int(claim) - round(in_vmem)),
        vmem_bytes=_scoped_vmem(op, "used_scoped_memory_configs"),
        vmem_limit_bytes=_scoped_vmem(op, "scoped_memory_configs"),
    )


def _scoped_vmem(op: HloOp, key: str) -> int:
    size = op.attribute(rf'"{key}":\[{{"memory_space":"1","offset":"\d+","size":"(\d+)"')
    return int(size or 0)


def kernel_calls(
    text: str, *, scalars: Sequence[np.ndarray] | None = None, grid: tuple[int, ...] | None = None
) -> list[KernelCall]:
    """All kernels in the optimised program `text`, each call once, whatever loops it stands in.

    Args:
        scalars: values of the prefetched scalars, for a program whose fetches depend on data.
        grid: stands for a grid that is known at run time only.
    """
    return [
        read_call(computation, op, scalars=scalars, grid=grid)
        for computation in HloProgram(text).computations.values()
        for op in computation.ops.values()
        if is_kernel(op)
    ]
