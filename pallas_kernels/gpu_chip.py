"""The NVIDIA GPU that a kernel is compiled for."""

import dataclasses
import re
from typing import Any, Literal, TypeVar

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.errors import ImplementationError
from pallas_kernels.target import target

KIB = 1 << 10
Kernels = TypeVar("Kernels")


@dataclasses.dataclass(frozen=True)
class GpuChip:
    """What kernels have to know of a chip.

    Attributes:
        generation: "hopper" (sm_90a: wgmma) or "blackwell" (sm_100a: tcgen05).
        sms: streaming multiprocessors, for kernels with one persistent block on each.
        shared_bytes: shared memory that one block may use.
    """

    generation: Literal["hopper", "blackwell"]
    sms: int
    shared_bytes: int = 227 * KIB


_KINDS = (
    (r"NVIDIA G?H(100 PCIe|800 PCIe)", GpuChip("hopper", 114)),
    (r"NVIDIA H20\b", GpuChip("hopper", 78)),
    (r"NVIDIA G?H(100|200|800)\b", GpuChip("hopper", 132)),
    (r"NVIDIA G?B(100|200)\b", GpuChip("blackwell", 148)),
)
"""Beginning of JAX's `device_kind` -> chip. Workstation Blackwells (sm_120) have no tcgen05 and are none of these."""


def gpu_chip() -> GpuChip | None:
    """The chip compiled for; an H100 where kernels are interpreted on a CPU; None for a GPU without kernels."""
    platform, kind = target()
    if platform == "cpu":
        return GpuChip("hopper", 132)
    return next((chip for pattern, chip in _KINDS if re.match(pattern, kind)), None)


def of_generation(hopper: Kernels, blackwell: Kernels) -> Kernels:
    """Whichever of the two is for the chip compiled for."""
    chip = gpu_chip()
    return blackwell if chip is not None and chip.generation == "blackwell" else hopper


def interpret() -> Any:
    """`plgpu.kernel`'s argument of that name: False, or on a CPU that compiles for no other device an interpreter.

    It raises where a thread reads what another, or the copy engine, may not have written yet.

    Raises:
        ImplementationError: this JAX has no interpreter for GPU kernels.
    """
    absent_device = jax.sharding.get_abstract_mesh().abstract_device is not None
    if jax.default_backend() != "cpu" or absent_device:
        return False
    interpreter = getattr(plgpu, "InterpretGPUParams", None)
    if interpreter is None:
        raise ImplementationError(
            f"JAX {jax.__version__} cannot interpret GPU kernels; expected 0.12 or newer"
        )
    return interpreter(detect_races=True)
