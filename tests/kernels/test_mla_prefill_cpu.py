import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_prefill import mla_prefill


@pytest.mark.parametrize("length", [5, 64, 150])
def test_numbers_and_gradients_are_those_of_prefill(length: int) -> None:
    shapes = [(2, length, 3, 12), (2, length, 3, 4), (2, length, 3, 12), (2, length, 4), (2, length, 3, 10)]
    keys = jax.random.split(jax.random.key(0), 6)
    qkv = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    wanted = jax.random.normal(keys[5], (2, length, 3, 10))
    results = []
    for name in ("cpu", "reference"):
        out, pull_back = jax.vjp(lambda *a, name=name: mla_prefill(*a, scale=0.3, implementation=name), *qkv)
        results.append([out, *pull_back(wanted)])
    for mine, reference in zip(*results, strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-5)


def test_the_result_has_the_type_of_the_values() -> None:
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    assert mla_prefill(x, x, x, x[:, :, 0], x, scale=1.0, implementation="cpu").dtype == jnp.bfloat16
