import dataclasses
import os
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dsv3_jax.config import named_config
from dsv3_jax.model.tensor_parallel import tensor_shardings
from dsv3_jax.precision import Precision


def test_four_devices_compute_what_one_does() -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.sharding.tensor_parallel"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def mesh() -> AbstractMesh:
    return AbstractMesh((8,), ("tensor",))


def test_every_matrix_of_v3_is_cut_by_eight(mesh) -> None:
    shardings = tensor_shardings(mesh, named_config("deepseek-v3"), Precision(weights="float8"))
    experts = shardings["moe_layers"]["mlp"]["experts"]
    assert experts["gate_proj"]["weight_scale_inv"].spec == PartitionSpec(None, None, "tensor", None)
    assert experts["down_proj"]["weight"].spec == PartitionSpec(None, None, None, "tensor")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 12}, "num_attention_heads = 12 does not divide by tensor = 8"),
        (
            {"moe_intermediate_size": 1536 + 256},
            r"dimension 3 of moe_layers.mlp.experts.down_proj.weight .* tensor = 8 into blocks of 128",
        ),
        ({"tie_word_embeddings": True}, "expected tie_word_embeddings false"),
    ],
)
def test_what_does_not_divide_is_named(mesh, changes: dict, message: str) -> None:
    config = dataclasses.replace(named_config("deepseek-v3"), **changes)
    with pytest.raises(ValueError, match=message):
        tensor_shardings(mesh, config, Precision(weights="float8"))
