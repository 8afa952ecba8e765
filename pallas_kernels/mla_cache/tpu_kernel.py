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
CHUNK = 32
"""Tokens whose entries are made together: more would not fit the registers."""


@dataclasses.dataclass(frozen=True)
class Refs:
    """What the kernel reads and writes.

    Attributes:
        layer, norm_layer, start, counts, pages: prefetched scalars; `pages` is [windows, B], or None.
        operands: compressed [B * Q, rank + Dr], rope [B * Q, Dr] and norm weights [Ln, rank], where XLA put them.
        cache: the cache, and its scales if it has any, likewise.
        loaded: the operands of this grid step in VMEM.
        new: the new entries, int32 [tokens, W], each number's bits repeated over the word; then their scales,
            float32 [tokens, 128], each repeated over the lanes.
        tiles: windows of every array of `cache`: [windows, tokens of a window, W] and float32 [windows, 1, 128].
        semaphores: of all copies of a direction.
    """

    layer: Any
    norm_layer: Any
    start: Any
    counts: Any
    pages: Any
    operands: list[Any]
    cache: list[Any]
    loaded: list[Any]
    new: list[Any]
    tiles: list[Any]
    semaphores: Any


@dataclasses.dataclass(frozen=True)
class Window:
    """A tile of the cache that new tokens of a row touch.

    Attributes:
        is_first: of its row.
        buffer: its place in VMEM.
        written: whether new tokens fall into it: one condition for entries, one for scales, whose tiles are longer and
            shared by windows.
        block: the row or page of the cache that holds it.
        slot: where it begins in that.
        first: position of the row's first token, counted from the beginning of the tile of entries, and of scales.
    """

    is_first: bool
    buffer: Array
    written: tuple[Array, Array]
    block: Array
    slot: Array
    first: tuple[Array, Array]


def kernel(*arguments: Any, plan: Plan, eps: float, paged: bool, scaled: bool) -> None:
    refs = _refs(list(arguments), paged, 1 + scaled)
    first_row = pl.program_id(0) * plan.rows

    def for_windows(action: Callable[[Window, Array, Array], None]) -> list[Array]:
        """Calls action(window, row, row of this step) for all; returns how many are written, of each array."""

        def step(i: Array, total: Array) -> Array:
            row = first_row + i
            for window in _windows(plan, refs, row, i):
                action(window, row, i)
                # Both counts in one number: a core has few scalar registers.
                total += window.written[0].astype(jnp.int32)
                if scaled:
                    total += window.written[1].astype(jnp.int32) << 16
            return total

        total = lax.fori_loop(0, plan.rows, step, jnp.int32(0))
        return [total & 0xFFFF, total >> 16][: 1 + scaled]

    totals = for_windows(lambda window, row, i: _start(refs, plan, window, READS))
    _load_operands(refs, plan, first_row)
    _make_entries(refs, plan, eps)
    _wait(refs, totals, READS)

    def change(window: Window, row: Array, i: Array) -> None:
        def work() -> None:
            _change(refs, plan, window, refs.counts[row], i * plan.queries)
            _start(refs, plan, window, WRITES)

        # The first is hardly ever without a token, the others are most of the time.
        if window.is_first:
            work()
        else:
            pl.when(window.written[0])(work)

    for_windows(change)
    _wait(refs, totals, WRITES)


def _refs(arguments: list[Any], paged: bool, num_caches: int) -> Refs:
    def take(count: int) -> list[Any]:
        taken = arguments[:count]
        del arguments[:count]
        return taken

    layer, norm_layer, start, counts = take(4)
    pages = take(1)[0] if paged else None
    operands = take(3)
    # The caches as inputs: the same memory as the outputs.
    take(num_caches)
    return Refs(
        layer=layer,
        norm_layer=norm_layer,
        start=start,
        counts=counts,
        pages=pages,
        operands=operands,
        cache=take(num_caches),
        loaded=take(3),
        new=take(num_caches),
        tiles=take(num_caches),
        semaphores=arguments[0],
    )


def _windows(plan: Plan, refs: Refs, row: Array, index: Array) -> list[Window]:
    """The windows of one row; `index` counts rows from the grid step's first."""
    start, count = refs.start[row], refs.counts[row]
    windows: list[Window] = []
    previous = None
    for i in range(plan.windows):
        base = (start & -plan.window) + i * plan.window
        written = (base < start + count) & (base < plan.capacity)
        block, slot = row, base
        if refs.pages is not None:
            block = refs.pages[i, row]
            slot = lax.rem(base, jnp.int32(plan.page_size))
            written &= (block >= 0) & (block < refs.cache[0].shape[1])
        lanes = base & -LANES
        scales_written = written if previous is None else written & (lanes != previous)
        windows.append(
            Window(
                is_first=i == 0,
                buffer=index * plan.windows + i,
                written=(written, scales_written),
                block=block,
                slot=slot,
                first=(start - base, start - lanes),
            )
        )
        previous = lanes
    return windows


def _copies(refs: Refs, plan: Plan, block: Array, slot: Array, buffer: Array, direction: int) -> list[Any]:
    """The copies of a window's tiles into VMEM or, for `WRITES`, back."""
    places: list[tuple[Any, ...]] = [
        (block, pl.ds(pl.multiple_of(slot, plan.window), plan.window)),
        (block, slice(None), pl.ds(pl.multiple_of(slot & -LANES, LANES), LANES)),
    ]
    copies = []
    for cache, tile, place in zip(refs.cache, refs.tiles, places, strict=False):
        source, target = cache.at[refs.layer[0], *place], tile.at[buffer]
        if direction == WRITES:
            source, target = target, source
        copies.append(pltpu.make_async_copy(source, target, refs.semaphores.at[direction]))
    return copies


