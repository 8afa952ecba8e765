"""The GPU kernel of `quantize`, interpreted on a CPU, and on a GPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantize import gpu, reference

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX has no interpreter for GPU kernels"
)


def values(num_rows: int, num_columns: int) -> jax.Array:
    x = (
        jax.random.normal(jax.random.key(0), (num_rows, num_columns))
        * jnp.exp(jnp.arange(num_rows) - 8.0)[:, None]
    )
    x = x.at[1].set(0).at[2, 0].set(1e-9)
    return x.astype(jnp.bfloat16)


def check(x: jax.Array, scale_fmt: str | None) -> None:
    """The reference's own bits: both divide exactly."""
    got, scales = gpu.quantize_rows(x, scale_fmt)
    expected, expected_scales = reference.quantize_activations(x, scale_fmt)
    np.testing.assert_array_equal(scales, expected_scales.T)
    np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))


@interpreted
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(8, 384), (64, 128), (72, 256)])
def test_interpreted(shape: tuple[int, int], scale_fmt: str | None) -> None:
    check(values(*shape), scale_fmt)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU, Hopper or Blackwell")
@pytest.mark.parametrize("shape", [(8, 7168), (4096, 7168), (65536, 2048)])
def test_on_a_gpu(shape: tuple[int, int]) -> None:
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    check(x, None)
    check(x, "ue8m0")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((8, 128), jnp.float32, "float32 (expected bfloat16)"),
        ((9, 128), jnp.bfloat16, "shape [9, 128] (expected multiples of 8 and 128)"),
        ((8, 64), jnp.bfloat16, "shape [8, 64] (expected multiples of 8 and 128)"),
        ((8, 256), jnp.bfloat16, None),
    ],
)
def test_what_it_takes(shape: tuple[int, int], dtype: jnp.dtype, reason: str | None) -> None:
    assert gpu.unsupported(jnp.zeros(shape, dtype)) == reason
