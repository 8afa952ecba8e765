"""Gradients of kernels that have none of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def with_gradient_of(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, differentiated as `reference` is; both take the same pytrees of arrays and nothing else.

    Gradients flow into arrays of floats of at least 16 bits: FP8 values and the integers have none.
    """

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        positions = [i for i, leaf in enumerate(leaves) if _has_gradient(leaf)]

        @jax.custom_vjp
        def forward(*leaves: Any) -> Any:
            return kernel(*jax.tree.unflatten(structure, leaves))

        def save(*leaves: Any) -> tuple[Any, tuple[Any, ...]]:
            return forward(*leaves), leaves

        def backward(leaves: tuple[Any, ...], d_out: Any) -> tuple[Any, ...]:
            def of_floats(*floats: Any) -> Any:
                filled = list(leaves)
                for i, value in zip(positions, floats, strict=True):
                    filled[i] = value
                return reference(*jax.tree.unflatten(structure, filled))

            gradients = jax.vjp(of_floats, *(leaves[i] for i in positions))[1](d_out)
            out: list[Any] = [None] * len(leaves)
            for i, gradient in zip(positions, gradients, strict=True):
                out[i] = gradient
            return tuple(out)

        forward.defvjp(save, backward)
        return forward(*leaves)

    return call


def _has_gradient(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 2
