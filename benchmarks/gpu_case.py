"""`GpuCase`: one GPU kernel at one shape of the real model, compiled by `gpu_check.py` and by tests/aot."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one thread block does in one step of its inner loop, and how many steps are under way at once.

    Attributes:
        bytes: copied from global memory by a step, weights or cache entries and activations.
        flops: multiplications and additions that its tensor-core instructions execute, padded rows included.
        stages: steps whose copies are in flight together, the depth of the pipeline.
        blocks: thread blocks of the whole grid that have work at this shape.
    """

    bytes: int
    flops: int
    stages: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class GpuCase:
    """A function that holds one Mosaic GPU kernel, and the shapes that it is compiled for.

    Attributes:
        kernel: the `name` that its `plgpu.kernel` was given.
        label: the shape in words, for the table.
        function: takes `arguments`; jitted and compiled as it is.
        arguments: pytrees of `jax.ShapeDtypeStruct`.
        instructions: chip -> regular expression of the tensor-core instruction that its PTX must contain; the chips
            that the case is compiled for; "" where none is needed.
        ideal_bytes: what has to move between device memory and the chip at least.
        flops: that the operation needs, without padding.
        tile: of the plan that the kernel makes for the chip in force.
        integers: values of the integer arguments (group sizes, lengths, pages, layer), in the order of the flattened
            arguments; what a run on a GPU takes.
        xla: XLA's own best at the same operation, of the same arguments.
    """

    kernel: str
    label: str
    function: Callable
    arguments: tuple[Any, ...]
    instructions: Mapping[str, str]
    ideal_bytes: int
    flops: int
    tile: Tile
    integers: tuple[np.ndarray | int, ...] = ()
    xla: Callable | None = None
