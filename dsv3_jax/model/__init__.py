"""The model: Flax modules that hold stacked parameters, and the pure functions that run them."""

from dsv3_jax.model.transformer import abstract_params, init_params

__all__ = ["abstract_params", "init_params"]
