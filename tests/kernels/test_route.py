import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.normalize import Norm
from pallas_kernels.route import Routed, gpu, route
from pallas_kernels.route.rule import Rule

RTOL = 2e-6  # float32 sums in any order, the logits' above all
LAYERS = 2
EPS = 1e-6
FORMS = [
    "reference",
    "pallas",
    pytest.param(
        "gpu",
        marks=pytest.mark.skipif(
            not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX cannot interpret GPU kernels"
        ),
    ),
]

V3 = {"group_score": "top2", "scoring": "sigmoid", "normalize": True, "scale": 2.5}
V2 = {"group_score": "max", "scoring": "softmax", "normalize": False, "scale": 16.0}


def tensors(m: int, e: int, h: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((m, h)).astype(np.float32),
        "weight": (rng.standard_normal((LAYERS, e, h)) * h**-0.5).astype(np.float32),
        "bias": rng.standard_normal((LAYERS, e)).astype(np.float32),
        "norm_weight": rng.standard_normal((LAYERS, h)).astype(np.float32),
    }


def definition(scores: np.ndarray, bias: np.ndarray | None, rule: dict) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights, a token at a time; `sorted` keeps the order of equals, so the lowest index comes first."""
    ids, weights = [], []
    for row in scores:
        choice = row if bias is None else row + bias
        groups = np.split(np.arange(len(row)), rule["n_group"])
        number = 2 if rule["group_score"] == "top2" else 1
        best = [sum(sorted(choice[group], reverse=True)[:number]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g, best=best: -best[g])[: rule["topk_group"]]
        candidates = sorted(np.concatenate([groups[g] for g in kept]))
        chosen = sorted(candidates, key=lambda e, choice=choice: -choice[e])[: rule["top_k"]]
        weight = row[chosen].astype(np.float64)
        ids.append(chosen)
        weights.append((weight / weight.sum() if rule["normalize"] else weight) * rule["scale"])
    return np.array(ids), np.array(weights)


def scores_of(x: np.ndarray, weight: np.ndarray, scoring: str) -> np.ndarray:
    logits = x.astype(np.float64) @ weight.astype(np.float64).T
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def route_by(form: str, x, weight, bias, *, layer=None, norm=None, **rule) -> Routed:
    if form == "gpu":
        arrays = (jnp.asarray(x), jnp.asarray(weight), None if bias is None else jnp.asarray(bias))
        return gpu.route(*arrays, layer, Rule(**rule), norm)
    return route(x, weight, bias, layer=layer, **rule, norm=norm, implementation=form)


def check(got: Routed, bias: np.ndarray | None, rule: dict) -> None:
    """Ids and weights against the definition on the very scores returned: ties would be broken by their last bit."""
    scores = np.asarray(got.scores)
    ids, weights = definition(scores, bias, rule)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_allclose(got.weights, weights, rtol=RTOL)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20),
    n_group=st.integers(1, 4),
    size=st.integers(2, 9),
    h=st.sampled_from([24, 128, 256]),
    base=st.sampled_from([V3, V2]),
    normed=st.booleans(),
    data=st.data(),
)
def test_definition(form, m, n_group, size, h, base, normed, data) -> None:
    topk_group = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, min(topk_group * size, 5)))
    rule = {**base, "n_group": n_group, "topk_group": topk_group, "top_k": top_k}
    t = tensors(m, n_group * size, h)
    bias = t["bias"] if base is V3 else None
    norm = Norm(t["norm_weight"], EPS) if normed else None
    got = route_by(form, t["x"], t["weight"], bias, layer=1, **rule, norm=norm)
    rows = t["x"]
    if normed:
        rows = rows / np.sqrt((rows.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS)
        rows = rows * t["norm_weight"][1]
        np.testing.assert_allclose(got.normed, rows, rtol=0, atol=RTOL * np.abs(rows).max())
    else:
        assert got.normed is None
    np.testing.assert_allclose(
        got.scores, scores_of(rows, t["weight"][1], base["scoring"]), rtol=0, atol=RTOL
    )
    check(got, None if bias is None else bias[1], rule)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["all equal", "two values", "minus infinity"])
def test_equal_scores_go_to_the_lowest_index(form: str, kind: str) -> None:
    rule = {**V3, "n_group": 4, "topk_group": 2, "top_k": 6}
    t = tensors(3, 32, 128)
    bias = np.zeros(32, np.float32)
    if kind == "two values":
        bias[[3, 9, 10, 11, 17, 20, 31]] = 1
    if kind == "minus infinity":
        bias[:] = -np.inf
        bias[[8, 30]] = 0
    weight = np.zeros_like(t["weight"][0])
    got = route_by(form, t["x"], weight, bias, **rule)
    check(got, bias, rule)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_v3_sized_choice_in_several_blocks(form: str, dtype: jnp.dtype) -> None:
    rule = {**V3, "n_group": 8, "topk_group": 4, "top_k": 8}
    t = tensors(150, 256, 512)
    x, weight = jnp.asarray(t["x"], dtype), jnp.asarray(t["weight"], dtype)
    got = route_by(form, x, weight, t["bias"], layer=jnp.int32(1), **rule)
    expected = scores_of(np.asarray(x, np.float32), np.asarray(weight, np.float32)[1], "sigmoid")
    np.testing.assert_allclose(got.scores, expected, rtol=0, atol=RTOL)
    check(got, t["bias"][1], rule)


def test_norm_rounds_as_the_reference_does() -> None:
    rule = {**V3, "n_group": 1, "topk_group": 1, "top_k": 6}
    t = tensors(37, 64, 256)
    x, weight = jnp.asarray(t["x"], jnp.bfloat16), jnp.asarray(t["weight"], jnp.bfloat16)
    norm = Norm(jnp.asarray(t["norm_weight"], jnp.bfloat16), EPS)
    got, expected = (
        route(x, weight, t["bias"], layer=1, **rule, norm=norm, implementation=i)
        for i in ("pallas", "reference")
    )
    assert got.normed.dtype == jnp.bfloat16
    # One step of bfloat16: the mean of squares is summed in another order.
    np.testing.assert_allclose(
        got.normed.astype(jnp.float32), expected.normed.astype(jnp.float32), rtol=2**-7, atol=0
    )
    np.testing.assert_array_equal(got.normed == expected.normed, True)
    check(got, t["bias"][1], rule)


@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_see_each_other(form: str) -> None:
    rule = {**V3, "n_group": 4, "topk_group": 2, "top_k": 4}
    t = tensors(9, 32, 128)
    clean = route_by(form, t["x"], t["weight"], t["bias"], layer=0, **rule)
    t["x"][[2, 5]] = [[np.nan], [np.inf]]
    got = route_by(form, t["x"], t["weight"], t["bias"], layer=0, **rule)
    others = np.array([0, 1, 3, 4, 6, 7, 8])
    np.testing.assert_array_equal(got.ids[others], clean.ids[others])
    np.testing.assert_array_equal(got.weights[others], clean.weights[others])
    # Whatever is chosen for a row that holds NaN, later kernels take it for distinct experts that exist.
    for row in np.asarray(got.ids)[[2, 5]]:
        assert len(set(row)) == 4
        assert row.min() >= 0
        assert row.max() < 32


def test_gradients_flow_through_weights_and_scores() -> None:
    rule = {**V3, "n_group": 4, "topk_group": 2, "top_k": 4, "normalize": False, "scale": 1.0}
    t = tensors(3, 16, 24)
    ids = route(t["x"], t["weight"][0], t["bias"][0], **rule).ids

    def loss(x, weight):
        routed = route(x, weight, t["bias"][0], **rule)
        return routed.weights.sum()

    def chosen(x, weight):
        return jnp.take_along_axis(jax.nn.sigmoid(x @ weight.T), ids, axis=1).sum()

    got = jax.grad(loss, (0, 1))(jnp.asarray(t["x"]), jnp.asarray(t["weight"][0]))
    expected = jax.grad(chosen, (0, 1))(jnp.asarray(t["x"]), jnp.asarray(t["weight"][0]))
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=RTOL * np.abs(e).max())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_group": 5}, "32 experts in 5 groups; expected a divisor of 32"),
        ({"topk_group": 5}, "topk_group is 5; expected at most n_group = 4"),
        ({"top_k": 17}, "top_k is 17; expected at most 2 groups of 8"),
        ({"n_group": 32, "topk_group": 9}, "group_score is 'top2' for groups of one expert"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    rule = {**V3, "n_group": 4, "topk_group": 2, "top_k": 4, **change}
    t = tensors(2, 32, 24)
    with pytest.raises(ValueError, match=message):
        route(t["x"], t["weight"], t["bias"], layer=0, **rule)


def test_gradients_are_those_of_the_reference() -> None:
    x, weight, norm = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 40), (8, 40), (40,)])
    )

    def loss(x: jax.Array, weight: jax.Array, norm: jax.Array, implementation: str) -> jax.Array:
        routed = route(
            x,
            weight,
            None,
            top_k=2,
            n_group=2,
            topk_group=1,
            group_score="top2",
            scoring="sigmoid",
            normalize=True,
            scale=2.5,
            norm=Norm(norm, 1e-6),
            implementation=implementation,
        )
        assert routed.normed is not None
        return (
            jnp.sum(routed.weights**2 * jnp.array([1.0, 3.0]))
            + jnp.sum(routed.scores)
            + jnp.sum(routed.normed)
        )

    expected, got = (
        jax.grad(lambda *args, i=i: loss(*args, i), argnums=(0, 1, 2))(x, weight, norm)
        for i in ("reference", "pallas")
    )
    for a, b in zip(expected, got, strict=True):
        assert float(jnp.abs(a).max()) > 0
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))
