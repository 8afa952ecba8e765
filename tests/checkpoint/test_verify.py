import json

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import open_checkpoint
from dsv3_jax.checkpoint.verify import compare, verify
from dsv3_jax.errors import InputError
from tests.checkpoint.synthetic import FIELDS, fields_of, random_tensors, write_folder

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


def comparison(tmp_path, tensors, fields, shards=1):
    return compare(open_checkpoint(write_folder(tmp_path / "x", tensors, fields, shards=shards)))


@pytest.mark.parametrize("stored", ["F8_E4M3", "BF16", "F16", "F32"])
@pytest.mark.parametrize("shards", [1, 2])
def test_every_format_is_as_expected(tmp_path, stored, shards):
    tensors = random_tensors(stored)
    result = comparison(tmp_path, tensors, fields_of(stored), shards)
    assert result.agrees()
    assert result.expected == result.as_expected == len(tensors)
    assert result.config.num_nextn_predict_layers == 1


def test_all_that_is_wrong_is_listed_together(tmp_path):
    tensors = random_tensors("F8_E4M3")
    del tensors["model.norm.weight"]
    del tensors[GATE + "_scale_inv"]
    tensors["model.layers.0.mlp.gate.weight"] = np.zeros((4, 160), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((201, 160), ml_dtypes.bfloat16)
    tensors["model.layers.2.self_attn.o_proj.weight"] = np.zeros((160, 96), ml_dtypes.bfloat16)
    tensors["lm_head.weight"] = np.zeros((200, 160), np.int8)
    folder = write_folder(tmp_path / "x", tensors, fields_of("F8_E4M3"))
    with pytest.raises(
        InputError, match="2 missing, 1 unexpected, 1 of wrong shape, 2 of wrong dtype"
    ) as caught:
        verify(open_checkpoint(folder))
    assert caught.value.details == (
        f"missing: {GATE}_scale_inv: expected F32 [2, 2]",
        "missing: model.norm.weight: expected BF16 or F16 or F32 [160]",
        "unexpected: model.layers.0.mlp.gate.weight: F32 [4, 160] in model.safetensors; expected no such tensor",
        "wrong shape: model.embed_tokens.weight: [201, 160] in model.safetensors; expected [200, 160]",
        "wrong dtype: lm_head.weight: I8 in model.safetensors; expected BF16 or F16 or F32",
        "wrong dtype: model.layers.2.self_attn.o_proj.weight: BF16 in model.safetensors; expected F8_E4M3",
    )
    expected = len(random_tensors("F8_E4M3"))
    assert f"{expected - 5} of {expected} as expected" in caught.value.message


def test_fp8_tensors_need_a_quantization_config(tmp_path):
    result = comparison(tmp_path, random_tensors("F8_E4M3"), FIELDS)
    assert f"{GATE}: F8_E4M3 in model.safetensors; expected BF16 or F16 or F32" in result.wrong_dtype
    assert any(line.startswith(f"{GATE}_scale_inv: F32 [2, 2]") for line in result.unexpected)
    assert not result.missing


def test_mtp_modules_may_be_absent_as_a_whole_but_not_in_part(tmp_path):
    tensors = random_tensors("BF16")
    main = {name: array for name, array in tensors.items() if not name.startswith("model.layers.3.")}
    result = comparison(tmp_path, main, fields_of("BF16"))
    assert result.agrees()
    assert result.config.num_nextn_predict_layers == 0
    part = main | {"model.layers.3.enorm.weight": tensors["model.layers.3.enorm.weight"]}
    (tmp_path / "part").mkdir()
    result = comparison(tmp_path / "part", part, fields_of("BF16"))
    assert len(result.missing) == len(tensors) - len(part)
    assert any(line.startswith("model.layers.3.eh_proj.weight: expected") for line in result.missing)


def test_mtp_modules_that_the_config_does_not_announce_are_unexpected(tmp_path):
    result = comparison(tmp_path, random_tensors("BF16"), fields_of("BF16") | {"num_nextn_predict_layers": 0})
    assert any(line.startswith("model.layers.3.eh_proj.weight: BF16") for line in result.unexpected)


def test_copies_and_inverse_frequencies_are_no_surprise(tmp_path):
    tensors = random_tensors("BF16")
    plain = len(tensors)
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    result = comparison(tmp_path, tensors, fields_of("BF16"))
    assert result.agrees()
    assert result.expected == plain + 2


def test_copy_of_wrong_shape_is_told(tmp_path):
    tensors = random_tensors("BF16")
    tensors["model.layers.3.embed_tokens.weight"] = np.zeros((3, 160), np.float32)
    result = comparison(tmp_path, tensors, fields_of("BF16"))
    assert result.wrong_shape == (
        "model.layers.3.embed_tokens.weight: [3, 160] in model.safetensors; expected [200, 160]",
    )


def test_tied_head_may_be_stored_or_not(tmp_path):
    tensors = random_tensors("BF16")
    fields = fields_of("BF16") | {"tie_word_embeddings": True}
    assert comparison(tmp_path, tensors, fields).agrees()
    del tensors["lm_head.weight"]
    (tmp_path / "tied").mkdir()
    assert comparison(tmp_path / "tied", tensors, fields).agrees()


def test_tensor_that_is_not_in_the_file_of_the_index_is_missing(tmp_path):
    tensors = random_tensors("BF16")
    folder = write_folder(tmp_path / "x", tensors, fields_of("BF16"), shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-000002.safetensors"
    index["weight_map"]["nonsense"] = "model-00002-of-000002.safetensors"
    path.write_text(json.dumps(index))
    result = compare(open_checkpoint(folder))
    assert result.missing == (
        "model.embed_tokens.weight: expected BF16 or F16 or F32 [200, 160] in model-00002-of-000002.safetensors",
    )
    assert result.unexpected == (
        "nonsense: the index names it in model-00002-of-000002.safetensors, which does not hold it; "
        "expected no such tensor",
    )
