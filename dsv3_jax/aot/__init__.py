"""Ahead of time: what a program compiled for chips that are not there will cost, said by the production compilers.

Needs the extra `tpu` (libtpu contains the whole compiler and runs on any x86 Linux host; it executes nothing), for GPUs
the CUDA plugin (see `gpu_topology`).
"""

from dsv3_jax.aot.cost import Cost, analyse, predict_seconds
from dsv3_jax.aot.gpu_topology import GPUS, GpuModel, gpu_mesh
from dsv3_jax.aot.kernels import KernelCall, kernel_calls
from dsv3_jax.aot.operations import Operation, large_copies, list_operations, xla_operations
from dsv3_jax.aot.ptxas import PtxKernel, captured_stderr, dump_environment, ptxas_errors, read_kernels
from dsv3_jax.aot.schedule import KernelSchedule, kernel_schedule, llo_dump_environment
from dsv3_jax.aot.topology import CHIPS, TpuChip, topology_mesh

__all__ = [
    "CHIPS",
    "GPUS",
    "Cost",
    "GpuModel",
    "KernelCall",
    "KernelSchedule",
    "Operation",
    "PtxKernel",
    "TpuChip",
    "analyse",
    "captured_stderr",
    "dump_environment",
    "gpu_mesh",
    "kernel_calls",
    "kernel_schedule",
    "large_copies",
    "list_operations",
    "llo_dump_environment",
    "predict_seconds",
    "ptxas_errors",
    "read_kernels",
    "topology_mesh",
    "xla_operations",
]
