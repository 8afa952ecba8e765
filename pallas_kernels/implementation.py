"""The choice between an operation's implementations, in the manner of `jax.nn.dot_product_attention`."""

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import jax

from pallas_kernels.errors import ImplementationError

Function = TypeVar("Function", bound=Callable)
logger = logging.getLogger(__name__)

PALLAS_PLATFORMS = ("tpu",)
"""Where the Pallas kernels are picked unasked; asked for by name they also run, interpreted, on a CPU."""


def target() -> tuple[str, str]:
    """Platform and device kind that is compiled for: of the mesh in force (`jax.set_mesh`), else the default device.

    A mesh may consist of devices that are not there (`jax.experimental.topologies`), which is how a program is
    compiled ahead of time for another machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def choose(
    operation: str,
    implementation: str | None,
    implementations: dict[str, Function],
    unsupported: str | None = None,
) -> Function:
    """Returns the implementation called `implementation`, or the platform's own where that is None.

    What is picked by platform is logged once at info level.

    Args:
        operation: name of the operation, for messages.
        implementations: name -> function; "reference" is always among them, "pallas" where there is a kernel, "cpu"
            where XLA's CPU backend needs another form of the reference.
        unsupported: why the kernel cannot take these arguments; None if it can.

    Raises:
        ImplementationError: the one asked for does not exist, or cannot run on this platform or these arguments.
    """
    platform, kind = target()
    if implementation is None:
        name = _default(platform, implementations, unsupported)
        _report_once(operation, name, kind, unsupported if platform in PALLAS_PLATFORMS else None)
        return implementations[name]
    if implementation not in implementations:
        expected = ", ".join(repr(name) for name in implementations)
        raise ImplementationError(
            f"{operation}: no implementation {implementation!r} on {kind}; expected None or one of {expected}"
        )
    if implementation == "pallas" and platform not in (*PALLAS_PLATFORMS, "cpu"):
        raise ImplementationError(f"{operation}: no Pallas kernel for {kind}; expected None or 'reference'")
    if implementation == "pallas" and unsupported:
        raise ImplementationError(f"{operation}: the Pallas kernel does not take {unsupported}")
    return implementations[implementation]


def _default(platform: str, implementations: dict[str, Function], unsupported: str | None) -> str:
    if platform in PALLAS_PLATFORMS and "pallas" in implementations and unsupported is None:
        return "pallas"
    return "cpu" if platform == "cpu" and "cpu" in implementations else "reference"


@functools.cache
def _report_once(operation: str, name: str, kind: str, unsupported: str | None) -> None:
    reason = f" (the Pallas kernel does not take {unsupported})" if unsupported else ""
    logger.info("%s: %s implementation on %s%s", operation, name, kind, reason)
