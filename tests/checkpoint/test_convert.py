import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv3_jax.checkpoint import fp8, open_checkpoint
from dsv3_jax.checkpoint.convert import convert_checkpoint
from dsv3_jax.checkpoint.names import is_quantized_linear
from dsv3_jax.checkpoint.verify import compare
from dsv3_jax.errors import InputError
from tests.checkpoint.synthetic import (
    QUANTIZATION,
    dequantized,
    fields_of,
    random_tensors,
    read_folder,
    same_bits,
    write_folder,
)

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def convert(tmp_path, stored, to, *, shards=1, tensors=None, **options):
    """Converts a folder of random tensors; returns what was in it and what came out."""
    tensors = tensors or random_tensors(stored)
    source = write_folder(tmp_path / "source", tensors, fields_of(stored), shards=shards)
    convert_checkpoint(source, tmp_path / "target", to, **options)
    return tensors, read_folder(tmp_path / "target")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["F8_E4M3", "F16", "F32"])
def test_to_bfloat16(tmp_path, stored, shards):
    before, after = convert(tmp_path, stored, "bfloat16", shards=shards)
    assert after.keys() == {name for name in before if not name.endswith("_scale_inv")}
    for name, values in after.items():
        dtype = np.float32 if name.endswith("e_score_correction_bias") else ml_dtypes.bfloat16
        assert same_bits(values, dequantized(before, name).astype(dtype)), name
    fields = json.loads((tmp_path / "target" / "config.json").read_text())
    assert fields == fields_of("BF16")
    assert compare(open_checkpoint(tmp_path / "target")).agrees()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_to_float8(tmp_path, stored, ue8m0, shards):
    before, after = convert(tmp_path, stored, "float8", shards=shards, ue8m0=ue8m0)
    check_quantized(before, after, ue8m0)
    fields = json.loads((tmp_path / "target" / "config.json").read_text())
    quantization = QUANTIZATION | ({"scale_fmt": "ue8m0"} if ue8m0 else {})
    assert fields == fields_of("BF16") | {"quantization_config": quantization}
    assert compare(open_checkpoint(tmp_path / "target")).agrees()


def test_float8_gets_power_of_two_scales(tmp_path):
    before, after = convert(tmp_path, "F8_E4M3", "float8", ue8m0=True, shards=3)
    check_quantized(before, after, True)
    assert open_checkpoint(tmp_path / "target").config.quantization_config.scale_fmt == "ue8m0"


def check_quantized(before, after, ue8m0):
    weights = {name for name in before if not name.endswith("_scale_inv")}
    linears = {name for name in weights if is_quantized_linear(name)}
    assert after.keys() == weights | {name + "_scale_inv" for name in linears}
    for name in weights:
        values = dequantized(before, name)
        if name in linears:
            quantized, scale_inv = fp8.quantize(values, ue8m0=ue8m0)
            assert same_bits(after[name], quantized), name
            assert same_bits(after[name + "_scale_inv"], scale_inv), name
            assert not ue8m0 or (np.frexp(scale_inv)[0] == 0.5).all()
        else:
            dtype = np.float32 if name.endswith("e_score_correction_bias") else ml_dtypes.bfloat16
            assert same_bits(after[name], values.astype(dtype)), name


def test_there_and_back_keeps_fp8_with_power_of_two_scales(tmp_path):
    source = write_folder(tmp_path / "f32", random_tensors("F32"), fields_of("F32"))
    convert_checkpoint(source, tmp_path / "f8", "float8", ue8m0=True)
    convert_checkpoint(tmp_path / "f8", tmp_path / "bf16", "bfloat16")
    convert_checkpoint(tmp_path / "bf16", tmp_path / "again", "float8", ue8m0=True)
    again, first = read_folder(tmp_path / "again"), read_folder(tmp_path / "f8")
    # The scale of a block whose largest value was rounded down may be half as large; the products are the same.
    for name in (name for name in first if not name.endswith("_scale_inv")):
        np.testing.assert_array_equal(dequantized(again, name), dequantized(first, name))


