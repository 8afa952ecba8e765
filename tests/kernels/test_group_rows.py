import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.group_rows import Grouping, Visits, counting, group_rows, plan_visits

FORMS = ["reference", "pallas", "counting"]


def group(ids: np.ndarray, valid: np.ndarray, num_groups: int, row_tile: int, form: str) -> Grouping:
    if form == "counting":
        return counting.group_rows(jnp.asarray(ids), jnp.asarray(valid), num_groups, row_tile)
    arrays = jnp.asarray(ids), jnp.asarray(valid)
    return group_rows(*arrays, num_groups=num_groups, row_tile=row_tile, implementation=form)


def choices(m: int, k: int, num_groups: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_groups)[:k] for _ in range(m)]).astype(np.int32)


def definition(ids: np.ndarray, valid: np.ndarray, num_groups: int, row_tile: int) -> Grouping:
    """One pair after the other; Python's sort is stable."""
    top_k = ids.shape[1]
    keys = [int(g) if ok else num_groups for row, ok in zip(ids, valid, strict=True) for g in row]
    order = sorted(range(len(keys)), key=lambda pair: keys[pair])
    position = np.empty(len(keys), np.int32)
    position[order] = range(len(keys))
    sizes = [keys.count(g) for g in range(num_groups)]
    visits = visits_of(sizes, len(keys), row_tile)
    tokens = np.array(order) // top_k
    return Grouping(np.array(order), tokens, position.reshape(-1, top_k), np.array(sizes), visits)


def visits_of(sizes: list[int], num_rows: int, row_tile: int) -> Visits:
    starts = [0, *np.cumsum(sizes)]
    pairs = []
    for group, size in enumerate(sizes):
        tiles = {row // row_tile for row in range(starts[group], starts[group] + size)}
        pairs += [(group, tile) for tile in sorted(tiles)]
    length = max(min(len(sizes), num_rows) + -(-num_rows // row_tile) - 1, 1)
    padded = pairs + [pairs[-1] if pairs else (0, 0)] * (length - len(pairs))
    groups, tiles = (np.array(column) for column in zip(*padded, strict=True))
    return Visits(np.array(starts), groups, tiles, np.array([len(pairs)]))


def assert_same(got: Grouping | Visits, expected: Grouping | Visits) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 8),
    extra=st.integers(0, 60),
    row_tile=st.sampled_from([1, 8, 16, 24, 128]),
    valid=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_definition(form, m, k, extra, row_tile, valid, seed) -> None:
    ids = choices(m, k, k + extra, seed)
    is_valid = np.random.default_rng(seed).random(m) < valid
    got = group(ids, is_valid, k + extra, row_tile, form)
    assert_same(got, definition(ids, is_valid, k + extra, row_tile))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "m, k, num_groups",
    [(1, 8, 256), (1, 128, 130), (128, 8, 256), (256, 4, 64), (128, 8, 512), (256, 1, 3)],
)
@pytest.mark.parametrize("same", [False, True])
def test_sizes_of_real_models(form: str, m: int, k: int, num_groups: int, same: bool) -> None:
    ids = choices(m, k, num_groups, 0)
    if same:
        ids[:] = ids[0]
    valid = np.arange(m) % 7 != 3
    got = group(ids, valid, num_groups, 16, form)
    assert_same(got, definition(ids, valid, num_groups, 16))


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_invalid_tokens_do_not_matter(form: str) -> None:
    ids = choices(11, 4, 16, 0)
    valid = np.arange(11) % 3 != 1
    expected = definition(ids, valid, 16, 8)
    ids[~valid] = np.iinfo(np.int32).max
    got = group(ids, valid, 16, 8, form)
    assert_same(got, expected)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    unused=st.integers(0, 20),
    row_tile=st.sampled_from([1, 8, 13, 64]),
)
def test_visits_from_sizes(sizes: list[int], unused: int, row_tile: int) -> None:
    num_rows = sum(sizes) + unused
    got = plan_visits(jnp.asarray(sizes, jnp.int32), num_rows=num_rows, row_tile=row_tile)
    assert_same(got, visits_of(sizes, num_rows, row_tile))


def test_more_pairs_than_the_kernel_takes_are_sorted_all_the_same() -> None:
    ids = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(4), (600, 1)), axis=1)[:, :2])
    expected, got = (
        group_rows(ids, jnp.ones(600, bool), num_groups=4, row_tile=8, implementation=name)
        for name in ("reference", "pallas")
    )
    np.testing.assert_array_equal(got.order, expected.order)