def _start(refs: Refs, plan: Plan, window: Window, direction: int) -> None:
    copies = _copies(refs, plan, window.block, window.slot, window.buffer, direction)
    for copy, written in zip(copies, window.written, strict=False):
        pl.when(written)(copy.start)


def _wait(refs: Refs, totals: list[Array], direction: int) -> None:
    """Waits for that many copies of every array, 2^i at a time: a semaphore counts bytes, whoever brings them."""
    for tiles, total in zip(refs.tiles, totals, strict=True):
        for i in range(tiles.shape[0].bit_length()):
            some = tiles.at[pl.ds(0, 1 << i)]
            copy = pltpu.make_async_copy(some, some, refs.semaphores.at[direction])
            pl.when((total & (1 << i)) != 0)(copy.wait)


def _load_operands(refs: Refs, plan: Plan, first_row: Array) -> None:
    tokens = pl.ds(first_row * plan.queries, plan.rows * plan.queries)
    compressed, rope, weight = refs.operands
    parts = [compressed.at[tokens], rope.at[tokens], weight]
    copies = [
        pltpu.make_async_copy(part, target, refs.semaphores.at[OPERANDS])
        for part, target in zip(parts, refs.loaded, strict=True)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def _make_entries(refs: Refs, plan: Plan, eps: float) -> None:
    compressed, rope, weight = refs.loaded
    scale = _norm_weight(weight, refs.norm_layer[0])

    def make(tokens: Any) -> None:
        entry = _entries(compressed[tokens, :], rope[tokens, :], scale, plan, eps)
        if len(refs.new) == 2:
            factor = float8_scales(jnp.max(jnp.abs(entry), axis=1, keepdims=True), None, in_kernel=True)
            refs.new[1][tokens, :] = jnp.broadcast_to(factor, (factor.shape[0], LANES))
            entry = round_to_float8(entry, factor, in_kernel=True)
        refs.new[0][tokens, :] = _repeated_bits(entry.astype(refs.cache[0].dtype))

    num_tokens = plan.rows * plan.queries
    chunks, rest = divmod(num_tokens, CHUNK)
    if chunks:

        def step(i: Array, carry: int) -> int:
            make(pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK))
            return carry

        lax.fori_loop(0, chunks, step, 0)
    if rest:
        make(pl.ds(chunks * CHUNK, rest))


def _norm_weight(weights: Any, layer: Array) -> Array:
    """One row of the stack, float32 [1, rank]: a sum over rows, since packed rows can't be addressed."""
    row = lax.broadcasted_iota(jnp.int32, weights.shape, 0)
    return jnp.sum(jnp.where(row == layer, weights[...].astype(jnp.float32), 0), axis=0, keepdims=True)


def _entries(compressed: Array, rope: Array, weight: Array, plan: Plan, eps: float) -> Array:
    """The entries of some tokens, float32 [tokens, W], values of compressed's dtype."""
    latent = normalize(compressed[:, : plan.rank], weight, eps)
    key = rotate_by_matmul(compressed[:, plan.rank :], rope)
    parts = [latent.astype(jnp.float32), key.astype(jnp.float32)]
    padding = plan.width - compressed.shape[1]
    if padding:
        parts.append(jnp.zeros((compressed.shape[0], padding), jnp.float32))
    return jnp.concatenate(parts, axis=1)


def _repeated_bits(entry: Array) -> Array:
    """The bit pattern of every number, as often as it fits an int32."""
    if entry.dtype == jnp.float32:
        return lax.bitcast_convert_type(entry, jnp.int32)
    if entry.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(entry.astype(jnp.float32), jnp.int32)
        return bits | lax.shift_right_logical(bits, 16)
    bits = lax.bitcast_convert_type(entry, jnp.int8).astype(jnp.int32) & 0xFF
    bits |= bits << 8
    return bits | bits << 16


def _change(refs: Refs, plan: Plan, window: Window, count: Array, token: Array) -> None:
    """Puts a row's new tokens into the tiles of a window; `token` is the first of them."""
    entries, tile = refs.new[0], refs.tiles[0]
    words = pltpu.bitcast(tile[window.buffer], jnp.int32)
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    bits = 32 // plan.packing
    for i in range(plan.queries):
        offset = window.first[0] + i
        inside = (offset >= 0) & (offset < plan.window) & (i < count)
        word = jnp.where(inside, lax.shift_right_arithmetic(offset, plan.packing.bit_length() - 1), SUBLANES)
        replaced = (
            jnp.int32(-1 if plan.packing == 1 else (1 << bits) - 1) << (offset & plan.packing - 1) * bits
        )
        mask = jnp.where(sublane == word, replaced, 0)
        mask = jnp.concatenate([mask] * (plan.width // LANES), axis=1)
        words = words & ~mask | jnp.broadcast_to(entries[pl.ds(token + i, 1), :], words.shape) & mask
    tile[window.buffer] = pltpu.bitcast(words, tile.dtype)
    if len(refs.new) == 1:
        return
    scales, scale_tile = refs.new[1], refs.tiles[1]
    factors = scale_tile[window.buffer]
    lane = lax.broadcasted_iota(jnp.int32, factors.shape, 1)
    for i in range(plan.queries):
        position = jnp.where(i < count, window.first[1] + i, LANES)
        factors = jnp.where(lane == position, scales[pl.ds(token + i, 1), :], factors)
    scale_tile[window.buffer] = factors
