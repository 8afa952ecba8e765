"""The router on a TPU: norm, logits, choice and weights in one kernel; the router's weight streams through VMEM."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import compiler_params, interpret
from pallas_kernels.normalize import Norm, normalize
from pallas_kernels.route.rule import Routed, Rule
from pallas_kernels.route.tpu_choose import choose_columns
from pallas_kernels.stack import float_values, layer_index, stacked

LANES = 128
SUBLANES = 8
NORM_ROWS = 16
"""Rows normalised at once; of as many as 128 the compiler would keep all intermediate values in VMEM."""

NT = (((1,), (1,)), ((), ()))


def unsupported(x: Array, weight: Array) -> str | None:
    """Why the kernel cannot route `x` by `weight`; None if it can."""
    types = (jnp.bfloat16, jnp.float32)
    for name, dtype in (("x", x.dtype), ("weight", float_values(weight).dtype)):
        if dtype not in types:
            return f"{name} of {dtype} (expected bfloat16 or float32)"
    return None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
        rows: tokens at a time, at most the lanes of a register.
        depth: columns of the weight at a time.
    """

    rows: int
    depth: int


def choose_blocks(num_rows: int, num_experts: int, hidden_size: int, bytes_an_element: int) -> Blocks:
    """With one block of tokens the weight comes in parts, behind whose transfer the product hides.

    With more of them it stays in VMEM, for every block of tokens needs all of it.
    """
    rows = min(num_rows, LANES)
    if num_rows > rows:
        return Blocks(rows, hidden_size)
    limit = (1 << 19) // (num_experts * bytes_an_element)
    parts = [d for d in range(LANES, hidden_size, LANES) if hidden_size % d == 0 and d <= max(limit, LANES)]
    return Blocks(rows, max(parts, default=hidden_size))


def route(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, rule: Rule, norm: Norm | None
) -> Routed:
    """Arguments as of the public function."""
    num_rows, hidden_size = x.shape
    values = stacked(float_values(weight), layer, 3)
    num_experts = values.shape[1]
    blocks = choose_blocks(num_rows, num_experts, hidden_size, values.dtype.itemsize)
    rows, steps = blocks.rows, hidden_size // blocks.depth

    def of_layer(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, width), lambda m, h, index: (index[0], 0, 0))

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, width), lambda m, h, _: (m, 0))

    operands = [x, values]
    specs = [
        of_rows(hidden_size),
        pl.BlockSpec((1, num_experts, blocks.depth), lambda m, h, index: (index[0], 0, h)),
    ]
    if norm is not None:
        operands.append(stacked(float_values(norm.weight), layer, 2)[:, None])
        specs.append(of_layer(hidden_size))
    if bias is not None:
        operands.append(stacked(bias, layer, 2)[:, None])
        specs.append(of_layer(num_experts))
    widths = [(rule.top_k, jnp.int32), (rule.top_k, jnp.float32), (num_experts, jnp.float32)]
    if norm is not None:
        widths.append((hidden_size, x.dtype))
    vmem = 2 * (1 + (norm is not None)) * rows * hidden_size * x.dtype.itemsize
    vmem += 2 * num_experts * blocks.depth * values.dtype.itemsize + 8 * num_experts * LANES * 4
    kernel = functools.partial(
        _kernel, rule=rule, eps=None if norm is None else norm.eps, has_bias=bias is not None, steps=steps
    )
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-num_rows // rows), steps),
            in_specs=specs,
            out_specs=[of_rows(width) for width, _ in widths],
            scratch_shapes=[pltpu.VMEM((num_experts, rows), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct((num_rows, width), dtype) for width, dtype in widths],
        compiler_params=compiler_params(("parallel", "arbitrary"), vmem),
        name="dsv3_route",
        interpret=interpret(),
    )(layer_index(layer), *operands)
    ids, weights, scores = out[:3]
    return Routed(ids, weights, scores, out[3] if norm is not None else None)


def _kernel(
    layer: Any, x: Any, weight: Any, *refs: Any, rule: Rule, eps: float | None, has_bias: bool, steps: int
) -> None:
    remaining = list(refs)
    norm_weight = remaining.pop(0) if eps is not None else None
    bias = remaining.pop(0) if has_bias else None
    ids, weights, scores, *normed, logits = remaining
    step, depth = pl.program_id(1), weight.shape[-1]
    if norm_weight is not None and eps is not None:

        @pl.when(step == 0)
        def _() -> None:
            _normalize_rows(x, norm_weight[0], eps, normed[0])

        x = normed[0]
    columns = slice(None) if steps == 1 else pl.ds(pl.multiple_of(step * depth, LANES), depth)
    part = _dot(weight[0], x[:, columns])

    @pl.when(step == 0)
    def _() -> None:
        logits[...] = part

    @pl.when(step > 0)
    def _() -> None:
        logits[...] += part

    @pl.when(step == steps - 1)
    def _() -> None:
        scored = _score(logits[...], rule)
        choice = scored
        if bias is not None:
            column = jnp.broadcast_to(bias[0], (LANES, bias.shape[-1])).T
            choice = scored + column[:, : scored.shape[1]]
        chosen, combined = choose_columns(choice, scored, rule)
        scores[...] = scored.T
        ids[...] = chosen.T
        weights[...] = combined.T


def _normalize_rows(x: Any, weight: Array, eps: float, out: Any) -> None:
    def some(rows: Any) -> None:
        out[rows, :] = normalize(x[rows, :], weight.astype(jnp.float32), eps)

    whole, rest = divmod(x.shape[0], NORM_ROWS)

    def step(i: Array, carry: int) -> int:
        some(pl.ds(pl.multiple_of(i * NORM_ROWS, NORM_ROWS), NORM_ROWS))
        return carry

    lax.fori_loop(0, whole, step, 0)
    if rest:
        some(pl.ds(whole * NORM_ROWS, rest))


def _dot(weight: Array, x: Array) -> Array:
    """float32 weight @ x.T; float32 factors are not rounded to bfloat16."""
    if x.shape[0] == 1:
        # The compiler has no product of a bfloat16 matrix with a single row.
        return _dot(weight, jnp.broadcast_to(x, (SUBLANES, x.shape[1])))[:, :1]
    if weight.dtype == x.dtype == jnp.bfloat16:
        return lax.dot_general(weight, x, NT, preferred_element_type=jnp.float32)
    wide = (weight.astype(jnp.float32), x.astype(jnp.float32))
    return lax.dot_general(*wide, NT, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _score(logits: Array, rule: Rule) -> Array:
    """Scores of float32 [E, M] logits."""
    if rule.scoring == "sigmoid":
        return jax.nn.sigmoid(logits)
    shifted = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return shifted / jnp.sum(shifted, axis=0, keepdims=True)
