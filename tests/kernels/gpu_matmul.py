"""What the tests of the GPU matmuls share: a small chip of either generation, for which kernels are interpreted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.block_scaled import Weight
from pallas_kernels.gpu_chip import GpuChip
from pallas_kernels.quantize import quantize_weight

GENERATIONS = ("hopper", "blackwell")
SMS = 3
"""Few, so that persistent blocks take several tiles in turns."""

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX has no interpreter for GPU kernels"
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU, Hopper or Blackwell"),
]


@pytest.fixture(params=GENERATIONS)
def small_chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GpuChip:
    """The chip in force: of a generation, with few SMs."""
    chip = GpuChip(request.param, SMS)
    monkeypatch.setattr(gpu_chip, "_KINDS", ((".*", chip),))
    monkeypatch.setattr(gpu_chip, "target", lambda: ("gpu", "of the test"))
    return chip


def random(*shape: int, seed: int = 0, dtype: type = jnp.bfloat16) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def float8(*shape: int, seed: int = 1) -> Weight:
    return quantize_weight(random(*shape, seed=seed, dtype=jnp.float32))


def compare(got: Callable[[], Array], expected: Callable[[], Array], tolerance: float) -> np.ndarray:
    """Asserts that the two agree within `tolerance` of the largest entry; returns the first."""
    value, wanted = (jax.jit(function)() for function in (got, expected))
    assert value.shape == wanted.shape
    array, reference = (np.asarray(a, np.float64) for a in (value, wanted))
    atol = tolerance * max(np.abs(reference).max(), 1e-9)
    np.testing.assert_allclose(array, reference, atol=atol, rtol=0)
    return array
