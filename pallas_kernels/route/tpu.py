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
from pallas_kernels.gradient import with_gradient_of
from pallas_kernels.normalize import Norm
from pallas_kernels.route import reference
from pallas_kernels.route.rule import Routed, Rule
from pallas_kernels.route.tpu_choose import choose_columns
from pallas_kernels.stack import ROW_GROUP, float_values, layer_index, row_of_layer, stacked

LANES = 128
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
    limit = (3 << 18) // (num_experts * bytes_an_element)
    parts = [d for d in range(LANES, hidden_size, LANES) if hidden_size % d == 0 and d <= max(limit, LANES)]
    return Blocks(rows, max(parts, default=hidden_size))


def route(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, rule: Rule, norm: Norm | None
) -> Routed:
    """Arguments as of the public function."""

    def by_reference(
        x: Array, weight: Array, bias: Array | None, layer: Array | None, norm: Norm | None
    ) -> Routed:
        return reference.route(x, weight, bias, layer, rule, norm)

    def kernel(x: Array, weight: Array, bias: Array | None, layer: Array | None, norm: Norm | None) -> Routed:
        return _forward(x, weight, bias, layer, rule, norm)

    return with_gradient_of(by_reference, kernel)(x, weight, bias, layer, norm)


def _forward(
    x: Array, weight: Array, bias: Array | None, layer: Array | int | None, rule: Rule, norm: Norm | None
) -> Routed:
    num_rows, hidden_size = x.shape
    values = stacked(float_values(weight), layer, 3)
    num_experts = values.shape[1]
    blocks = choose_blocks(num_rows, num_experts, hidden_size, values.dtype.itemsize)
    rows, steps = blocks.rows, hidden_size // blocks.depth

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, width), lambda m, h, _: (m, 0))

    layers = min(ROW_GROUP, values.shape[0])
    operands = [x, values]
    specs = [
        of_rows(hidden_size),
        pl.BlockSpec((1, num_experts, blocks.depth), lambda m, h, index: (index[0], 0, h)),
    ]
    if norm is not None:
        operands.append(stacked(float_values(norm.weight), layer, 2))
        specs.append(pl.BlockSpec((layers, blocks.depth), lambda m, h, index: (index[0] // layers, h)))
    if bias is not None:
        operands.append(stacked(bias, layer, 2))
        specs.append(pl.BlockSpec((layers, num_experts), lambda m, h, index: (index[0] // layers, 0)))
    widths = [(rule.top_k, jnp.int32), (rule.top_k, jnp.float32), (num_experts, jnp.float32)]
    out_specs = [of_rows(width) for width, _ in widths]
    scratch = [
        pltpu.VMEM((rows, num_experts), jnp.float32),
        *[pltpu.VMEM((LANES, num_experts), jnp.float32)] * 2,
    ]
    if norm is not None:
        widths.append((hidden_size, x.dtype))
        out_specs.append(pl.BlockSpec((rows, blocks.depth), lambda m, h, _: (m, h)))
        scratch.append(pltpu.VMEM((rows, LANES), jnp.float32))
    vmem = 2 * rows * (hidden_size + blocks.depth) * x.dtype.itemsize
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
            out_specs=out_specs,
            scratch_shapes=scratch,
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
    ids, weights, scores = remaining[:3]
    step, depth = pl.program_id(1), weight.shape[-1]
    columns = slice(None) if steps == 1 else pl.ds(pl.multiple_of(step * depth, LANES), depth)
    if norm_weight is None or eps is None:
        logits, choice, scored = remaining[3:]
        part = _dot(x[:, columns], weight[0])
    else:
        normed, logits, choice, scored, inverse = remaining[3:]

        @pl.when(step == 0)
        def _() -> None:
            _root_mean_squares(x, eps, inverse)

        _normalize(x, columns, inverse, row_of_layer(norm_weight, layer[0]), normed)
        part = _dot(normed[...], weight[0])

    @pl.when(step == 0)
    def _() -> None:
        logits[...] = part

    @pl.when(step > 0)
    def _() -> None:
        logits[...] += part

    @pl.when(step == steps - 1)
    def _() -> None:
        scores[...] = _score(logits[...], rule)
        # Experts go along sublanes in columns of 128 tokens; those of no token hold anything and touch no other.
        tokens = slice(0, x.shape[0])
        scored[tokens] = scores[...]
        choice[tokens] = scores[...] if bias is None else scores[...] + row_of_layer(bias, layer[0])
        chosen, combined = choose_columns(choice[...].T, scored[...].T, rule)
        ids[...] = chosen.T[tokens]
        weights[...] = combined.T[tokens]


def _root_mean_squares(x: Any, eps: float, inverse: Any) -> None:
    """1 / sqrt(mean(x^2) + eps) of every row, in all lanes."""

    def some(rows: Any) -> None:
        wide = x[rows, :].astype(jnp.float32)
        root = lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + eps)
        inverse[rows, :] = jnp.broadcast_to(root, (wide.shape[0], LANES))

    _for_rows(x.shape[0], some)


def _normalize(x: Any, columns: Any, inverse: Any, weight: Array, out: Any) -> None:
    """Some columns of what `pallas_kernels.normalize` defines."""

    def some(rows: Any) -> None:
        normalised = (x[rows, columns].astype(jnp.float32) * inverse[rows, :1]).astype(out.dtype)
        out[rows, :] = weight.astype(out.dtype) * normalised

    _for_rows(x.shape[0], some)


def _for_rows(num_rows: int, some: Any) -> None:
    whole, rest = divmod(num_rows, NORM_ROWS)

    def step(i: Array, carry: int) -> int:
        some(pl.ds(pl.multiple_of(i * NORM_ROWS, NORM_ROWS), NORM_ROWS))
        return carry

    lax.fori_loop(0, whole, step, 0)
    if rest:
        some(pl.ds(whole * NORM_ROWS, rest))


def _dot(x: Array, weight: Array) -> Array:
    """float32 x @ weight.T; float32 factors are not rounded to bfloat16."""
    if weight.dtype == x.dtype == jnp.bfloat16:
        return lax.dot_general(x, weight, NT, preferred_element_type=jnp.float32)
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    return lax.dot_general(x, weight, NT, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _score(logits: Array, rule: Rule) -> Array:
    """Scores of float32 [M, E] logits."""
    if rule.scoring == "sigmoid":
        return jax.nn.sigmoid(logits)
    shifted = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return shifted / jnp.sum(shifted, axis=1, keepdims=True)
