"""Rotary position embedding with YaRN, on interleaved pairs as DeepSeek's checkpoints hold them."""

import math

import numpy as np

from dsv3_jax.config import ModelConfig, YarnScaling


def yarn_mscale(factor: float, mscale: float) -> float:
    """mu = 0.1 mscale ln(factor) + 1: how much attention is sharpened for a context extended by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor of the attention scores: (dn + dr)^-0.5, times mu(mscale_all_dim)^2 under YaRN."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position for every pair of dims, float32 [qk_rope_head_dim / 2].

    YaRN (arXiv 2309.00071; precompute_freqs_cis of the release's model.py) keeps the high frequencies, divides the
    low ones by `factor`, and ramps between the pairs that turn `beta_fast` and `beta_slow` times in the original
    context. It applies at every length.
    """
    dim = config.qk_rope_head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponent)
    if config.rope_scaling is None:
        return frequencies
    low, high = _correction_range(config.rope_scaling, dim, config.rope_theta)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    return frequencies / np.float32(config.rope_scaling.factor) * ramp + frequencies * (1 - ramp)


def _correction_range(yarn: YarnScaling, dim: int, theta: float) -> tuple[float, float]:
    def pair(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), dim - 1)
    return low, high + 0.001 if low == high else high


def rope_table(config: ModelConfig, length: int) -> np.ndarray:
    """Cosines, then sines, of positions 0 ... length - 1: float32 [length, qk_rope_head_dim].

    Made on the host: angles reach 1.6e5, where the sine of an accelerator is not accurate. The angle is the float32
    product that PyTorch takes, its sine and cosine are those of float64.
    """
    positions = np.arange(length, dtype=np.float32)
    angles = (positions[:, None] * inverse_frequencies(config)).astype(np.float64)
    yarn = config.rope_scaling
    factor = 1.0
    if yarn and yarn.mscale and yarn.mscale_all_dim:
        factor = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    elif yarn:
        factor = yarn_mscale(yarn.factor, 1.0)
    return (np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) * factor).astype(np.float32)
