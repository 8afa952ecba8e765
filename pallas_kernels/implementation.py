"""The choice between an operation's implementations, in the manner of `jax.nn.dot_product_attention`."""

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import jax

Function = TypeVar("Function", bound=Callable)
logger = logging.getLogger(__name__)


def choose(operation: str, implementation: str | None, implementations: dict[str, Function]) -> Function:
    """Returns the implementation called `implementation`, or the platform's own where that is None.

    What is picked by platform is logged once at info level.

    Args:
        operation: name of the operation, for messages.
        implementations: name -> function; "reference" is always among them.

    Raises:
        ValueError: the operation has no implementation of that name on this platform.
    """
    if implementation is not None and implementation not in implementations:
        expected = ", ".join(repr(name) for name in implementations)
        raise ValueError(
            f"{operation}: no implementation {implementation!r} on {jax.default_backend()}; "
            f"expected None or one of {expected}"
        )
    name = implementation or next(iter(implementations))
    if implementation is None:
        _report_once(operation, name, jax.default_backend())
    return implementations[name]


@functools.cache
def _report_once(operation: str, name: str, platform: str) -> None:
    logger.info("%s: %s implementation on %s", operation, name, platform)
