"""Cases of `route` and `group_rows`: V3's router and the sorting of its tokens by expert."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.tpu_case import Case
from pallas_kernels.group_rows import Grouping, group_rows
from pallas_kernels.grouped_matmul import row_tile
from pallas_kernels.normalize import Norm
from pallas_kernels.route import Routed, route

LAYERS = 58
HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 7168, 256, 8
TOKENS = {"route": (1, 8, 128, 4096), "group_rows": (1, 8, 128)}


def route_cases() -> list[Case]:
    """Both operations; the router with its norm in front."""
    return [*_routes(), *_groupings()]


def _routes() -> Iterator[Case]:
    def routed(x: Array, layer: Array, weight: Array, bias: Array, norm_weight: Array) -> Routed:
        return route(
            x,
            weight,
            bias,
            layer=layer,
            top_k=TOP_K,
            n_group=8,
            topk_group=4,
            group_score="top2",
            scoring="sigmoid",
            normalize=True,
            scale=2.5,
            norm=Norm(norm_weight, 1e-6),
            implementation="pallas",
        )

    for tokens in TOKENS["route"]:
        yield Case(
            kernel="dsv3_route",
            label=f"8 of 256 experts in 8 groups, norm in front, M = {tokens}",
            function=routed,
            arguments=(
                jax.ShapeDtypeStruct((tokens, HIDDEN_SIZE), jnp.bfloat16),
                jax.ShapeDtypeStruct((), jnp.int32),
                jax.ShapeDtypeStruct((LAYERS, NUM_EXPERTS, HIDDEN_SIZE), jnp.bfloat16),
                jax.ShapeDtypeStruct((LAYERS, NUM_EXPERTS), jnp.float32),
                jax.ShapeDtypeStruct((LAYERS, HIDDEN_SIZE), jnp.bfloat16),
            ),
            ideal_bytes=(NUM_EXPERTS + 1 + 2 * tokens) * HIDDEN_SIZE * 2
            + (tokens + 1) * NUM_EXPERTS * 4
            + tokens * TOP_K * 8,
        )


def _groupings() -> Iterator[Case]:
    for tokens in TOKENS["group_rows"]:
        pairs = tokens * TOP_K
        tile = row_tile(pairs, NUM_EXPERTS)

        def grouped(ids: Array, valid: Array, tile: int = tile) -> Grouping:
            return group_rows(ids, valid, num_groups=NUM_EXPERTS, row_tile=tile, implementation="pallas")

        yield Case(
            kernel="dsv3_group_rows",
            label=f"8 of 256 groups, M = {tokens}",
            function=grouped,
            arguments=(
                jax.ShapeDtypeStruct((tokens, TOP_K), jnp.int32),
                jax.ShapeDtypeStruct((tokens,), jnp.bool_),
            ),
            ideal_bytes=tokens + (3 * pairs + 2 * NUM_EXPERTS + 2 * min(NUM_EXPERTS, pairs)) * 4,
        )
