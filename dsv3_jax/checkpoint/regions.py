"""Host memory of parameters while they are read: one region for each distinct shard of a leaf."""

import dataclasses
import math
import mmap
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from dsv3_jax.checkpoint.fp8 import BLOCK
from dsv3_jax.checkpoint.names import ExpectedTensor

Bounds = tuple[int, int]
Device = Any  # jax.Device is a variable to type checkers


@dataclasses.dataclass(eq=False)
class Region:
    """One distinct shard of a leaf.

    Attributes:
        bounds: (start, stop) in each dimension of the leaf.
        dtype: of the leaf.
        devices: the devices of this process that hold the shard; [None] is the default device.
        memory: the shard, once `allocate` has been called.
    """

    bounds: tuple[Bounds, ...]
    dtype: np.dtype
    devices: list[Device | None]
    memory: np.ndarray | None = None

    def allocate(self) -> None:
        """Gives the region fresh memory, page-aligned: JAX on a CPU then takes it over without a copy."""
        shape = tuple(stop - start for start, stop in self.bounds)
        memory = mmap.mmap(-1, max(1, math.prod(shape) * self.dtype.itemsize))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # pyright: ignore[reportAttributeAccessIssue]
        self.memory = np.frombuffer(memory, self.dtype, math.prod(shape)).reshape(shape)


class Slot(NamedTuple):
    """The part of a region that one tensor fills.

    Attributes:
        region: the region.
        index: the tensor's place in the region's stack dimensions.
        rows, columns: (start, stop) in the tensor, taken as a matrix (a vector is a column).
    """

    region: Region
    index: tuple[int, ...]
    rows: Bounds
    columns: Bounds

    def view(self) -> np.ndarray:
        """The memory, [rows, columns], contiguous, as unsigned integers, which copy fast."""
        region = self.region
        assert region.memory is not None
        bits = region.memory.view(f"u{region.dtype.itemsize}")
        return bits[self.index].reshape(self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])

    def blocks(self) -> "Slot":
        """For a slot of scales: the same with rows and columns counted in elements of the weight."""
        rows, columns = ((start * BLOCK, stop * BLOCK) for start, stop in (self.rows, self.columns))
        return self._replace(rows=rows, columns=columns)


def leaf_regions(leaf: jax.ShapeDtypeStruct, sharding: Sharding | None) -> list[Region]:
    """The distinct shards of a leaf that devices of this process hold, not yet allocated."""
    if sharding is None:
        return [Region(tuple((0, size) for size in leaf.shape), np.dtype(leaf.dtype), [None])]
    regions: dict[tuple[Bounds, ...], Region] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        slices = index or (slice(None),) * len(leaf.shape)
        bounds = tuple(part.indices(size)[:2] for part, size in zip(slices, leaf.shape, strict=True))
        regions.setdefault(bounds, Region(bounds, np.dtype(leaf.dtype), [])).devices.append(device)
    return list(regions.values())


def slots_of(tensor: ExpectedTensor, regions: list[Region]) -> list[Slot]:
    """Where a tensor goes: one slot in every region that holds a part of it."""
    slots = []
    for region in regions:
        stack = region.bounds[: len(tensor.index)]
        if all(start <= place < stop for place, (start, stop) in zip(tensor.index, stack, strict=True)):
            index = tuple(place - start for place, (start, _) in zip(tensor.index, stack, strict=True))
            rows, *columns = region.bounds[len(stack) :]
            slots.append(Slot(region, index, rows, columns[0] if columns else (0, 1)))
    return slots


def leaf_array(leaf: jax.ShapeDtypeStruct, sharding: Sharding | None, regions: list[Region]) -> jax.Array:
    """Hands the filled regions of a leaf to JAX; on a CPU the array is their memory and keeps it alive."""
    shards = [
        jax.device_put(region.memory, _placement(device, sharding))
        for region in regions
        for device in region.devices
    ]
    if sharding is None:
        return shards[0]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def _placement(device: Device | None, sharding: Sharding | None) -> Any:
    if device is None or sharding is None:
        return None
    return SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
