"""NVIDIA GPUs that are not there, to compile for: the CUDA plugin contains the whole compiler and asks for no driver.

Needs the extra `gpu-aot`, the plugin without NVIDIA's libraries; `ptxas` comes with it. Several chips in one process
are a trap: Mosaic GPU keeps a compiled kernel by its text, whatever the chip.
"""

import dataclasses
import math
import os

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class GpuModel:
    """One GPU, from its data sheet and NVIDIA's tables of compute capabilities.

    Attributes:
        kind: JAX's `device_kind`.
        major: of the compute capability (minor 0); from 9 on with the accelerated features ("sm_90a").
        sms: streaming multiprocessors.
        hbm_bytes_per_s: peak of the data sheet.
        hbm_bytes: device memory.
        l2_bytes: second-level cache.
        clock_ghz: boost clock.
        shared_bytes: shared memory of one SM; a block may use 1 KiB less.
        bf16_flops, fp8_flops: dense tensor-core peaks a second; FP8 0 where there is none.
    """

    kind: str
    major: int
    sms: int
    hbm_bytes_per_s: float
    hbm_bytes: int
    l2_bytes: int
    clock_ghz: float
    shared_bytes: int
    bf16_flops: float
    fp8_flops: float

    @property
    def block_shared_bytes(self) -> int:
        """Shared memory that one block may ask for."""
        return self.shared_bytes - 1024


KIB = 1 << 10
MIB = 1 << 20
GPUS = {
    "a100": GpuModel(
        "NVIDIA A100-SXM4-80GB", 8, 108, 2.039e12, 85_100_000_000, 40 * MIB, 1.41, 164 * KIB, 312e12, 0
    ),
    "h100": GpuModel(
        "NVIDIA H100 80GB HBM3", 9, 132, 3.352e12, 84_942_979_072, 50 * MIB, 1.98, 228 * KIB, 989e12, 1979e12
    ),
    "h200": GpuModel(
        "NVIDIA H200", 9, 132, 4.8e12, 151_397_597_184, 50 * MIB, 1.98, 228 * KIB, 989e12, 1979e12
    ),
    "b200": GpuModel(
        "NVIDIA B200", 10, 148, 7.672e12, 191_514_411_008, 126 * MIB, 1.965, 228 * KIB, 2250e12, 4500e12
    ),
}
"""Name -> GPU."""


def target_config(gpu: GpuModel) -> str:
    """The GPU as XLA's GpuTargetConfigProto, in text format."""
    features = " feature_extension: ACCELERATED_FEATURES" if gpu.major >= 9 else ""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      fpus_per_core: {64 if gpu.major == 8 else 128}
      shared_memory_per_block: {48 * KIB} shared_memory_per_core: {gpu.shared_bytes}
      shared_memory_per_block_optin: {gpu.block_shared_bytes}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: {gpu.sms} memory_bandwidth: {gpu.hbm_bytes_per_s:.0f} l2_cache_size: {gpu.l2_bytes}
      clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.hbm_bytes} device_address_bits: 64
      cuda_compute_capability {{ major: {gpu.major} minor: 0{features} }}
      device_vendor: "NVIDIA Corporation" name: "{gpu.kind}"
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
      dnn_version: "9.12.0"
    }}
    platform_name: "CUDA" device_description_str: "{gpu.kind}"
    dnn_version_info {{ major: 9 minor: 12 patch: 0 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
    """


def gpu_mesh(
    name: str,
    shape: tuple[int, ...] = (1,),
    axis_names: tuple[str, ...] = ("device",),
    *,
    gpus_a_host: int = 8,
) -> Mesh:
    """A mesh of prod(shape) absent GPUs; a mesh in force (`jax.set_mesh`) is what kernels read their target from.

    Sets `JAX_SKIP_CUDA_CONSTRAINTS_CHECK`, without which the plugin wants cuDNN: call it before JAX looks for devices,
    and set `JAX_PLATFORMS=cpu` where there might be a GPU.

    Args:
        name: of `GPUS`.
        gpus_a_host: of full hosts; fewer devices are one host.

    Raises:
        KeyError: no such GPU.
        ValueError: the devices do not fill their hosts.
    """
    devices = math.prod(shape)
    hosts = -(-devices // gpus_a_host)
    if hosts > 1 and devices % gpus_a_host:
        raise ValueError(f"{devices} GPUs do not fill hosts of {gpus_a_host}")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=target_config(GPUS[name]),
        topology=f"1x{hosts}x{devices // hosts}",
    )
    return Mesh(np.array(topology.devices).reshape(shape), axis_names)
