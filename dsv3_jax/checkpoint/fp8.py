"""FP8 e4m3 weights with one float32 scale a 128x128 block: W[r, c] = values[r, c] * scale_inv[r // 128, c //
128].

The format of the V3 release (README_WEIGHTS.md of github.com/deepseek-ai/DeepSeek-V3, inference/kernel.py).
Blocks start at multiples of 128; those at the lower and right edge may be short. numpy only: import and
conversion run without JAX.
"""

import functools

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3_MAX = 448.0
MIN_AMAX = 1e-4  # keeps the scale of an all-zero block positive, as act_quant does for activations

_NAN_CODE = np.uint8(0x7F)  # 0x7f and 0xff are e4m3fn's two NaNs
_SLICE = 1 << 18  # bytes looked at in one go: fits the second-level cache


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight: its two last dimensions in blocks, rounded up."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // BLOCK), -(-columns // BLOCK))


def has_nan(codes: np.ndarray) -> bool:
    """Whether any of the e4m3 codes (uint8, one-dimensional) is a NaN."""
    scratch = np.empty(min(_SLICE, codes.size), np.uint8)
    for start in range(0, codes.size, _SLICE):
        part = codes[start : start + _SLICE]
        magnitudes = np.bitwise_and(part, _NAN_CODE, out=scratch[: part.size])
        if magnitudes.max() == _NAN_CODE:
            return True
    return False


def dequantize(codes: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """e4m3 codes (uint8 [rows, columns]) times their blocks' scales (float32) -> float32 [rows, columns].

    A band of rows may be given with its own rows of `scale_inv` if it starts at a multiple of 128.
    """
    rows, columns = codes.shape
    values = _decode(codes)
    for block in range(-(-rows // BLOCK)):
        band = values[block * BLOCK : (block + 1) * BLOCK]
        band *= np.repeat(scale_inv[block], BLOCK)[:columns]
    return values


def quantize(values: np.ndarray, *, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, columns] -> (float8_e4m3fn [rows, columns], float32 scale_inv in blocks of 128x128).

    The scale of a block is max(amax, 1e-4) / 448, rounded up to a power of two where `ue8m0`; values are
    round-to-nearest-even(value / scale), at most 448 in magnitude. A band of rows may be given alone if it
    starts at a multiple of 128. A value that is not finite makes its block's scale not finite; the caller
    looks.
    """
    rows, columns = values.shape
    row_starts, column_starts = np.arange(0, rows, BLOCK), np.arange(0, columns, BLOCK)
    amax = np.maximum.reduceat(np.abs(values), row_starts, axis=0)
    amax = np.maximum.reduceat(amax, column_starts, axis=1)
    scale = np.maximum(amax, np.float32(MIN_AMAX)) / np.float32(E4M3_MAX)
    if ue8m0:
        scale = round_up_to_power_of_two(scale)
    quotients = np.empty_like(values)
    for block, start in enumerate(row_starts):
        band = slice(start, start + BLOCK)
        with np.errstate(invalid="ignore"):
            np.divide(values[band], np.repeat(scale[block], BLOCK)[:columns], out=quotients[band])
    # ml_dtypes casts what lies beyond 464 to NaN, and a quotient may pass 448 by an ulp.
    np.clip(quotients, -E4M3_MAX, E4M3_MAX, out=quotients)
    return quotients.astype(ml_dtypes.float8_e4m3fn), scale


def round_up_to_power_of_two(scale: np.ndarray) -> np.ndarray:
    """Smallest power of two >= each positive normal float32 (ue8m0): exact, which float32 log2 is not."""
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x007FFFFF)) & np.uint32(0xFF800000)).view(np.float32)


@functools.cache
def _decoded_pairs() -> np.ndarray:
    """The two float32 values of every pair of codes, as one 64-bit word a pair."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32).view(np.uint64)


def _decode(codes: np.ndarray) -> np.ndarray:
    """e4m3 codes -> float32, two codes a table look-up; ml_dtypes' cast is scalar code."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    values = np.empty(flat.size, np.float32)
    even = flat.size & ~1
    pairs = np.frombuffer(flat[:even].data, np.uint16)
    np.take(_decoded_pairs(), pairs, out=values[:even].view(np.uint64), mode="clip")
    values[even:] = flat[even:].view(ml_dtypes.float8_e4m3fn)
    return values.reshape(codes.shape)
