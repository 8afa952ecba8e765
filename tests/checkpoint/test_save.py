import json

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import load_params, open_checkpoint, save, save_checkpoint
from dsv3_jax.checkpoint.hf_config import config_fields
from dsv3_jax.config import ModelConfig, config_names, named_config
from dsv3_jax.errors import InputError
from tests.checkpoint.synthetic import fields_of, random_tensors, read_folder, same_bits, write_folder


@pytest.mark.parametrize("stored", ["F8_E4M3", "BF16", "F16", "F32"])
@pytest.mark.parametrize("sharded", [False, True])
def test_saved_tensors_are_those_that_were_loaded(tmp_path, monkeypatch, stored, sharded):
    if sharded:
        monkeypatch.setattr(save, "MAX_SHARD_BYTES", 300_000)
    tensors = random_tensors(stored)
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", tensors, fields_of(stored)))
    save_checkpoint(tmp_path / "y", checkpoint.config, load_params(checkpoint, "stored", mtp=True))
    saved = read_folder(tmp_path / "y")
    assert saved.keys() == tensors.keys()
    assert all(same_bits(saved[name], tensors[name]) for name in tensors)
    assert open_checkpoint(tmp_path / "y").config == checkpoint.config
    files = sorted(path.name for path in (tmp_path / "y").glob("*.safetensors"))
    if sharded:
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files):06}.safetensors"
    else:
        assert files == ["model.safetensors"]


def test_config_follows_the_parameters(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", random_tensors("F32"), fields_of("F32")))
    save_checkpoint(tmp_path / "y", checkpoint.config, load_params(checkpoint, "float8"))
    fields = json.loads((tmp_path / "y" / "config.json").read_text())
    assert fields["quantization_config"] == fields_of("F8_E4M3")["quantization_config"]
    assert fields["torch_dtype"] == "bfloat16"
    assert fields["num_nextn_predict_layers"] == 0
    again = open_checkpoint(tmp_path / "y")
    save_checkpoint(tmp_path / "z", again.config, load_params(again, "float32"))
    assert "quantization_config" not in json.loads((tmp_path / "z" / "config.json").read_text())


def test_files_are_copied_and_an_old_index_goes(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", random_tensors("BF16"), fields_of("BF16")))
    params = load_params(checkpoint, "stored")
    (tmp_path / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(save, "MAX_SHARD_BYTES", 300_000)
        save_checkpoint(tmp_path / "y", checkpoint.config, params)
    save_checkpoint(tmp_path / "y", checkpoint.config, params, tokenizer_files=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "y" / "tokenizer.json").read_text() == "{}"
    assert open_checkpoint(tmp_path / "y").files() == [tmp_path / "y" / "model.safetensors"]


def test_refusals_name_folder_and_leaf(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path / "x", random_tensors("BF16"), fields_of("BF16")))
    params = load_params(checkpoint, "stored")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/y: cannot be written"):
        save_checkpoint(tmp_path / "file" / "y", checkpoint.config, params)
    with pytest.raises(InputError, match=r"none\.json: cannot be"):
        save_checkpoint(tmp_path / "y", checkpoint.config, params, tokenizer_files=[tmp_path / "none.json"])
    del params["norm"]
    with pytest.raises(InputError, match=r"params has no norm\.weight"):
        save_checkpoint(tmp_path / "z", checkpoint.config, params)
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("name", config_names())
def test_config_survives_being_written(name):
    config = named_config(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config_fields(config)))) == config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV2"])
def test_transformers_folders_are_read_and_ours_are_read_by_transformers(tmp_path, family, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {
        name: value for name, value in fields_of("F32").items() if name not in ("model_type", "torch_dtype")
    }
    if family == "DeepseekV2":
        fields |= {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
        fields |= {"norm_topk_prob": False, "q_lora_rank": None}
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    params = load_params(checkpoint, "stored")
    assert params["embed_tokens"]["weight"].dtype.name == dtype
    save_checkpoint(tmp_path / "ours", checkpoint.config, params)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_jax_and_numpy_parameters_are_saved_alike(tmp_path):
    checkpoint = open_checkpoint(
        write_folder(tmp_path / "x", random_tensors("F8_E4M3"), fields_of("F8_E4M3"))
    )
    params = load_params(checkpoint, "stored")
    save_checkpoint(tmp_path / "jax", checkpoint.config, params)
    save_checkpoint(tmp_path / "numpy", checkpoint.config, jax.tree.map(np.asarray, params))
    jax_bytes, numpy_bytes = (
        (tmp_path / kind / "model.safetensors").read_bytes() for kind in ("jax", "numpy")
    )
    assert jax_bytes == numpy_bytes
