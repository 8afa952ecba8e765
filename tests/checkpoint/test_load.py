import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import fp8, load, load_params, open_checkpoint, stored_format
from dsv3_jax.checkpoint.names import expected_tensors
from dsv3_jax.errors import InputError
from dsv3_jax.model import abstract_params
from tests.checkpoint.synthetic import dequantized, fields_of, random_tensors, same_bits, write_folder

STORED = {"F8_E4M3": "float8", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder a format, of one file or of three, where weights and their scales lie in different ones."""
    parent = tmp_path_factory.mktemp("folders")
    shards = {"F8_E4M3": 3, "BF16": 1, "F16": 3, "F32": 1}
    return {
        stored: write_folder(
            parent / stored, random_tensors(stored), fields_of(stored), shards=shards[stored]
        )
        for stored in STORED
    }


def entry(params, tensor):
    """The part of params that a tensor of the checkpoint fills."""
    node = params
    for key in tensor.path:
        node = node[key]
    return np.asarray(node)[tensor.index]


@pytest.mark.parametrize("weights", ["stored", "float32", "bfloat16", "float8"])
@pytest.mark.parametrize("stored", STORED)
def test_every_tensor_of_every_format_arrives_in_its_place(folders, stored, weights):
    tensors = random_tensors(stored)
    checkpoint = open_checkpoint(folders[stored])
    assert stored_format(checkpoint) == STORED[stored]
    params = load_params(checkpoint, weights, mtp=True)
    if weights != "stored":
        target = abstract_params(checkpoint.config, weights)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), target
        )
    kept = weights == "stored" or weights == STORED[stored]
    for tensor in expected_tensors(checkpoint.config).values():
        values = entry(params, tensor)
        if kept:
            assert same_bits(values, tensors[tensor.name]), tensor.name
        elif tensor.linear and weights == "float8":
            quantized, scale_inv = fp8.quantize(dequantized(tensors, tensor.name))
            assert same_bits(values, quantized), tensor.name
            assert same_bits(entry(params, tensor.scale()), scale_inv), tensor.name
        else:
            assert same_bits(values, dequantized(tensors, tensor.name).astype(values.dtype)), tensor.name
        if kept and tensor.linear and stored == "F8_E4M3":
            assert same_bits(entry(params, tensor.scale()), tensors[tensor.name + "_scale_inv"])


def test_mtp_modules_are_read_only_when_asked_for(folders):
    checkpoint = open_checkpoint(folders["BF16"])
    assert "mtp_layers" not in load_params(checkpoint, "stored")
    assert load_params(checkpoint, "stored", mtp=True)["mtp_layers"]["eh_proj"]["weight"].shape == (
        1,
        160,
        320,
    )


def test_announced_mtp_modules_may_be_absent_until_they_are_needed(tmp_path, caplog):
    tensors = random_tensors("BF16")
    main = {name: array for name, array in tensors.items() if not name.startswith("model.layers.3.")}
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", main, fields_of("BF16")))
    with caplog.at_level(logging.WARNING):
        assert "mtp_layers" not in load_params(checkpoint, "stored")
    assert "without the MTP modules" in caplog.text
    with pytest.raises(InputError, match=r"no MTP module; expected model\.layers\.3"):
        load_params(checkpoint, "stored", mtp=True)


def test_mixed_dtypes_are_kept_by_leaf_and_widened_in_a_stack(tmp_path):
    tensors = random_tensors("BF16")
    gates = [f"model.layers.1.mlp.experts.{expert}.gate_proj.weight" for expert in range(4)]
    tensors[gates[1]] = np.full((136, 160), 1 + 2**-20, np.float32)
    tensors["model.norm.weight"] = np.full(160, 0.1, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(ml_dtypes.bfloat16)
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", tensors, fields_of("BF16")))
    params = load_params(checkpoint, "stored")
    experts = params["moe_layers"]["mlp"]["experts"]
    assert experts["gate_proj"]["weight"].dtype == jnp.float32
    for expert, name in enumerate(gates):
        values = experts["gate_proj"]["weight"][0, expert]
        np.testing.assert_array_equal(values, tensors[name].astype(np.float32))
    assert experts["up_proj"]["weight"].dtype == jnp.bfloat16
    assert same_bits(params["norm"]["weight"], tensors["model.norm.weight"])
    assert params["lm_head"]["weight"].dtype == jnp.float16
    biases = params["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"]
    assert same_bits(biases[0], tensors[bias].astype(np.float32))


def test_arrays_are_the_memory_that_was_read_into(folders, monkeypatch):
    regions_of = {}
    leaf_array = load.leaf_array

    def spy(leaf, sharding, regions):
        array = leaf_array(leaf, sharding, regions)
        regions_of[id(array)] = (array, [region.memory.ctypes.data for region in regions])
        return array

    monkeypatch.setattr(load, "leaf_array", spy)
    params = load_params(open_checkpoint(folders["F8_E4M3"]), "stored")
    for leaf in jax.tree.leaves(params):
        array, addresses = regions_of[id(leaf)]
        assert [array.unsafe_buffer_pointer()] == addresses


@pytest.mark.parametrize(
    "stored, weights", [("F8_E4M3", "stored"), ("F8_E4M3", "bfloat16"), ("F32", "float8")]
)
def test_one_linear_at_a_time_gives_the_same(folders, monkeypatch, stored, weights):
    checkpoint = open_checkpoint(folders[stored])
    together = load_params(checkpoint, weights, mtp=True)
    monkeypatch.setattr(load, "_on_cpu", lambda sharding: False)  # what an accelerator makes it do
    one_by_one = load_params(checkpoint, weights, mtp=True)
    assert jax.tree.all(jax.tree.map(same_bits, one_by_one, together))


def read_calls_bytes() -> int:
    """Bytes that this process has asked the kernel to read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux' count of the bytes read")
@pytest.mark.parametrize("weights", ["stored", "float32", "float8"])
@pytest.mark.parametrize("stored", ["F8_E4M3", "F32"])
def test_each_byte_is_read_once(folders, stored, weights):
    checkpoint = open_checkpoint(folders[stored])
    load_params(checkpoint, weights, mtp=True)
    reported = []
    before = read_calls_bytes()
    load_params(checkpoint, weights, mtp=True, progress=reported.append)
    read = read_calls_bytes() - before
    assert read == pytest.approx(sum(info.nbytes for info in checkpoint.tensors.values()), abs=2000)
    scales = sum(info.nbytes for info in checkpoint.tensors.values() if info.name.endswith("_scale_inv"))
    assert sum(reported) == pytest.approx(read, abs=2000 + scales)


@pytest.mark.parametrize("weights", ["stored", "bfloat16"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_nan_is_refused_by_tensor(tmp_path, weights, code):
    tensors = random_tensors("F8_E4M3")
    tensors[GATE].view(np.uint8)[135, 159] = code
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", tensors, fields_of("F8_E4M3"), shards=2))
    with pytest.raises(InputError, match=rf"safetensors: corrupt: tensor {GATE} holds NaN"):
        load_params(checkpoint, weights)


def test_scale_that_is_not_finite_is_refused_by_tensor(tmp_path):
    tensors = random_tensors("F8_E4M3")
    tensors[GATE + "_scale_inv"][1, 1] = np.inf
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", tensors, fields_of("F8_E4M3")))
    for weights in ("stored", "float32"):
        with pytest.raises(InputError, match=rf"corrupt: tensor {GATE}_scale_inv holds NaN"):
            load_params(checkpoint, weights)


def test_value_that_fp8_cannot_hold_is_refused_by_tensor(tmp_path):
    tensors = random_tensors("F32")
    tensors[GATE][0, 0] = np.inf
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", tensors, fields_of("F32")))
    with pytest.raises(InputError, match=rf"tensor {GATE} holds NaN or infinity"):
        load_params(checkpoint, "float8")


def test_shard_cut_after_it_was_opened_is_named(tmp_path):
    folder = write_folder(tmp_path / "x", random_tensors("BF16"), fields_of("BF16"), shards=2)
    checkpoint = open_checkpoint(folder)
    with (folder / "model-00002-of-000002.safetensors").open("rb+") as file:
        file.truncate(10_000)
    with pytest.raises(
        InputError, match=r"model-00002-of-000002\.safetensors: truncated: ends at byte 10000"
    ):
        load_params(checkpoint, "stored")


def test_shard_deleted_after_it_was_opened_is_named(tmp_path):
    folder = write_folder(tmp_path / "x", random_tensors("BF16"), fields_of("BF16"), shards=2)
    checkpoint = open_checkpoint(folder)
    (folder / "model-00002-of-000002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-000002\.safetensors: cannot be read"):
        load_params(checkpoint, "stored")


def test_nothing_is_read_when_tensors_do_not_match(tmp_path):
    tensors = random_tensors("BF16")
    del tensors[GATE]
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", tensors, fields_of("BF16")))
    reported = []
    with pytest.raises(InputError, match="1 missing") as caught:
        load_params(checkpoint, "stored", progress=reported.append)
    assert caught.value.details == (f"missing: {GATE}: expected BF16 or F16 or F32 [136, 160]",)
    assert reported == []


def test_shardings_must_be_a_tree_like_the_parameters(folders):
    with pytest.raises(ValueError, match="shardings has no leaf dense_layers"):
        load_params(open_checkpoint(folders["BF16"]), "stored", shardings={"embed_tokens": {}})


def test_sharded_arrays_on_four_devices(tmp_path):
    cases = []
    for stored, weights in (
        ("F8_E4M3", "stored"),
        ("F8_E4M3", "float32"),
        ("BF16", "stored"),
        ("F32", "float8"),
    ):
        folder = tmp_path / stored
        if not folder.exists():
            write_folder(folder, random_tensors(stored), fields_of(stored), shards=3)
        cases += [str(folder), weights]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.checkpoint.sharded_load", *cases]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
