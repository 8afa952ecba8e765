import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import init_params
from dsv3_jax.model.layout import row_major_scales
from dsv3_jax.precision import Precision


def test_scales_keep_their_values_and_weights_their_memory(tiny_config: ModelConfig) -> None:
    params = init_params(tiny_config, Precision(weights="float8"), jax.random.key(0))
    pinned = row_major_scales(params)
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(pinned), strict=True
    ):
        if path[-1].key == "weight_scale_inv":
            assert after.format.layout.major_to_minor == tuple(range(after.ndim))
            np.testing.assert_array_equal(after, before)
        else:
            assert after is before


def test_shapes_are_pinned_too() -> None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    scales = jax.ShapeDtypeStruct((3, 16, 56), jnp.float32, sharding=device)
    pinned = row_major_scales({"gate_proj": {"weight_scale_inv": scales}})["gate_proj"]["weight_scale_inv"]
    assert pinned.format.layout.major_to_minor == (0, 1, 2)
