import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import named_config
from dsv3_jax.model import abstract_params
from sharding import partition_spec, tree_shardings


@pytest.mark.parametrize(
    ("path", "num_dimensions", "spec"),
    [
        ("moe_layers.mlp.experts.gate_proj.weight", 4, (None, "expert", "tensor", None)),
        ("moe_layers.mlp.experts.down_proj.weight_scale_inv", 4, (None, "expert", None, "tensor")),
        ("moe_layers.mlp.shared_experts.down_proj.weight", 3, (None, None, "tensor")),
        ("dense_layers.mlp.gate_proj.weight", 3, (None, "tensor", None)),
        ("moe_layers.mlp.gate.weight", 3, (None, None, None)),
        ("moe_layers.self_attn.o_proj.weight", 3, (None, None, "tensor")),
        ("moe_layers.self_attn.kv_a_proj_with_mqa.weight", 3, (None, None, None)),
        ("lm_head.weight", 2, ("tensor", None)),
        ("norm.weight", 1, (None,)),
    ],
)
def test_rules(path: str, num_dimensions: int, spec: tuple) -> None:
    assert partition_spec(path, num_dimensions) == PartitionSpec(*spec)


def abstract_mesh(**axes: int) -> Mesh:
    """A mesh of one device repeated: enough to ask for specs, not to hold arrays."""
    devices = np.array(jax.devices()[:1] * int(np.prod(list(axes.values()))))
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def test_released_model_is_cut_at_blocks() -> None:
    params = abstract_params(named_config("deepseek-v3"), "float8")
    wide = tree_shardings(params, abstract_mesh(expert=4, tensor=16))
    gate = wide["moe_layers"]["mlp"]["experts"]["gate_proj"]
    assert gate["weight"].spec == PartitionSpec(None, "expert", "tensor", None)
    assert gate["weight_scale_inv"].spec == PartitionSpec(None, "expert", "tensor", None)
    # 2048 rows are 16 blocks: 32 pieces would cut blocks in two.
    narrow = tree_shardings(params, abstract_mesh(tensor=32))["moe_layers"]
    gate, q_b_proj = narrow["mlp"]["experts"]["gate_proj"], narrow["self_attn"]["q_b_proj"]
    assert gate["weight"].spec == PartitionSpec(None, None, None, None)
    assert q_b_proj["weight"].spec == PartitionSpec(None, "tensor", None)


@pytest.mark.slow
def test_sharded_model_generates_the_same_tokens(tiny_checkpoint: Path) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    code = "import sys; from tests.sharding.generate_sharded import check; check(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tiny_checkpoint)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
