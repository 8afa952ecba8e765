"""The operations once more, in float64 NumPy loops: what the references are compared with."""

import ml_dtypes
import numpy as np


def quantise_rows(x: np.ndarray, scale_fmt: str | None) -> tuple[np.ndarray, np.ndarray]:
    """`act_quant` of the release's kernel.py: rows in blocks of 128; float8 values, float32 scales."""
    rows, columns = x.shape
    values = np.empty(x.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty((rows, -(-columns // 128)), np.float32)
    for row in range(rows):
        for block, start in enumerate(range(0, columns, 128)):
            part = x[row, start : start + 128].astype(np.float32)
            scale = power_of_two_above(max(np.float32(np.abs(part).max()), np.float32(1e-4)), scale_fmt)
            values[row, start : start + 128] = np.clip(part / scale, -448, 448).astype(values.dtype)
            scales[row, block] = scale
    return values, scales


def power_of_two_above(amax: np.float32, scale_fmt: str | None) -> np.float32:
    """amax / 448, rounded up to a power of two for ue8m0."""
    scale = np.float32(amax) / np.float32(448)
    if scale_fmt != "ue8m0":
        return scale
    mantissa, exponent = np.frexp(scale)
    return np.float32(np.ldexp(1.0, int(exponent) - int(mantissa == 0.5)))


def dequantise(values: np.ndarray, scales: np.ndarray, block_rows: int) -> np.ndarray:
    """value * scale, float64; a scale for every `block_rows` rows and 128 columns."""
    expanded = scales.astype(np.float64).repeat(block_rows, 0).repeat(128, 1)
    return values.astype(np.float64) * expanded[: values.shape[0], : values.shape[1]]


def fp8_gemm(x: np.ndarray, values: np.ndarray, scales: np.ndarray, scale_fmt: str | None) -> np.ndarray:
    """`fp8_gemm` of the release's kernel.py: partial products of 128 columns, each times both scales. [M, N]."""
    q, row_scales = quantise_rows(x, scale_fmt)
    out = np.zeros((len(x), len(values)))
    for block, start in enumerate(range(0, x.shape[1], 128)):
        part = slice(start, start + 128)
        product = q[:, part].astype(np.float64) @ values[:, part].astype(np.float64).T
        out += product * row_scales[:, block, None] * scales[:, block].repeat(128)[: len(values)]
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """One query [D] over keys [S, D] and values [S, V]: result [V] and the scores' log-sum-exp."""
    scores = k.astype(np.float64) @ q.astype(np.float64) * scale
    peak = scores.max()
    weights = np.exp(scores - peak)
    return weights @ v.astype(np.float64) / weights.sum(), peak + np.log(weights.sum())
