"""Weights of the model: linears, norms and embeddings, one matrix or a stack of them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.precision import Precision
from pallas_kernels.block_scaled import BlockScaled, Weight
from pallas_kernels.block_scaled_matmul import ActivationFormat, block_scaled_matmul
from pallas_kernels.decode import to_float32
from pallas_kernels.normalize import Norm, rms_norm
from pallas_kernels.quantize import ScaleFormat, quantize_weight
from sharding import gather_columns, over_tensor, sum_over_tensor

Layer = Array | int | None
"""Which matrix of a stack: an index, or None where the weights carry no layer dimension."""


class Parameters:
    """Makes the parameters of one model: how they are initialised and in which format they are held."""

    def __init__(self, config: ModelConfig, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        self.precision = precision
        self.rngs = rngs

    @property
    def plain_dtype(self) -> jnp.dtype:
        """Type of everything that is never quantised."""
        return jnp.dtype("bfloat16" if self.precision.weights == "float8" else self.precision.weights)

    def normal(self, shape: tuple[int, ...]) -> nnx.Param:
        """A plain weight, normal with the config's `initializer_range`."""
        values = jax.random.normal(self.rngs.params(), shape) * self.config.initializer_range
        return nnx.Param(values.astype(self.plain_dtype))

    def ones(self, shape: tuple[int, ...]) -> nnx.Param:
        """Weight of a norm."""
        return nnx.Param(jnp.ones(shape, self.plain_dtype))

    def zeros_float32(self, shape: tuple[int, ...]) -> nnx.Param:
        """A parameter that is float32 in every format."""
        return nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """y = x W^T without bias, W in the format of the model's weights: FP8 blocks or plain.

    Parameters: `weight` [*stack, out_features, in_features] and, if FP8, `weight_scale_inv`.
    """

    def __init__(self, make: Parameters, stack: tuple[int, ...], out_features: int, in_features: int):
        shape = (*stack, out_features, in_features)
        self.weight, self.weight_scale_inv = make.normal(shape), nnx.data(None)
        if make.precision.weights == "float8":
            quantised = quantize_weight(self.weight[...])
            self.weight, self.weight_scale_inv = nnx.Param(quantised.values), nnx.Param(quantised.scales)
        quantization = make.config.quantization_config
        self.activations: ActivationFormat = make.precision.activations
        self.scale_fmt: ScaleFormat = quantization.scale_fmt if quantization else None
        self.implementation = make.precision.implementation

    def matrix(self) -> Weight:
        """The weight as the operations of `pallas_kernels` take it."""
        if self.weight_scale_inv is None:
            return self.weight[...]
        return BlockScaled(self.weight[...], self.weight_scale_inv[...])

    def __call__(
        self, x: Array, layer: Layer, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """[..., in_features] -> [..., out_features], in x's dtype: W norm(x) + residual."""
        return block_scaled_matmul(
            x,
            self.matrix(),
            layer=layer,
            activations=self.activations,
            scale_fmt=self.scale_fmt,
            norm=norm,
            residual=residual,
            implementation=self.implementation,
        )

    def onto(self, residual: Array, x: Array, layer: Layer) -> Array:
        """residual + W x; over `tensor`, where W is a slice of the rows' inputs, the devices' products are summed."""
        if over_tensor():
            return residual + sum_over_tensor(self(x, layer))
        return self(x, layer, residual=residual)


class PlainLinear(nnx.Module):
    """A linear that the release never quantises (router, lm_head, eh_proj): plain weight, float32 result."""

    def __init__(self, make: Parameters, stack: tuple[int, ...], out_features: int, in_features: int):
        self.weight = make.normal((*stack, out_features, in_features))
        self.implementation = make.precision.implementation

    def __call__(self, x: Array, layer: Layer = None, *, norm: Norm | None = None) -> Array:
        """[..., in_features] -> float32 [..., out_features]: W norm(x)."""
        return block_scaled_matmul(
            x,
            self.weight[...],
            layer=layer,
            norm=norm,
            out_dtype=jnp.float32,
            implementation=self.implementation,
        )


class Embedding(nnx.Module):
    """Token embeddings, without a scale factor."""

    def __init__(self, make: Parameters, vocab_size: int, hidden_size: int):
        self.weight = make.normal((vocab_size, hidden_size))
        self.dtype = make.precision.dtype
        self.implementation = make.precision.implementation

    def __call__(self, tokens: Array) -> Array:
        """int32 [...] -> [..., hidden_size] in the compute dtype."""
        return gather_columns(to_float32(self.weight[...][tokens]).astype(self.dtype))

    def logits(self, x: Array, norm: Norm | None = None) -> Array:
        """The tied head: [..., hidden_size] -> float32 [..., vocab_size]."""
        return block_scaled_matmul(
            x, self.weight[...], norm=norm, out_dtype=jnp.float32, implementation=self.implementation
        )


class RMSNorm(nnx.Module):
    """An RMSNorm's weight; most are fused into the operation that follows (`parameters`)."""

    def __init__(self, make: Parameters, stack: tuple[int, ...], size: int, eps: float):
        self.weight = make.ones((*stack, size))
        self.eps = eps

    def parameters(self) -> Norm:
        """Weight and eps as the operations of `pallas_kernels` take them."""
        return Norm(self.weight[...], self.eps)

    def __call__(self, x: Array, layer: Layer = None) -> Array:
        """[..., size] -> [..., size] in x's dtype."""
        return rms_norm(x, self.parameters(), layer)
