import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.quantize import quantize_weight
from tests.kernels.definitions import dequantise, fp8_gemm, silu

RTOL = 1e-5  # float32 sums in any order

GROUPS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_group(x: np.ndarray, sizes: list[int], product) -> np.ndarray:
    """product(rows of a group, its number) for every group, zeros below."""
    parts, first = [], 0
    for e, size in enumerate(sizes):
        parts.append(product(x[first : first + size], e))
        first += size
    return np.concatenate([*parts, np.zeros((len(x) - first, parts[0].shape[1]))])


def assert_close(got: jax.Array, expected: np.ndarray) -> None:
    atol = RTOL * max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(np.asarray(got), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("activations", ["none", "float8"])
@settings(max_examples=10, deadline=None)
@given(sizes=GROUPS, unused=st.integers(0, 3), n=st.integers(1, 200), k=st.integers(1, 200))
def test_float8(activations: str, sizes: list[int], unused: int, n: int, k: int) -> None:
    weight = quantize_weight(jnp.asarray(random((2, len(sizes), n, k), 1)))
    values, scales = np.asarray(weight.values)[1], np.asarray(weight.scales)[1]
    x = random((sum(sizes) + unused, k), 2)
    row_scale = random((len(x),), 3)

    def product(rows: np.ndarray, e: int) -> np.ndarray:
        if activations == "float8":
            return fp8_gemm(rows, values[e], scales[e], None)
        return rows.astype(np.float64) @ dequantise(values[e], scales[e], 128).T

    got = grouped_matmul(
        jnp.asarray(x),
        weight,
        jnp.asarray(sizes, jnp.int32),
        row_scale=jnp.asarray(row_scale),
        layer=1,
        activations=activations,
    )
    assert_close(got, by_group(x, sizes, product) * row_scale[:, None])


@pytest.mark.parametrize("sizes", [[0, 0, 7, 0], [7, 0, 0, 0], [0, 0, 0, 7], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_swiglu_of_extreme_groups(sizes: list[int]) -> None:
    gate, up = random((4, 30, 20), 1), random((4, 30, 20), 2)
    x = random((8, 20), 3)
    got = grouped_swiglu(jnp.asarray(x), jnp.asarray(gate), jnp.asarray(up), jnp.asarray(sizes, jnp.int32))
    assert_close(got, by_group(x, sizes, lambda rows, e: silu(rows @ gate[e].T) * (rows @ up[e].T)))


def test_many_rows_a_group_take_several_tiles() -> None:
    sizes = [1500, 3, 0, 600]
    weight = random((4, 17, 11), 1)
    x = random((2200, 11), 2)
    got = grouped_matmul(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(sizes, jnp.int32))
    assert_close(got, by_group(x, sizes, lambda rows, e: rows @ weight[e].T))


def test_unchosen_experts_are_not_read() -> None:
    weight = random((4, 8, 8), 1)
    weight[[0, 2]] = np.nan
    x = random((6, 8), 2)
    got = grouped_matmul(jnp.asarray(x), jnp.asarray(weight), jnp.asarray([0, 2, 0, 3], jnp.int32))
    assert np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("sizes", [[3, 0, 4], [0, 7, 0], [2, 2, 2]])
def test_gradients(layer: int | None, sizes: list[int]) -> None:
    """Against JAX's own derivative of the same sums written with a mask."""
    stack = (3,) if layer is None else (2, 3)
    gate, up, down = (
        jnp.asarray(random((*stack, *shape), i)) for i, shape in enumerate([(9, 5), (9, 5), (6, 9)])
    )
    x, row_scale = jnp.asarray(random((7, 5), 4)), jnp.asarray(random((7,), 5))
    group_sizes = jnp.asarray(sizes, jnp.int32)
    group_of_row = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(7), side="right")
    mask = (group_of_row[:, None] == jnp.arange(3)).astype(jnp.float32)

    def experts(x, row_scale, gate, up, down):
        hidden = grouped_swiglu(x, gate, up, group_sizes, layer=layer)
        return grouped_matmul(hidden, down, group_sizes, row_scale=row_scale, layer=layer)

    def masked(x, row_scale, gate, up, down):
        gate, up, down = (w if layer is None else w[layer] for w in (gate, up, down))
        g, u = (jnp.einsum("mk,enk,me->mn", x, w, mask) for w in (gate, up))
        return jnp.einsum("mk,enk,me->mn", jax.nn.silu(g) * u, down, mask) * row_scale[:, None]

    def loss(function):
        return lambda *args: jnp.sum(jnp.sin(function(*args)))

    arguments = (x, row_scale, gate, up, down)
    got = jax.grad(loss(experts), range(5))(*arguments)
    expected = jax.grad(loss(masked), range(5))(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, np.asarray(b))
