import gzip
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint.names import copied_tensors, expected_tensors, is_quantized_linear
from dsv3_jax.config import ModelConfig, config_names, named_config
from dsv3_jax.model import abstract_params
from tests.checkpoint.synthetic import FIELDS

SMALL = (
    FIELDS,
    FIELDS | {"q_lora_rank": None, "tie_word_embeddings": True, "num_nextn_predict_layers": 2},
    FIELDS | {"first_k_dense_replace": 0},
    FIELDS | {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    FIELDS
    | {
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
)


@pytest.mark.parametrize("weights", ["float8", "bfloat16"])
@pytest.mark.parametrize("fields", SMALL)
def test_tensors_fill_every_place_of_the_model_exactly_once(fields, weights):
    config = ModelConfig.from_dict(fields)
    leaves, _ = jax.tree.flatten_with_path(abstract_params(config, weights))
    filled = {tuple(key.key for key in keys): np.zeros(leaf.shape, np.int8) for keys, leaf in leaves}
    for tensor in expected_tensors(config).values():
        places = [tensor, tensor.scale()] if tensor.linear and weights == "float8" else [tensor]
        for place in places:
            slot = filled[place.path][place.index]
            assert slot.shape == place.shape, place.name
            slot += 1
            filled[place.path][place.index] = slot
    assert all((counts == 1).all() for counts in filled.values())


@pytest.mark.parametrize("name", config_names())
def test_bundled_configs_have_the_shapes_of_the_model(name):
    config = named_config(name)
    leaves, _ = jax.tree.flatten_with_path(abstract_params(config, "bfloat16"))
    shapes = {tuple(key.key for key in keys): leaf.shape for keys, leaf in leaves}
    seen = set()
    for tensor in expected_tensors(config).values():
        assert shapes[tensor.path][len(tensor.index) :] == tensor.shape, tensor.name
        seen.add(tensor.path)
    assert seen == shapes.keys()


@pytest.mark.skipif("DSV3_REAL_FACTS" not in os.environ, reason="needs the released checkpoint's tensor map")
def test_names_are_those_of_the_release():
    folder = Path(os.environ["DSV3_REAL_FACTS"])
    config = ModelConfig.from_file(folder / "r1_config.json")
    with gzip.open(folder / "tensor_map.json.gz") as file:
        released = json.load(file)
    shapes = {name: list(shape) for name, shape in copied_tensors(config).items()}
    for tensor in expected_tensors(config).values():
        shapes[tensor.name] = list(tensor.shape)
        if tensor.linear:
            shapes[tensor.scale().name] = list(tensor.scale().shape)
    assert shapes == {name: entry["shape"] for name, entry in released.items()}
    quantized = {name for name, entry in released.items() if entry["dtype"] == "F8_E4M3"}
    assert quantized == {tensor.name for tensor in expected_tensors(config).values() if tensor.linear}
    assert quantized == {name for name in released if is_quantized_linear(name)}
