"""Cases of `grouped_matmul` and `grouped_swiglu`: V3's 256 experts, 8 a token, at 8, 128 and 4096 tokens."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.tpu_case import Case
from benchmarks.tpu_cases_matmul import matrix_bytes, stack_of
from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.block_scaled_matmul import ActivationFormat
from pallas_kernels.block_scaled_matmul.tpu_tile import TILE_COLUMNS
from pallas_kernels.group_rows import plan_visits
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, row_tile
from pallas_kernels.grouped_matmul.rows import chunk_rows
from pallas_kernels.grouped_matmul.tpu import block_columns

EXPERTS, TOP_K = 256, 8
PAIR, DOWN = (2048, 7168), (7168, 2048)
"""N, K of gate and up, and of down_proj."""
CHOSEN = {8: 57, 128: 252, 4096: 256}
"""Tokens -> experts that have any, about what uniform routing gives; one layer is as much as any chip holds."""


def grouped_cases() -> list[Case]:
    """Weight-only and W8A8."""
    formats: tuple[ActivationFormat, ...] = ("none", "float8")
    return [case for tokens in CHOSEN for activations in formats for case in _cases(tokens, activations)]


def route_uniformly(num_tokens: int) -> np.ndarray:
    """Rows of each expert, int32 [EXPERTS], when tokens choose at random: `CHOSEN` of them have any."""
    for seed in itertools.count():
        scores = np.random.default_rng(seed).random((num_tokens, EXPERTS))
        sizes = np.bincount(np.argsort(scores, axis=1)[:, :TOP_K].ravel(), minlength=EXPERTS)
        if np.count_nonzero(sizes) == CHOSEN[num_tokens]:
            return sizes.astype(np.int32)
    raise AssertionError("unreachable")


def _cases(num_tokens: int, activations: ActivationFormat) -> Iterator[Case]:
    sizes, num_rows = route_uniformly(num_tokens), num_tokens * TOP_K
    scalars = prefetched_scalars(sizes, num_rows)
    chunks = mean_chunks(sizes, num_rows, len(scalars[1]))
    label = f"{'W8A8' if activations == 'float8' else 'FP8 weight'}, {num_tokens} tokens, "
    label += f"{CHOSEN[num_tokens]} of {EXPERTS} experts"
    group_sizes, layer = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def pair(x: Array, sizes: Array, layer: Array, gate: BlockScaled, up: BlockScaled) -> Array:
        return grouped_swiglu(
            x, gate, up, sizes, layer=layer, activations=activations, implementation="pallas"
        )

    def down(x: Array, sizes: Array, layer: Array, row_scale: Array, weight: BlockScaled) -> Array:
        return grouped_matmul(
            x,
            weight,
            sizes,
            row_scale=row_scale,
            layer=layer,
            activations=activations,
            implementation="pallas",
        )

    for name, function, shape, extra in (
        ("swiglu", pair, PAIR, (stack_of(1, EXPERTS, shape=PAIR),) * 2),
        (
            "matmul",
            down,
            DOWN,
            (jax.ShapeDtypeStruct((num_rows,), jnp.float32), stack_of(1, EXPERTS, shape=DOWN)),
        ),
    ):
        weights = 2 if name == "swiglu" else 1
        columns = block_columns(shape[0], weights * shape[1])
        yield Case(
            kernel=f"dsv3_grouped_{name}",
            label=f"{'gate and up' if weights == 2 else 'down'} [{shape[0]}, {shape[1]}], {label}",
            function=function,
            arguments=(jax.ShapeDtypeStruct((num_rows, shape[1]), jnp.bfloat16), group_sizes, layer, *extra),
            ideal_bytes=weights * CHOSEN[num_tokens] * matrix_bytes(shape) + num_rows * sum(shape) * 2,
            trips=(chunks,) * -(-columns // TILE_COLUMNS),
            scalars=scalars,
        )


def prefetched_scalars(sizes: np.ndarray, num_rows: int) -> tuple[np.ndarray, ...]:
    """What the kernel prefetches: layer, group and tile of every visit, number of visits, first row of every group."""
    tile = row_tile(num_rows, len(sizes))
    visits = plan_visits(jnp.asarray(sizes), num_rows=num_rows, row_tile=tile)
    parts = (visits.visit_group, visits.visit_tile, visits.num_visits, visits.starts)
    return (np.zeros(1, np.int32), *(np.asarray(part) for part in parts))


def mean_chunks(sizes: np.ndarray, num_rows: int, num_visits: int) -> float:
    """Chunks of rows that the kernel multiplies in a visit, on an average of all grid steps."""
    tile, chunk = row_tile(num_rows, len(sizes)), chunk_rows(num_rows, len(sizes))
    ends = np.cumsum(sizes)
    chunks = 0
    for first, end in zip(ends - sizes, ends, strict=True):
        for start in range(int(first) // tile * tile, int(end) if end > first else 0, tile):
            low, high = max(int(first) - start, 0), min(int(end) - start, tile)
            chunks += -(-high // chunk) - low // chunk
    return chunks / num_visits
