"""Ahead of time: what a program compiled for TPUs that are not there will cost, said by the production compiler.

Needs the extra `tpu` (libtpu contains the whole compiler and runs on any x86 Linux host; it executes nothing).
"""

from dsv3_jax.aot.cost import Cost, analyse, predict_seconds
from dsv3_jax.aot.kernels import KernelCall, kernel_calls
from dsv3_jax.aot.operations import Operation, large_copies, list_operations, xla_operations
from dsv3_jax.aot.schedule import KernelSchedule, kernel_schedule, llo_dump_environment
from dsv3_jax.aot.topology import CHIPS, TpuChip, topology_mesh

__all__ = [
    "CHIPS",
    "Cost",
    "KernelCall",
    "KernelSchedule",
    "Operation",
    "TpuChip",
    "analyse",
    "kernel_calls",
    "kernel_schedule",
    "large_copies",
    "list_operations",
    "llo_dump_environment",
    "predict_seconds",
    "topology_mesh",
    "xla_operations",
]
