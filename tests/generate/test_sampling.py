import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.errors import InputError
from dsv3_jax.generate.sampling import SamplingParams, count_occurrences, keep_likely, row_keys, sample

LOGITS = jnp.log(jnp.asarray([[0.05, 0.4, 0.25, 0.2, 0.1]]))


def kept(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    numbers = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p).numbers()
    return set(np.flatnonzero(np.isfinite(np.asarray(keep_likely(LOGITS, *numbers[1:]))[0])).tolist())


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.5}, {1, 2}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.49}, {1, 2, 3}),
        ({"min_p": 1.0}, {1}),
        # Of the two that top-k leaves, 0.4 and 0.25, the first has 0.62 of the probability.
        ({"top_k": 2, "top_p": 0.6}, {1}),
    ],
)
def test_filters(limits: dict, expected: set[int]) -> None:
    assert kept(**limits) == expected


def test_filter_keeps_the_logits_in_place() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50)), jnp.float32)
    filtered = np.asarray(keep_likely(logits, jnp.float32(7), jnp.float32(1), jnp.float32(0)))
    for row, original in zip(filtered, np.asarray(logits), strict=True):
        best = np.argsort(-original)[:7]
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(row)), np.sort(best))
        np.testing.assert_array_equal(row[best], original[best])


def test_frequencies_follow_the_temperature() -> None:
    params = SamplingParams(temperature=2.0)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(20000))
    tokens = sample(jnp.broadcast_to(LOGITS, (20000, 5)), keys, params.numbers(), params.method)
    frequency = np.bincount(np.asarray(tokens), minlength=5) / 20000
    expected = np.asarray(jax.nn.softmax(LOGITS[0] / 2))
    # Four standard deviations of a share among 20000 draws.
    assert (np.abs(frequency - expected) < 4 * np.sqrt(expected * (1 - expected) / 20000)).all()


def test_smallest_temperatures_are_greedy() -> None:
    params = SamplingParams(temperature=1e-38)
    tokens = sample(
        jnp.broadcast_to(LOGITS, (50, 5)), row_keys(0, range(50)), params.numbers(), params.method
    )
    assert set(np.asarray(tokens).tolist()) == {1}


def test_greedy_takes_the_likeliest() -> None:
    params = SamplingParams()
    assert params.method == "greedy"
    keys = row_keys(0, [0])
    assert int(sample(LOGITS, keys, params.numbers(), params.method)[0]) == 1


def test_keys_depend_on_seed_and_prompt_not_on_the_batch() -> None:
    def bits(seed: int, prompts: list[list[int]]) -> list:
        return jax.random.key_data(row_keys(seed, count_occurrences(prompts))).tolist()

    alone = bits(7, [[5, 6]])[0]
    assert bits(7, [[1], [5, 6], [2, 3]])[1] == alone
    first, second = bits(7, [[5, 6], [5, 6]])
    assert first == alone
    assert second != alone
    assert bits(8, [[5, 6]])[0] != alone


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("temperature", float("nan"), "--temperature"),
        ("temperature", float("inf"), "--temperature"),
        ("temperature", -0.1, "--temperature"),
        ("top_p", 0.0, "--top-p"),
        ("top_p", 1.1, "--top-p"),
        ("top_p", float("nan"), "--top-p"),
        ("top_k", -1, "--top-k"),
        ("min_p", -0.1, "--min-p"),
        ("min_p", 1.1, "--min-p"),
        ("max_new_tokens", -1, "--max-new-tokens"),
        ("seed", -1, "--seed"),
    ],
)
def test_value_out_of_range_names_the_flag(field: str, value: float, flag: str) -> None:
    with pytest.raises(InputError, match=f"^{flag} is .*expected"):
        SamplingParams(**{field: value})
