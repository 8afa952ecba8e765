"""`Case`: one kernel at one shape of the real model, compiled by `tpu_schedule.py` and by tests/aot."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A function that holds one Pallas kernel, and the shapes that it is compiled for.

    Attributes:
        kernel: the `name` of its `pallas_call`, as far as it goes before any number that the compiler adds.
        label: the shape in words, for the table.
        function: takes `arguments`; jitted and compiled as it is.
        arguments: pytrees of `jax.ShapeDtypeStruct`.
        ideal_bytes: what has to move between HBM and the chip at least.
        trips: trip counts of the loops inside the kernel, in the order of the compiled program; a nested loop counts
            its own trips only, on an average of the grid's steps. May be left out where they are all constants of the
            compiled program, which they must not exceed.
        scalars: values of the kernel's prefetched scalars, for a kernel whose index maps read from them which blocks it
            fetches; without them every position counts as another block.
    """

    kernel: str
    label: str
    function: Callable
    arguments: tuple[Any, ...]
    ideal_bytes: int
    trips: tuple[float, ...] = ()
    scalars: tuple[np.ndarray, ...] | None = None
