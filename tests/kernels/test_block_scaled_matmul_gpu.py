"""The block-scaled matmul on GPUs: interpreted on a CPU, and run on a GPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_scaled_matmul import block_scaled_matmul, block_scaled_swiglu, gpu, reference
from pallas_kernels.gpu_chip import GpuChip
from pallas_kernels.normalize import Norm
from pallas_kernels.quantize import rounding
from pallas_kernels.quantize.reference import quantize_activations
from tests.kernels.gpu_matmul import compare, float8, interpreted, on_gpu, random, small_chip

__all__ = ["small_chip"]

# Both sides sum exact products in float32; the order differs, and the scales multiply partial sums instead of weights.
TOLERANCE = 1e-5
# The result is rounded to 8 bits: sums that differ by little may fall on either side.
ROUNDED = 2**-7


@interpreted
@pytest.mark.parametrize("activations", ["none", "float8"])
@pytest.mark.parametrize(
    ("m", "n", "k", "weights", "layers", "layer"),
    [
        (1, 72, 384, 1, 3, 2),
        (13, 328, 128, 1, None, None),
        (40, 96, 1024, 2, 2, 0),
        (200, 64, 128, 1, 2, 1),
    ],
)
def test_sizes(
    small_chip: GpuChip,
    m: int,
    n: int,
    k: int,
    weights: int,
    layers: int | None,
    layer: int | None,
    activations: str,
) -> None:
    """Few and many rows, edge blocks, K in parts; one weight and a pair; first, last and no layer."""
    x = random(m, k)
    stack = () if layers is None else (layers,)
    pair = tuple(float8(*stack, n, k, seed=i + 1) for i in range(weights))
    index = None if layer is None else jnp.int32(layer)
    arguments = (pair, index, None, None, activations, None, jnp.dtype(jnp.float32))
    compare(
        lambda: gpu.block_scaled_matmul(x, *arguments),
        lambda: reference.block_scaled_matmul(x.astype(jnp.float32), *arguments),
        TOLERANCE,
    )


@interpreted
@pytest.mark.parametrize("activations", ["none", "float8"])
def test_norm_and_residual(small_chip: GpuChip, activations: str) -> None:
    x, residual = random(2, 3, 256), random(2, 3, 192, seed=4)
    norm = Norm(random(2, 256, seed=5), 1e-6)
    arguments = (x, (float8(2, 192, 256),), 1, norm, residual, activations, "ue8m0", x.dtype)
    compare(
        lambda: gpu.block_scaled_matmul(*arguments),
        lambda: reference.block_scaled_matmul(*arguments),
        ROUNDED,
    )


@interpreted
@pytest.mark.parametrize("weights", [1, 2])
def test_plain_weights(small_chip: GpuChip, weights: int) -> None:
    stack = tuple(random(2, 136, 256, seed=i + 1) for i in range(weights))
    arguments = (stack, 1, None, None, "float8", None, jnp.dtype(jnp.float32))
    x = random(13, 256)
    compare(
        lambda: gpu.block_scaled_matmul(x, *arguments),
        lambda: reference.block_scaled_matmul(x.astype(jnp.float32), *arguments),
        TOLERANCE,
    )


@interpreted
def test_gradients_are_those_of_the_reference(small_chip: GpuChip) -> None:
    weight, x = float8(64, 128), random(5, 128)

    def gradient(implementation):
        def loss(x):
            arguments = (None, None, None, "none", None, jnp.dtype(jnp.float32))
            return jnp.sum(implementation.block_scaled_matmul(x, (weight,), *arguments) * jnp.arange(64))

        return np.asarray(jax.jit(jax.grad(loss))(x), np.float32)

    np.testing.assert_array_equal(gradient(gpu), gradient(reference))


@pytest.mark.parametrize(
    ("x", "weight", "activations", "phrase"),
    [
        (random(8, 256), float8(64, 256), "none", None),
        (random(8, 256, dtype=jnp.float32), float8(64, 256), "float8", None),
        (random(8, 256, dtype=jnp.float32), float8(64, 256), "none", "float32 activations"),
        (random(8, 256), random(64, 256), "float8", None),
        (random(8, 256), random(64, 256, dtype=jnp.float32), "none", "a float32 weight"),
        (random(8, 192), float8(64, 192), "none", "a depth of 192, no multiple of 128"),
    ],
)
def test_unsupported(x, weight, activations: str, phrase: str | None) -> None:
    assert gpu.unsupported_product(x, (weight,), activations, jnp.dtype(jnp.bfloat16)) == phrase


def test_quantisation_is_that_of_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(64, 256, dtype=jnp.float32) * jnp.exp(random(64, 1, seed=1, dtype=jnp.float32) * 9)
    x = x.at[3].set(0).at[:, 7].set(0)
    expected = quantize_activations(x, None)
    monkeypatch.setattr(rounding, "target", lambda: ("gpu", "of the test"))
    for a, b in zip(quantize_activations(x, None), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("activations", ["none", "float8"])
    @pytest.mark.parametrize("m", [1, 64, 777])
    @pytest.mark.parametrize(("n", "k"), [(576, 7168), (24576, 1536), (7168, 2048)])
    def test_shapes_of_v3(self, m: int, n: int, k: int, activations) -> None:
        x, gate, up = random(m, k), float8(2, n, k), float8(2, n, k, seed=2)

        def one(name: str):
            return block_scaled_matmul(x, gate, layer=1, activations=activations, implementation=name)

        def pair(name: str):
            return block_scaled_swiglu(x, gate, up, layer=1, activations=activations, implementation=name)

        for function in (one, pair):
            compare(lambda f=function: f("pallas"), lambda f=function: f("reference"), ROUNDED)
