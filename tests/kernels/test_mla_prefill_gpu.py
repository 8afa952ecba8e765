"""The GPU kernels of `mla_prefill`: interpreted on a CPU, for both generations, and on a GPU where there is one."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_prefill import gpu, gpu_blackwell, gpu_hopper, mla_prefill, reference
from pallas_kernels.mla_prefill.gpu_blocks import Work

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX has no interpreter for GPU kernels"
)
on_both = pytest.mark.parametrize("kernels", [gpu_hopper, gpu_blackwell], ids=["hopper", "blackwell"])
work_of: Any = Work.of
definition: Any = reference.mla_prefill
kernel: Any = gpu.mla_prefill
refusal: Any = gpu.unsupported
SCALE = 0.09
TOLERANCE = 2e-2
"""Relative to the largest entry: weights are rounded to 8 bits before a product."""


def arguments(
    batch: int, queries: int, keys: int, heads: int, widths: tuple[int, int, int] = (128, 64, 128)
) -> list[Array]:
    nope, rope, value = widths
    shapes = [
        (batch, queries, heads, nope),
        (batch, queries, heads, rope),
        (batch, keys, heads, nope),
        (batch, keys, rope),
        (batch, keys, heads, value),
    ]
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def plant_nan(arrays: list[Array], end: list[int]) -> list[Array]:
    """NaN in the keys and values of each row from its end on: entries of a cache that nobody has written."""
    beyond = jnp.arange(arrays[2].shape[1]) >= jnp.asarray(end)[:, None]
    return arrays[:2] + [
        jnp.where(beyond.reshape(*beyond.shape, *(1,) * (x.ndim - 2)), jnp.nan, x) for x in arrays[2:]
    ]


def close(got: Array, expected: Array) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    wanted = np.asarray(expected, np.float32)
    atol = TOLERANCE * float(np.abs(wanted).max())
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=atol, rtol=0)


class TestInterpreted:
    pytestmark = interpreted

    @on_both
    @pytest.mark.parametrize(
        ("queries", "prefixes", "keys", "heads"),
        [(1, [0], 1, 1), (5, [3], 40, 2), (130, [250, 7], 500, 1), (128, [128], 256, 1)],
        ids=["one token", "short", "three chunks and two rows", "whole chunks"],
    )
    def test_a_chunk_behind_a_prefix(
        self, kernels: ModuleType, queries: int, prefixes: list[int], keys: int, heads: int
    ) -> None:
        arrays = arguments(len(prefixes), queries, keys, heads)
        arrays = plant_nan(arrays, [prefix + queries for prefix in prefixes])
        start = jnp.asarray(prefixes, jnp.int32)
        got = jax.jit(lambda *x: kernels.attend(work_of(*x, SCALE, start, None)))(*arrays)
        close(got, definition(*arrays, SCALE, start, None))

    @on_both
    def test_packed_documents(self, kernels: ModuleType) -> None:
        """Two rows: one in order, where chunks hide all keys from some queries; one whose segments return."""
        arrays = arguments(2, 200, 200, 1)
        ids = jnp.stack([jnp.arange(200) // 70, jnp.arange(200) // 40 % 3]).astype(jnp.int32)
        got = jax.jit(lambda *x: kernels.attend(work_of(*x, SCALE, None, ids)))(*arrays)
        close(got, definition(*arrays, SCALE, None, ids))

    def test_small_heads_and_derivatives(self) -> None:
        arrays = arguments(1, 9, 9, 3, (24, 8, 40))
        results = []
        for function in (kernel, definition):
            out, pull_back = jax.vjp(lambda *x, f=function: f(*x, SCALE, None, None), *arrays)
            results.append((out, *pull_back(arrays[4])))
        for got, expected in zip(*results, strict=True):
            close(got, expected)


def test_what_the_kernels_do_not_take() -> None:
    arrays = arguments(1, 4, 4, 2)
    assert refusal(*arrays) is None
    mixed = refusal(arrays[0].astype(jnp.float32), *arrays[1:])
    assert (mixed or "").startswith("arrays of bfloat16 and float32")
    wide = refusal(*arguments(1, 4, 4, 2, (192, 64, 128)))
    assert (wide or "").startswith("heads of 192 + 64 and 128 dims")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize(
    ("queries", "prefix", "keys", "heads"), [(4096, 0, 4096, 16), (512, 3000, 4096, 128), (1, 77, 128, 16)]
)
def test_on_a_gpu(queries: int, prefix: int, keys: int, heads: int) -> None:
    arrays = plant_nan(arguments(1, queries, keys, heads), [prefix + queries])
    start = jnp.asarray([prefix], jnp.int32)
    got, expected = (
        jax.jit(lambda *x, i=name: mla_prefill(*x, scale=SCALE, start=start, implementation=i))(*arrays)
        for name in ("pallas", "reference")
    )
    close(got, expected)
