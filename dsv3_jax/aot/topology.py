"""Devices that are not there: TPU topologies to compile for, with what the data sheets say of their chips."""

import dataclasses
import math
import os

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

GIB = 1 << 30

LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Lets libtpu load on a host without a TPU, asking no cloud service. Any valid accelerator type will do: it does not
limit the topologies. Several processes may compile at once."""


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """One JAX device of a TPU generation (on TPU7x half a chip).

    Attributes:
        name: generation, as topology names begin.
        host: the smallest topology, one host of it.
        clock_hz: VLIW bundles a second that a core issues.
        hbm_bytes_per_s: peak of the data sheet.
        hbm_bytes: what the compiler lets a program use.
        cores: TensorCores, over which a kernel's parallel grid dimension is split.
    """

    name: str
    host: str
    clock_hz: float
    hbm_bytes_per_s: float
    hbm_bytes: int
    cores: int

    def dma_cycles(self, hbm_bytes: float) -> float:
        """Clock cycles that `hbm_bytes` take at HBM's peak."""
        return hbm_bytes / self.hbm_bytes_per_s * self.clock_hz


CHIPS = {
    chip.name: chip
    for chip in (
        TpuChip("v5e", "v5e:2x2", 1.5e9, 819e9, int(15.75 * GIB), 1),
        TpuChip("v5p", "v5p:2x2x1", 1.75e9, 2765e9, int(95.74 * GIB), 2),
        TpuChip("v6e", "v6e:2x2", 1.75e9, 1638e9, int(31.25 * GIB), 1),
        TpuChip("tpu7x", "tpu7x:2x2x1", 1.9e9, 3685e9, int(94.75 * GIB), 1),
    )
}
"""Generation -> chip."""


def topology_mesh(
    topology_name: str, shape: tuple[int, ...] = (1,), axis_names: tuple[str, ...] = ("device",)
) -> Mesh:
    """A mesh over the first prod(shape) devices of an absent topology, in the topology's own order.

    Neighbours in the mesh need not be neighbours in the torus; bytes and counts do not depend on that. libtpu reads
    its environment when it is first used, here at the latest: call this in a process that has touched no TPU, and set
    `JAX_PLATFORMS=cpu` where there might be one, so that arrays live on the CPU.

    Args:
        topology_name: such as "v5e:8x8", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x4x4"; at least one host of it.

    Raises:
        ValueError: the topology has fewer devices than the mesh.
    """
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices
    if len(devices) < math.prod(shape):
        raise ValueError(f"{topology_name} has {len(devices)} devices; mesh {shape} needs {math.prod(shape)}")
    return Mesh(np.array(devices)[: math.prod(shape)].reshape(shape), axis_names)