def test_bias_in_bfloat16_becomes_float32_and_copies_stay(tmp_path):
    tensors = random_tensors("BF16")
    tensors[BIAS] = tensors[BIAS].astype(ml_dtypes.bfloat16)
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    before, after = convert(tmp_path, "BF16", "float8", tensors=tensors)
    assert same_bits(after[BIAS], before[BIAS].astype(np.float32))
    assert same_bits(after["model.layers.3.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in after


def test_small_files_are_copied_and_old_weights_are_not(tmp_path):
    source = write_folder(tmp_path / "source", random_tensors("F32"), fields_of("F32"))
    copied = [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
    ]
    left = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.gguf",
        ".gitattributes",
        "old.safetensors",
    ]
    for name in copied + left:
        (source / name).write_text(name)
    (source / "linked.json").symlink_to(source / "tokenizer.json")
    (source / "figures").mkdir()
    convert_checkpoint(source, tmp_path / "target", "bfloat16")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {*copied, "linked.json", "config.json", "model.safetensors"}
    assert (tmp_path / "target" / "LICENSE").read_text() == "LICENSE"
    assert not (tmp_path / "target" / "linked.json").is_symlink()


def test_dtype_is_put_right_in_either_spelling(tmp_path):
    fields = fields_of("F32")
    fields["dtype"] = fields.pop("torch_dtype")
    source = write_folder(tmp_path / "source", random_tensors("F32"), fields)
    convert_checkpoint(source, tmp_path / "target", "bfloat16")
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert written == fields | {"dtype": "bfloat16"}


def test_index_tells_the_size(tmp_path):
    _, after = convert(tmp_path, "BF16", "float8", shards=3)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in after.values())


def test_shard_of_scales_alone_leaves_no_file(tmp_path):
    tensors = random_tensors("F8_E4M3")
    source = write_folder(tmp_path / "source", tensors, fields_of("F8_E4M3"))
    (source / "model.safetensors").unlink()
    weight_map = {name: "scales" if name.endswith("_scale_inv") else "weights" for name in tensors}
    for file in ("scales", "weights"):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, source / f"{file}.safetensors")
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in weight_map.items()}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_checkpoint(source, tmp_path / "target", "bfloat16")
    assert [path.name for path in (tmp_path / "target").glob("*.safetensors")] == ["weights.safetensors"]
    assert compare(open_checkpoint(tmp_path / "target")).agrees()


@pytest.mark.parametrize(
    "stored, to, ue8m0, message",
    [
        ("BF16", "bfloat16", False, "is BF16 already"),
        ("F8_E4M3", "float8", False, "is FP8 already"),
        ("BF16", "bfloat16", True, "--ue8m0"),
    ],
)
def test_needless_conversions_are_refused(tmp_path, stored, to, ue8m0, message):
    with pytest.raises(InputError, match=message):
        convert(tmp_path, stored, to, ue8m0=ue8m0)
    assert not (tmp_path / "target").exists()


def test_ue8m0_again_is_refused(tmp_path):
    convert(tmp_path, "BF16", "float8", ue8m0=True)
    with pytest.raises(InputError, match="is FP8 with ue8m0 scales already"):
        convert_checkpoint(tmp_path / "target", tmp_path / "again", "float8", ue8m0=True)


@pytest.mark.parametrize("exists", [False, True])
def test_error_before_the_first_shard_leaves_nothing(tmp_path, exists):
    tensors = random_tensors("F32")
    tensors[GATE][3, 4] = np.nan
    if exists:
        (tmp_path / "target").mkdir()
    with pytest.raises(InputError, match=rf"tensor {GATE} holds NaN or infinity"):
        convert(tmp_path, "F32", "float8", tensors=tensors)
    assert (tmp_path / "target").exists() == exists
    assert not exists or list((tmp_path / "target").iterdir()) == []


def test_transformers_loads_the_converted_folder(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, after = convert(tmp_path, "F8_E4M3", "bfloat16", shards=3)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert model.dtype == torch.bfloat16
    experts = model.model.layers[1].mlp.experts.gate_up_proj[2, :136]
    expected = torch.from_numpy(after[GATE].astype(np.float32)).to(torch.bfloat16)
    assert torch.equal(experts.detach(), expected)
    tokens = torch.arange(8)[None]
    assert torch.isfinite(model(tokens).logits).all()
