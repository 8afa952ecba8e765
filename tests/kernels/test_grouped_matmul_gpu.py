"""The grouped matmul on GPUs: interpreted on a CPU, and run on a GPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_scaled_matmul.gpu import product
from pallas_kernels.gpu_chip import GpuChip
from pallas_kernels.gpu_visits import max_gpu_visits, plan_gpu_visits
from pallas_kernels.grouped_matmul import gpu, grouped_matmul, grouped_swiglu, reference
from tests.kernels.gpu_matmul import compare, float8, interpreted, on_gpu, random, small_chip

__all__ = ["small_chip"]

# Both sides sum exact products in float32; the order differs, and the scales multiply partial sums instead of weights.
TOLERANCE = 1e-5
# The result is rounded to 8 bits: sums that differ by little may fall on either side.
ROUNDED = 2**-7


@interpreted
@pytest.mark.parametrize("activations", ["none", "float8"])
@pytest.mark.parametrize(
    ("sizes", "unused", "n", "k", "layers", "layer"),
    [
        ([3, 0, 11], 2, 200, 256, 2, 1),
        ([0, 0, 26], 0, 72, 384, 2, 0),
        ([1, 0, 1, 0], 1, 128, 128, None, None),
        ([0, 1], 0, 64, 1024, 1, 0),
        ([0, 0], 5, 136, 128, 1, 0),
    ],
)
def test_groups(
    small_chip: GpuChip,
    sizes: list[int],
    unused: int,
    n: int,
    k: int,
    layers: int | None,
    layer: int | None,
    activations: str,
) -> None:
    """Odd sizes, edge blocks, empty groups, all rows in one, rows in none, K in parts; first, last and no layer."""
    x, group_sizes = random(sum(sizes) + unused, k), jnp.array(sizes)
    weight = float8(*(() if layers is None else (layers,)), len(sizes), n, k)
    scale = jax.random.uniform(jax.random.key(2), (x.shape[0],))
    index = None if layer is None else jnp.int32(layer)
    formats = (index, activations, None)
    got = compare(
        lambda: product(x, (weight,), group_sizes, scale, *formats, jnp.float32, "dsv3_grouped_matmul"),
        lambda: reference.grouped_matmul(
            x.astype(jnp.float32), (weight,), group_sizes, None, scale, *formats
        ),
        TOLERANCE,
    )
    assert not got[sum(sizes) :].any()


@interpreted
@pytest.mark.parametrize("activations", ["none", "float8"])
@pytest.mark.parametrize("sizes", [[2, 9, 7], [0, 0, 0]])
def test_swiglu(small_chip: GpuChip, sizes: list[int], activations: str) -> None:
    gate, up, x = float8(3, 192, 256), float8(3, 192, 256, seed=2), random(24, 256)
    arguments = (x, (gate, up), jnp.array(sizes), None, None, None, activations, None)
    compare(lambda: gpu.grouped_matmul(*arguments), lambda: reference.grouped_matmul(*arguments), ROUNDED)


@interpreted
def test_plain_weights(small_chip: GpuChip) -> None:
    gate, up, x = random(2, 3, 136, 256), random(2, 3, 136, 256, seed=2), random(20, 256, seed=3)
    arguments = (x, (gate, up), jnp.array([2, 0, 17]), None, None, 1, "none", None)
    compare(lambda: gpu.grouped_matmul(*arguments), lambda: reference.grouped_matmul(*arguments), ROUNDED)


@interpreted
def test_rows_of_one_group_do_not_reach_another(small_chip: GpuChip) -> None:
    x = random(20, 128).at[7].set(jnp.nan)
    weights, sizes = (float8(3, 64, 128),), jnp.array([7, 1, 12])
    got = jax.jit(lambda: gpu.grouped_matmul(x, weights, sizes, None, None, None, "none", None))()
    assert np.isfinite(np.delete(np.asarray(got, np.float32), 7, axis=0)).all()


@interpreted
def test_gradients_are_those_of_the_reference(small_chip: GpuChip) -> None:
    weight, x = random(2, 64, 128), random(9, 128)
    sizes, scale = jnp.array([4, 3]), jnp.linspace(0.5, 1, 9)

    def gradients(implementation) -> tuple:
        def loss(x, weight, scale):
            out = implementation.grouped_matmul(x, (weight,), sizes, None, scale, None, "none", None)
            return jnp.sum(out.astype(jnp.float32) * jnp.arange(64))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weight, scale)

    for got, expected in zip(gradients(gpu), gradients(reference), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("seed", range(20))
def test_visits(seed: int) -> None:
    """Every row in one tile, no tile in two groups, and the rows in no group as a group of their own."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 20, rng.integers(1, 7)) * (rng.random() < 0.6)
    num_rows, tile = max(int(sizes.sum() + rng.integers(0, 9)), 1), 8 * int(rng.integers(1, 4))
    visits = plan_gpu_visits(jnp.asarray(sizes, jnp.int32), num_rows, tile)
    expected, start = [], 0
    for group, size in enumerate([*sizes, num_rows - sizes.sum()]):
        end = start + size
        for begin in range(start // 8 * 8, end, tile) if size else ():
            row = max(begin, start)
            expected.append((group, row, min(begin + tile, end) - row))
        start = end
    count = int(visits.count[0])
    assert count == len(expected) <= visits.group.shape[0] == max_gpu_visits(len(sizes), num_rows, tile)
    got = [np.asarray(a)[:count] for a in (visits.group, visits.row, visits.rows)]
    assert list(zip(*got, strict=True)) == expected


@pytest.mark.parametrize(
    ("x", "weight", "phrase"),
    [
        (random(8, 256), float8(2, 64, 256), None),
        (random(8, 256), random(2, 64, 256), None),
        (random(8, 256), random(2, 64, 256, dtype=jnp.float16), "a float16 weight"),
        (random(8, 256, dtype=jnp.float32), float8(2, 64, 256), "float32 activations"),
        (random(8, 200), float8(2, 64, 200), "a depth of 200, no multiple of 128"),
        (random(8, 256), float8(2, 60, 256), "60 columns, no multiple of 8"),
        (random(0, 256), float8(2, 64, 256), "no rows"),
    ],
)
def test_unsupported(x, weight, phrase: str | None) -> None:
    assert gpu.unsupported(x, (weight,), "none") == phrase


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("activations", ["none", "float8"])
    @pytest.mark.parametrize(("tokens", "n", "k"), [(8, 2048, 7168), (1024, 256, 7168), (512, 7168, 2048)])
    def test_shapes_of_v3(self, tokens: int, n: int, k: int, activations) -> None:
        """32 experts; rows spread at random, some in none."""
        rng = np.random.default_rng(0)
        sizes = jnp.asarray(np.bincount(rng.integers(0, 33, tokens * 8), minlength=33)[:32], jnp.int32)
        x, gate, up = random(tokens * 8, k), float8(2, 32, n, k), float8(2, 32, n, k, seed=2)
        scale = jnp.asarray(rng.random(tokens * 8), jnp.float32)

        def pair(name: str):
            return grouped_swiglu(x, gate, up, sizes, layer=1, activations=activations, implementation=name)

        def one(name: str):
            return grouped_matmul(
                x, gate, sizes, row_scale=scale, layer=1, activations=activations, implementation=name
            )

        for function in (pair, one):
            compare(lambda f=function: f("pallas"), lambda f=function: f("reference"), ROUNDED)
