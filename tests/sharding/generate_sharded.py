"""Run by test_rules.py in a process with four simulated devices."""

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.checkpoint import load_params, open_checkpoint
from dsv3_jax.generate.loop import Engine
from dsv3_jax.generate.sampling import SamplingParams
from dsv3_jax.model import abstract_params
from dsv3_jax.precision import Precision
from sharding import tree_shardings


def check(folder: str) -> None:
    """Loads a checkpoint over expert x tensor, and onto one device: the same greedy tokens of both."""
    checkpoint = open_checkpoint(folder)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "tensor"))
    shardings = tree_shardings(abstract_params(checkpoint.config, "float32"), mesh)
    tokens = []
    for tree in (shardings, None):
        params = load_params(checkpoint, "float32", shardings=tree)
        gate = params["moe_layers"]["mlp"]["experts"]["gate_proj"]["weight"]
        assert len(gate.sharding.device_set) == (4 if tree else 1)
        engine = Engine(params, checkpoint.config, Precision(weights="float32", dtype="float32"))
        sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
        results = engine.generate([[5, 9, 40, 7], [11]], sampling)
        tokens.append([result.token_ids for result in results])
    assert tokens[0] == tokens[1], tokens
