"""DeepSeek-V3 in JAX.

import dsv3_jax

model = dsv3_jax.load("path/to/checkpoint")
print(model.generate(["def fibonacci(n):"])[0].text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_jax.api import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    # JAX takes a second to import, which `dsv3 --help` and `dsv3 inspect` do without.
    if name in __all__:
        from dsv3_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
