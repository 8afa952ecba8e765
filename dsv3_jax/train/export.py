"""A trained model as a checkpoint: the linears that the release quantises become FP8, the rest bfloat16."""

import jax
import jax.numpy as jnp
from jax import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import abstract_params
from dsv3_jax.model.functional import Params
from pallas_kernels.quantize import quantize_weight


def stored_params(params: Params, config: ModelConfig) -> Params:
    """Params in the format that the config's checkpoint has.

    Args:
        params: float32, nested as `abstract_params` says.

    Returns:
        The tree of `abstract_params(config, "float8")` where the config has a `quantization_config`, else that of
        its `torch_dtype`.
    """
    weights = "float8" if config.quantization_config else config.torch_dtype
    return _converted(params, abstract_params(config, weights), config)


def _converted(params: Params, like: Params, config: ModelConfig) -> Params:
    if "weight_scale_inv" in like:
        quantization = config.quantization_config
        scale_fmt = "ue8m0" if quantization and quantization.scale_fmt == "ue8m0" else None
        quantised = quantize_weight(params["weight"], scale_fmt=scale_fmt)
        return {"weight": quantised.values, "weight_scale_inv": quantised.scales}
    return {
        name: _converted(params[name], leaf, config) if isinstance(leaf, dict) else _cast(params[name], leaf)
        for name, leaf in like.items()
    }


def _cast(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
    return jnp.asarray(leaf, like.dtype)
