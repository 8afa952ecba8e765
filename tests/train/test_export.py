import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import BlockQuantization, ModelConfig
from dsv3_jax.model import abstract_params, init_params
from dsv3_jax.train.export import stored_params
from dsv3_jax.train.step import TRAIN_PRECISION
from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.quantize import dequantize_weight


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_stored_params_are_what_the_config_announces(tiny_config: ModelConfig, scale_fmt: str | None) -> None:
    config = dataclasses.replace(tiny_config, quantization_config=BlockQuantization(scale_fmt=scale_fmt))
    params = init_params(config, TRAIN_PRECISION, jax.random.key(0))
    stored = jax.jit(stored_params, static_argnums=1)(params, config)
    expected = abstract_params(config, "float8")
    assert jax.tree.map(lambda a: (a.shape, a.dtype), stored) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    linear, trained = (tree["dense_layers"]["mlp"]["up_proj"] for tree in (stored, params))
    back = dequantize_weight(BlockScaled(linear["weight"], linear["weight_scale_inv"]))
    # Half a step of e4m3 at the top of its range, where the largest value of a block lies; scales that are powers
    # of two may be twice as large.
    largest = float(abs(trained["weight"]).max())
    np.testing.assert_allclose(back, trained["weight"], rtol=0, atol=largest / (14 if scale_fmt else 28))
    exponents = np.log2(np.asarray(linear["weight_scale_inv"]))
    assert (exponents == np.round(exponents)).all() == (scale_fmt == "ue8m0")


def test_without_quantisation_the_dtype_of_the_config_is_stored(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, torch_dtype="bfloat16")
    stored = stored_params(init_params(config, TRAIN_PRECISION, jax.random.key(0)), config)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(stored)}
    assert dtypes == {"bfloat16", "float32"}
    assert stored["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"].dtype == "float32"
