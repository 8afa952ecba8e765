"""The kernel of `mla_cache`.

A tile of the cache holds tokens that are to keep their bits, so it is read, changed and written. All reads are on
their way while the entries are made; then all writes are. Tiles are changed as 32-bit words: a token is a row of
them, or a half or quarter of each word of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_cache.plan import LANES, SUBLANES, Plan
from pallas_kernels.normalize import normalize
from pallas_kernels.quantize.rounding import float8_scales, round_to_float8
from pallas_kernels.rotary import rotate_by_matmul

READS, WRITES, OPERANDS = range(3)


@dataclasses.dataclass(frozen=True)
class Window:
    """A tile of the cache that new tokens of a row touch.

    Attributes:
        buffer: its place in VMEM.
        token: the row's first one, among those of this grid step.
        first: position of the row's first token, counted from the tile's first.
        count: of the row's tokens.
        written: whether there is any token for it.
        block: the row or page of the cache that holds it.
        slot: where it begins in that.
        scales_written: the same for the tile of scales, which windows may share.
        scale_first: `first`, counted from the first of the tile of scales.
    """

    buffer: Array
    token: Array
    first: Array
    count: Array
    written: Array
    block: Array
    slot: Array
    scales_written: Array
    scale_first: Array


def kernel(
    layer: Any,
    norm_layer: Any,
    start: Any,
    counts: Any,
    *refs: Any,
    plan: Plan,
    eps: float,
    paged: bool,
    scaled: bool,
) -> None:
    remaining = list(refs)
    pages = remaining.pop(0) if paged else None
    compressed, rope, weight = (remaining.pop(0) for _ in range(3))
    del remaining[: 1 + scaled]
    cache = remaining.pop(0)
    cache_scales = remaining.pop(0) if scaled else None
    new, new_rope, new_weight, words, tiles = (remaining.pop(0) for _ in range(5))
    scales, scale_tiles = (remaining.pop(0) for _ in range(2)) if scaled else (None, None)
    (semaphores,) = remaining

    first_row = pl.program_id(0) * plan.rows

    def for_windows(action: Callable[[Window], None]) -> None:
        def step(i: Array, carry: int) -> int:
            row = first_row + i
            for window in _windows(plan, row, i, start[row], counts[row], pages, cache.shape[1]):
                action(window)
            return carry

        lax.fori_loop(0, plan.rows, step, 0)

    def tile_copy(window: Window, back: bool) -> Any:
        place = cache.at[layer[0], window.block, pl.ds(pl.multiple_of(window.slot, plan.window), plan.window)]
        return _copy(place, tiles.at[window.buffer], back, semaphores)

    def scale_copy(window: Window, back: bool) -> Any:
        lane = window.slot // LANES * LANES
        lanes = pl.ds(pl.multiple_of(lane, LANES), LANES)
        place = cache_scales.at[layer[0], window.block, :, lanes]
        return _copy(place, scale_tiles.at[window.buffer], back, semaphores)

    def for_copies(window: Window, back: bool, action: Callable[[Any], None]) -> None:
        @pl.when(window.written)
        def _() -> None:
            action(tile_copy(window, back))

        if scaled:

            @pl.when(window.scales_written)
            def _() -> None:
                action(scale_copy(window, back))

    for_windows(lambda window: for_copies(window, False, lambda copy: copy.start()))
    tokens = pl.ds(first_row * plan.queries, plan.rows * plan.queries)
    operand_copies = [
        pltpu.make_async_copy(compressed.at[tokens], new, semaphores.at[OPERANDS]),
        pltpu.make_async_copy(rope.at[tokens], new_rope, semaphores.at[OPERANDS]),
        pltpu.make_async_copy(weight.at[norm_layer[0]], new_weight, semaphores.at[OPERANDS]),
    ]
    for copy in operand_copies:
        copy.start()
    for copy in operand_copies:
        copy.wait()
    entry = _entries(new, new_rope, new_weight, plan, eps)
    if scaled:
        scale = float8_scales(jnp.max(jnp.abs(entry), axis=1, keepdims=True), None, in_kernel=True)
        scales[...] = jnp.broadcast_to(scale, scales.shape)
        entry = round_to_float8(entry, scale, in_kernel=True)
    words[...] = _low_bits(entry.astype(cache.dtype))
    for_windows(lambda window: for_copies(window, False, lambda copy: copy.wait()))

    def change(window: Window) -> None:
        @pl.when(window.written)
        def _() -> None:
            tile = pltpu.bitcast(tiles[window.buffer], jnp.int32)
            tiles[window.buffer] = pltpu.bitcast(_put(tile, words, window, plan), cache.dtype)

        if scaled:

            @pl.when(window.scales_written)
            def _() -> None:
                scale_tiles[window.buffer] = _put_scales(scale_tiles[window.buffer], scales, window, plan)

        for_copies(window, True, lambda copy: copy.start())

    for_windows(change)
    for_windows(lambda window: for_copies(window, True, lambda copy: copy.wait()))


def _copy(place: Any, buffer: Any, back: bool, semaphores: Any) -> Any:
    if back:
        return pltpu.make_async_copy(buffer, place, semaphores.at[WRITES])
    return pltpu.make_async_copy(place, buffer, semaphores.at[READS])


def _windows(
    plan: Plan, row: Array, index: Array, start: Array, count: Array, pages: Any, num_blocks: int
) -> list[Window]:
    """The windows of one row; `index` counts rows from the grid step's first."""
    windows: list[Window] = []
    previous = None
    for i in range(plan.windows):
        base = (start // plan.window + i) * plan.window
        written = (base < start + count) & (base < plan.capacity)
        block, slot = row, base
        if pages is not None:
            block, slot = pages[row * plan.windows + i], base % plan.page_size
            written &= (block >= 0) & (block < num_blocks)
        scale_tile = base // LANES
        windows.append(
            Window(
                buffer=index * plan.windows + i,
                token=index * plan.queries,
                first=start - base,
                count=count,
                written=written,
                block=block,
                slot=slot,
                scales_written=written if previous is None else written & (scale_tile != previous),
                scale_first=start - scale_tile * LANES,
            )
        )
        previous = scale_tile
    return windows


def _entries(compressed: Any, rope: Any, weight: Any, plan: Plan, eps: float) -> Array:
    """The entries of all tokens, float32 [tokens, W], values of compressed's dtype."""
    latent = normalize(compressed[:, : plan.rank], weight[...].astype(jnp.float32), eps)
    key = rotate_by_matmul(compressed[:, plan.rank :], rope[...])
    parts = [latent.astype(jnp.float32), key.astype(jnp.float32)]
    padding = plan.width - compressed.shape[1]
    if padding:
        parts.append(jnp.zeros((compressed.shape[0], padding), jnp.float32))
    return jnp.concatenate(parts, axis=1)


def _low_bits(entry: Array) -> Array:
    """The bit pattern of every number in the low bits of an int32."""
    if entry.dtype == jnp.float32:
        return lax.bitcast_convert_type(entry, jnp.int32)
    if entry.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(entry.astype(jnp.float32), jnp.int32)
        return lax.shift_right_logical(bits, 16)
    return lax.bitcast_convert_type(entry, jnp.int8).astype(jnp.int32) & 0xFF


def _put(tile: Array, words: Any, window: Window, plan: Plan) -> Array:
    """Replaces the new tokens' part of a tile, int32 [8, W]."""
    sublane = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    bits = 32 // plan.packing
    for i in range(plan.queries):
        offset = window.first + i
        inside = (offset >= 0) & (offset < plan.window) & (i < window.count)
        row = jnp.where(inside, offset // plan.packing, SUBLANES)
        value = jnp.broadcast_to(words[pl.ds(window.token + i, 1)], tile.shape)
        if plan.packing > 1:
            shift = (offset % plan.packing) * bits
            kept = ~lax.shift_left(jnp.int32((1 << bits) - 1), shift)
            value = (tile & kept) | lax.shift_left(value, jnp.broadcast_to(shift, value.shape))
        tile = jnp.where(sublane == row, value, tile)
    return tile


def _put_scales(tile: Array, scales: Any, window: Window, plan: Plan) -> Array:
    """Replaces the new tokens' part of a tile of scales, float32 [1, lanes]."""
    lane = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    for i in range(plan.queries):
        position = jnp.where(i < window.count, window.scale_first + i, LANES)
        tile = jnp.where(lane == position, scales[pl.ds(window.token + i, 1), : tile.shape[1]], tile)
    return tile
