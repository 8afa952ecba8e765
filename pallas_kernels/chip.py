"""The TPU that a kernel is compiled for, and what its kernels may use of it."""

import dataclasses
from typing import Any, Literal

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.target import target

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
        name: generation, as in topology names.
        vmem_bytes: vector memory of a core that a kernel may ask for.
        scoped_vmem_bytes: what it gets without asking.
        cores: TensorCores, over which a parallel grid dimension is split.
        native_float8: the MXU multiplies FP8 by FP8.
    """

    name: str
    vmem_bytes: int
    scoped_vmem_bytes: int
    cores: int
    native_float8: bool


CHIPS = {
    "TPU v5 lite": Chip("v5e", 127 * MIB, 16 * MIB, 1, False),
    "TPU v5": Chip("v5p", 63 * MIB, 16 * MIB, 2, False),
    "TPU v6 lite": Chip("v6e", 127 * MIB, 32 * MIB, 1, False),
    "TPU7x": Chip("tpu7x", 63 * MIB, 32 * MIB, 1, True),
}


def chip() -> Chip:
    """The chip compiled for; v5e where it is none of `CHIPS`, an interpreted kernel on a CPU among them."""
    return CHIPS.get(target()[1], CHIPS["TPU v5 lite"])


def interpret() -> Any:
    """`pl.pallas_call`'s argument of that name: False on a TPU, else an interpreter that knows TPU memories."""
    return False if target()[0] == "tpu" else pltpu.InterpretParams()


def compiler_params(
    dimension_semantics: tuple[Literal["parallel", "arbitrary"], ...], vmem_bytes: int
) -> pltpu.CompilerParams:
    """Parameters of a kernel that uses `vmem_bytes` of VMEM, both buffers of every block counted.

    A limit is a reservation: above the default it is raised only as far as it is used, with an eighth for what the
    compiler keeps itself.
    """
    limit = vmem_bytes + vmem_bytes // 8 + MIB
    return pltpu.CompilerParams(
        dimension_semantics=dimension_semantics,
        vmem_limit_bytes=min(limit, chip().vmem_bytes) if limit > chip().scoped_vmem_bytes else None,
    )
