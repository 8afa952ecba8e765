"""The router's choice on Hopper and Blackwell: compiled for sm_90a and sm_100a, not run on a GPU.

The logits are a product of XLA's; everything behind them, some ten of its kernels, is one here. A thread block has
one token: its experts lie over 128 threads, and the best of them are taken one after the other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chip import interpret
from pallas_kernels.gpu_compat import load
from pallas_kernels.gradient import with_gradient_of
from pallas_kernels.normalize import Norm
from pallas_kernels.route import reference
from pallas_kernels.route.rule import Routed, Rule
from pallas_kernels.stack import layer_index, stacked

THREADS = 128
LOWEST = float(jnp.finfo(jnp.float32).min)
MAX_TOKENS = 1024
"""A thread block takes microseconds for its token; from so many tokens on XLA's operations are as fast."""


def route(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, rule: Rule, norm: Norm | None
) -> Routed:
    """Arguments as of the public function, at most `MAX_TOKENS` tokens."""
    function = with_gradient_of(
        functools.partial(_reference, rule=rule), functools.partial(_route, rule=rule)
    )
    return function(x, weight, bias, layer, norm)


def _reference(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, norm: Norm | None, rule: Rule
) -> Routed:
    return reference.route(x, weight, bias, layer, rule, norm)


def _route(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, norm: Norm | None, rule: Rule
) -> Routed:
    logits, normed = reference.logits_of(x, weight, layer, norm, None)
    num_experts = logits.shape[1]
    # The lowest of all logits, so that what fills the threads up is never chosen.
    logits = jnp.pad(logits, ((0, 0), (0, -num_experts % THREADS)), constant_values=-jnp.inf)
    if bias is None:
        bias, layer = jnp.zeros(num_experts, jnp.float32), None
    biases = jnp.pad(stacked(bias, layer, 2), ((0, 0), (0, -num_experts % THREADS)))
    ids, weights, scores = choose(logits, biases, layer_index(layer), num_experts, rule)
    return Routed(ids, weights, scores[:, :num_experts], normed)


def choose(
    logits: Array, bias: Array, layer: Array, num_experts: int, rule: Rule
) -> tuple[Array, Array, Array]:
    """The best experts of every token, their weights, and all scores.

    Args:
        logits: float32 [M, E], E a multiple of 128; -inf beyond `num_experts`.
        bias: float32 [L, E].
        layer: int32 [1].

    Returns:
        int32 [M, K], float32 [M, K], float32 [M, E].
    """
    tokens, width = logits.shape
    lanes = -(-rule.top_k // THREADS) * THREADS
    kernel = plgpu.kernel(
        functools.partial(_choose, num_experts=num_experts, rule=rule),
        out_type=(
            jax.ShapeDtypeStruct((tokens, lanes), jnp.int32),
            jax.ShapeDtypeStruct((tokens, lanes), jnp.float32),
            jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        ),
        grid=(tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="dsv3_route",
        interpret=interpret(),
    )
    ids, weights, scores = kernel(logits, bias, layer)
    return ids[:, : rule.top_k], weights[:, : rule.top_k], scores


def _choose(
    logits_ref: Any,
    bias_ref: Any,
    layer_ref: Any,
    ids_ref: Any,
    weights_ref: Any,
    scores_ref: Any,
    *,
    num_experts: int,
    rule: Rule,
) -> None:
    token = jax.lax.axis_index("token")
    width = logits_ref.shape[1]
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1)
    index = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
    scores = _score(load(logits_ref.at[token], layout=layout), rule)
    scores_ref[token] = scores
    choice = scores + load(bias_ref.at[layer_ref[0]], layout=layout)
    # What lies below every finite score marks experts already taken, also where a token's scores are all NaN.
    choice = jnp.where(choice >= LOWEST, choice, LOWEST)
    choice = jnp.where(index < num_experts, choice, -jnp.inf)
    if rule.topk_group < rule.n_group:
        choice = _of_kept_groups(choice, index, num_experts // rule.n_group, rule)
    ids, weights = [], []
    for _ in range(rule.top_k):
        first, _ = _best(choice, index)
        hit = index == first
        ids.append(first)
        weights.append(jnp.sum(jnp.where(hit, scores, 0.0)))
        choice = jnp.where(hit, -jnp.inf, choice)
    factor = jnp.float32(rule.scale)
    if rule.normalize:
        factor = factor / (sum(weights[1:], weights[0]) + 1e-20)
    lanes = ids_ref.shape[1]
    ids_ref[token] = _row(ids, lanes, jnp.int32)
    weights_ref[token] = _row([weight * factor for weight in weights], lanes, jnp.float32)


def _score(logits: Array, rule: Rule) -> Array:
    if rule.scoring == "sigmoid":
        return 1.0 / (1.0 + jnp.exp(-logits))
    powers = jnp.exp(logits - jnp.max(logits))
    return powers / jnp.sum(powers)


def _best(values: Array, index: Array) -> tuple[Array, Array]:
    """Index and value of the largest, the lowest index among equals."""
    largest = jnp.max(values)
    return jnp.min(jnp.where(values == largest, index, index.shape[0])), largest


def _of_kept_groups(choice: Array, index: Array, size: int, rule: Rule) -> Array:
    """-inf for the experts of all groups but the `topk_group` best."""
    members = [(index >= g * size) & (index < (g + 1) * size) for g in range(rule.n_group)]
    best = []
    for member in members:
        values = jnp.where(member, choice, -jnp.inf)
        first, score = _best(values, index)
        if rule.group_score == "top2":
            score += jnp.max(jnp.where(index == first, -jnp.inf, values))
        # A group that lacks finite scores for its sum ranks with the empty ones.
        best.append(jnp.where(score > LOWEST, score, -jnp.inf))
    for g, member in enumerate(members):
        rank = jnp.int32(0)
        for h in range(rule.n_group):
            before = (best[h] > best[g]) | ((best[h] == best[g]) & (h < g))
            rank += before.astype(jnp.int32)
        choice = jnp.where(member & (rank >= rule.topk_group), -jnp.inf, choice)
    return choice


def _row(numbers: list[Array], lanes: int, dtype: Any) -> Array:
    """The numbers side by side in a vector of so many lanes."""
    layout = plgpu.Layout.WG_STRIDED((lanes,), vec_size=1)
    lane = plgpu.broadcasted_iota(jnp.int32, (lanes,), 0, layout=layout)
    row = jnp.where(lane == 0, numbers[0], jnp.zeros((), dtype))
    for k, number in enumerate(numbers[1:], 1):
        row = jnp.where(lane == k, number, row)
    return row
