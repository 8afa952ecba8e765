"""The GPU kernels of `mla_heads`: interpreted on a CPU, for both generations, and on a GPU where there is one."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled import Weight
from pallas_kernels.mla_heads import (
    HeadDims,
    absorb_queries,
    gpu,
    gpu_blackwell,
    gpu_hopper,
    head_values,
    reference,
)
from pallas_kernels.mla_heads.gpu_weights import KeyValueWeights
from pallas_kernels.quantize import quantize_weight

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX has no interpreter for GPU kernels"
)
DIMS = HeadDims(128, 64, 128)
TOLERANCE = 2**-8
"""Of the largest entry: both sides sum exact products in float32 and round to bfloat16 once."""


def random(*shape: int, dtype: type = jnp.bfloat16) -> Array:
    values = np.random.default_rng(0).standard_normal(shape)
    return jnp.asarray(values, dtype)


def close(got: Array, expected: Array) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    wanted = np.asarray(expected, np.float32)
    atol = TOLERANCE * float(np.abs(wanted).max())
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=atol, rtol=0)


def kv_b(heads: int, rank: int, layers: int | None, dtype: str) -> Weight:
    lead = () if layers is None else (layers,)
    weight = random(*lead, heads * 256, rank, dtype=jnp.float32)
    return quantize_weight(weight) if dtype == "float8" else weight.astype(jnp.bfloat16)


@interpreted
@pytest.mark.parametrize("kernels", [gpu_hopper, gpu_blackwell], ids=["hopper", "blackwell"])
@pytest.mark.parametrize(
    ("rows", "heads", "rank", "layers", "layer", "dtype"),
    [
        (1, 1, 384, None, None, "float8"),
        (3, 2, 128, 2, 0, "float8"),
        (65, 2, 128, 2, 1, "float8"),
        (130, 1, 256, 3, 2, "float8"),
        (9, 1, 256, 2, 1, "bfloat16"),
    ],
    ids=["one token", "two heads", "two tiles on Hopper", "two tiles", "unscaled weight"],
)
def test_products_of_every_head(
    kernels: ModuleType, rows: int, heads: int, rank: int, layers: int | None, layer: int | None, dtype: str
) -> None:
    weight = kv_b(heads, rank, layers, dtype)
    index = None if layer is None else jnp.int32(layer)
    weights = KeyValueWeights.of(weight, index)
    q, rope, context = random(rows, heads * 192), random(rows, 64), random(rows, heads, rank)
    expected, _ = reference.absorb_queries(q, rope, weight, DIMS, index)
    got = jax.jit(lambda q: kernels.absorb(q, weights, 192))(q)
    close(got.reshape(expected.shape), expected)
    got = jax.jit(lambda x: kernels.values(x, weights))(context)
    close(got, reference.head_values(context, weight, DIMS, index))


@interpreted
def test_queries_keep_their_rotary_part() -> None:
    weight, q, rope = kv_b(2, 128, None, "float8"), random(3, 384), random(3, 64, dtype=jnp.float32)
    expected = reference.absorb_queries(q, rope, weight, DIMS, None)
    for a, b in zip(gpu.absorb_queries(q, rope, weight, DIMS, None), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("x", "weight", "dims", "reason"),
    [
        (random(1, 192, dtype=jnp.float32), (256, 128), DIMS, "activations of float32"),
        (random(1, 192), (256, 130), DIMS, "heads of 128 and 128 dims over a latent of 130"),
        (random(1, 64), (64, 128), HeadDims(40, 8, 24), "heads of 40 and 24 dims over a latent of 128"),
        (random(1, 192), (256, 1024), DIMS, "a latent of 1024 dims"),
        (random(1, 132), (256, 128), HeadDims(128, 4, 128), "4 rotary dims"),
    ],
)
def test_what_the_kernels_do_not_take(x: Array, weight: tuple[int, int], dims: HeadDims, reason: str) -> None:
    stack = quantize_weight(random(*weight, dtype=jnp.float32))
    assert (gpu.unsupported(x, stack, dims) or "").startswith(reason)


def test_a_weight_in_float32_is_not_taken() -> None:
    weight = random(256, 128, dtype=jnp.float32)
    assert (gpu.unsupported(random(1, 192), weight, DIMS) or "").startswith("a weight of float32")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize(("rows", "heads"), [(1, 128), (8, 16), (130, 16), (512, 128)])
def test_on_a_gpu(rows: int, heads: int) -> None:
    weight = kv_b(heads, 512, 2, "float8")
    q, rope, context = random(rows, heads * 192), random(rows, 64), random(rows, heads, 512)
    calls: list[tuple[Any, tuple[Array, ...]]] = [(absorb_queries, (q, rope)), (head_values, (context,))]
    for function, arguments in calls:
        got, expected = (
            jax.jit(lambda *x, i=name, f=function: f(*x, weight, DIMS, layer=1, implementation=i))(*arguments)
            for name in ("pallas", "reference")
        )
        jax.tree.map(close, got, expected)
