"""The TPU kernel, interpreted, against the reference; and what it fetches, from its own index maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.group_rows import plan_visits
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, row_tile
from pallas_kernels.grouped_matmul.tpu import block_columns, rows_index, scale_index, weight_index
from pallas_kernels.quantize import quantize_weight

# float32 sums of at most 300 products in another order, and float32 scales applied to partial sums instead of weights.
TOLERANCE = 1e-5


def stack(key: int, *shape: int):
    return quantize_weight(jax.random.normal(jax.random.key(key), shape))


def rows(count: int, depth: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(count), (count, depth)).astype(dtype)


def compare(function, tolerance: float = TOLERANCE) -> np.ndarray:
    expected, got = (
        np.asarray(jax.jit(lambda i=i: function(i))(), np.float64) for i in ("reference", "pallas")
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-9))
    return got


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    unused=st.integers(0, 40),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_groups_of_any_size(sizes: list[int], unused: int, n: int, k: int, dtype: str) -> None:
    count = max(sum(sizes) + unused, 1)
    weight, x = stack(1, 2, len(sizes), n, k), rows(count, k, dtype)
    scale = jax.random.uniform(jax.random.key(2), (count,))
    got = compare(
        lambda i: grouped_matmul(
            x, weight, jnp.array(sizes), row_scale=scale, layer=jnp.int32(1), implementation=i
        ),
        # The result is rounded to 8 bits: sums that differ by little may fall on either side.
        TOLERANCE if dtype == "float32" else 2**-7,
    )
    assert not got[sum(sizes) :].any()


@pytest.mark.parametrize("activations", ["none", "float8"])
@pytest.mark.parametrize("sizes", [[0, 0, 70], [33, 31, 0], [16, 16, 16], [0, 0, 0], [1, 0, 1]])
def test_swiglu(sizes: list[int], activations: str) -> None:
    gate, up, x = stack(1, 3, 200, 140), stack(2, 3, 200, 140), rows(75, 140)
    compare(
        lambda i: grouped_swiglu(x, gate, up, jnp.array(sizes), activations=activations, implementation=i)
    )


def test_many_rows_a_group_take_several_tiles() -> None:
    weight, x, sizes = stack(1, 2, 130, 130), rows(700, 130), jnp.array([610, 80])
    assert row_tile(700, 2) < 610
    compare(lambda i: grouped_matmul(x, weight, sizes, implementation=i))


def test_rows_of_one_group_do_not_reach_another() -> None:
    x = rows(40, 130).at[17].set(jnp.nan)
    sizes, weight = jnp.array([17, 1, 22]), stack(1, 3, 130, 130)
    got = grouped_matmul(x, weight, sizes, implementation="pallas")
    assert np.isfinite(np.delete(np.asarray(got), 17, axis=0)).all()


def test_gradients_are_those_of_the_reference() -> None:
    weight = jax.random.normal(jax.random.key(1), (2, 3, 40, 30))
    x, sizes, scale = rows(20, 30), jnp.array([9, 0, 8]), jnp.linspace(0.5, 1, 20)

    def loss(x, weight, scale, implementation):
        hidden = grouped_swiglu(x, weight, weight, sizes, layer=1, implementation=implementation)
        out = grouped_matmul(
            hidden, weight.swapaxes(-1, -2), sizes, row_scale=scale, layer=0, implementation=implementation
        )
        return jnp.sum(out**2)

    expected, got = (
        jax.grad(lambda *args, i=i: loss(*args, i), argnums=(0, 1, 2))(x, weight, scale)
        for i in ("reference", "pallas")
    )
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * np.abs(a).max())


def fetches(index_map, grid: tuple[int, int], prefetched: tuple) -> list[tuple]:
    """Block indices that a pipeline fetches: whenever the index differs from that of the step before."""
    fetched: list[tuple] = []
    for n in range(grid[0]):
        for v in range(grid[1]):
            index = tuple(int(i) for i in index_map(n, v, *prefetched))
            if not fetched or fetched[-1] != index:
                fetched.append(index)
    return fetched


@pytest.mark.parametrize("tokens", [8, 128])
def test_bytes_of_a_decode_step_of_v3(tokens: int) -> None:
    """Each chosen expert is fetched once and no other: all bytes within 3 % of the chosen experts' weights."""
    experts, hidden, inner = 256, 7168, 2048
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(experts)[:8] for _ in range(tokens)])
    sizes = np.bincount(ids.reshape(-1), minlength=experts)
    chosen = int((sizes > 0).sum())
    tile = row_tile(tokens * 8, experts)
    visits = plan_visits(jnp.asarray(sizes), num_rows=tokens * 8, row_tile=tile)
    prefetched = tuple(
        np.asarray(a)
        for a in (np.zeros(1, int), visits.visit_group, visits.visit_tile, visits.num_visits, visits.starts)
    )
    for weights, n, k in ((2, inner, hidden), (1, hidden, inner)):
        columns = block_columns(n, weights * k)
        grid = (-(-n // columns), len(prefetched[1]))
        of_weights = fetches(weight_index, grid, prefetched)
        assert len(of_weights) == len(set(of_weights)) == grid[0] * chosen
        assert {index[1] for index in of_weights} == set(np.flatnonzero(sizes))
        moved = weights * len(of_weights) * columns * k
        scales = weights * len(fetches(scale_index, grid, prefetched)) * n // 128 * 128 * 4
        moved += scales + len(fetches(rows_index, grid, prefetched)) * tile * k * 2 + 2 * tokens * 8 * n
        assert moved <= 1.03 * weights * chosen * n * k
