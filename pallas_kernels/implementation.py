"""The choice between an operation's implementations, in the manner of `jax.nn.dot_product_attention`."""

import functools
import logging
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from pallas_kernels.errors import ImplementationError
from pallas_kernels.gpu_chip import gpu_chip
from pallas_kernels.target import target

Function = TypeVar("Function", bound=Callable)
logger = logging.getLogger(__name__)


class Kernel(NamedTuple, Generic[Function]):
    """A Pallas kernel of one platform.

    Attributes:
        function: takes what the reference takes.
        unsupported: says why it cannot take the arguments at hand, as a phrase; None if it can.
    """

    function: Function
    unsupported: Callable[[], str | None] = lambda: None


def choose(
    operation: str,
    implementation: str | None,
    *,
    reference: Function,
    tpu: Kernel[Function],
    gpu: Kernel[Function] | None = None,
    cpu: Function | None = None,
) -> Function:
    """Returns the implementation called `implementation`, or the platform's own where that is None.

    What is picked by platform is logged once at info level.

    Args:
        operation: its name, for messages.
        implementation: "reference"; "pallas", the platform's kernel, on a CPU the interpreted TPU kernel; "cpu" where
            there is such a form; None for a kernel where there is one that takes the arguments.
        reference: plain XLA.
        tpu: the kernel for TPUs.
        gpu: the kernel for Hopper and Blackwell; None where XLA does as well there, and stands for the kernel.
        cpu: another form of the reference, for XLA's CPU backend.

    Raises:
        ImplementationError: the one asked for does not exist, or cannot run on this platform or these arguments.
    """
    platform, kind = target()
    kernels = {"tpu": tpu, "cpu": tpu}
    if platform == "gpu" and gpu_chip() is not None:
        kernels["gpu"] = gpu or Kernel(reference)
    kernel = kernels.get(platform)
    if implementation is None:
        return _platforms_own(operation, reference, None if platform == "cpu" else kernel, cpu)
    if implementation == "pallas":
        if kernel is None:
            raise ImplementationError(
                f"{operation}: no Pallas kernel for {kind}; expected None or 'reference'"
            )
        if reason := kernel.unsupported():
            raise ImplementationError(f"{operation}: the Pallas kernel does not take {reason}")
        return kernel.function
    if implementation == "cpu" and cpu is not None:
        return cpu
    if implementation != "reference":
        names = "'reference', 'pallas'" + ("" if cpu is None else ", 'cpu'")
        raise ImplementationError(
            f"{operation}: no implementation {implementation!r} on {kind}; expected None or one of {names}"
        )
    return reference


def _platforms_own(
    operation: str, reference: Function, kernel: Kernel[Function] | None, cpu: Function | None
) -> Function:
    platform, kind = target()
    if kernel is not None:
        reason = kernel.unsupported()
        name = "pallas" if reason is None and kernel.function is not reference else "reference"
        _report_once(operation, name, kind, reason)
        return kernel.function if reason is None else reference
    if platform == "cpu" and cpu is not None:
        _report_once(operation, "cpu", kind, None)
        return cpu
    _report_once(operation, "reference", kind, None)
    return reference


@functools.cache
def _report_once(operation: str, name: str, kind: str, unsupported: str | None) -> None:
    reason = f" (the Pallas kernel does not take {unsupported})" if unsupported else ""
    logger.info("%s: %s implementation on %s%s", operation, name, kind, reason)
