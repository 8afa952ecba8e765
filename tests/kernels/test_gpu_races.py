"""The interpreter that the GPU kernels' tests run in sees races: a barrier left out is an error, not luck."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chip import interpret

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX cannot interpret GPU kernels"
)


def copy(x: jax.Array, *, wait: bool) -> jax.Array:
    def body(x_ref, out_ref, shared, barrier) -> None:
        plgpu.copy_gmem_to_smem(x_ref, shared, barrier)
        if wait:
            plgpu.barrier_wait(barrier)
        out_ref[...] = shared[...]

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        interpret=interpret(),
    )
    return kernel(x)


def test_a_copy_that_is_waited_for() -> None:
    x = jnp.arange(256, dtype=jnp.float32)
    np.testing.assert_array_equal(copy(x, wait=True), x)


def test_a_copy_that_nobody_waits_for() -> None:
    with pytest.raises(Exception, match=r"[Rr]ace"):
        jax.block_until_ready(copy(jnp.arange(256, dtype=jnp.float32), wait=False))
