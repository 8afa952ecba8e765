import gzip
import json
import math
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.cli.inspect import report_lines
from dsv3_jax.cli.main import main
from dsv3_jax.config import config_names
from tests.checkpoint.synthetic import fields_of, random_tensors, write_folder

ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
# Totals and activated parameters in billions as the releases' cards and reports give them.
PUBLISHED = {
    "deepseek-v2": (236, 21),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v3": (671, 37),
    "deepseek-r1": (671, 37),
    "deepseek-v3.1": (671, 37),
    "kimi-k2": (1026, 32),
}


def inspect(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and output of `dsv3 inspect`."""
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.mark.skipif("DSV3_REAL_FACTS" not in os.environ, reason="needs the released checkpoint's tensor map")
def test_real_index_has_all_its_tensors_as_expected(tmp_path, capsys):
    facts = Path(os.environ["DSV3_REAL_FACTS"])
    with gzip.open(facts / "tensor_map.json.gz") as file:
        tensors = json.load(file)
    write_sparse_folder(tmp_path, tensors)
    shutil.copy(facts / "r1_config.json", tmp_path / "config.json")
    code, output = inspect(capsys, tmp_path, "--json")
    found = json.loads(output)
    assert code == 0
    assert report_lines(found)[-1] == "91991 of 91991 tensors as expected"
    assert found["tensors"]["as_expected"] == found["tensors"]["expected"] == 91991
    assert round(found["bytes"]["F8_E4M3"] / 1e8) == 6806
    assert round(found["bytes"]["BF16"] / 1e7) == 784
    # What the files hold of weights is what the parameter table counts.
    elements = sum(
        math.prod(entry["shape"]) for name, entry in tensors.items() if not name.endswith("_scale_inv")
    )
    assert found["parameters"]["total"] + found["parameters"]["mtp_stored"] == elements


def write_sparse_folder(folder: Path, tensors: dict[str, dict]) -> None:
    """Files with real headers and, in place of data, holes."""
    shards: dict[str, dict] = defaultdict(dict)
    for name, entry in tensors.items():
        shards[entry["file"]][name] = entry
    for file, part in shards.items():
        header, position = {}, 0
        for name, entry in part.items():
            end = position + math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
            header[name] = {
                "dtype": entry["dtype"],
                "shape": entry["shape"],
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            output.truncate(8 + len(text) + position)
    weight_map = {name: entry["file"] for name, entry in tensors.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts_are_the_published_ones(name, capsys):
    total, activated = PUBLISHED[name]
    _, output = inspect(capsys, name, "--json")
    counts = json.loads(output)["parameters"]
    assert abs(counts["total"] / 1e9 - total) < 0.5
    assert abs(counts["activated"] / 1e9 - activated) < 0.5
    assert sum(counts["components"].values()) == counts["total"]


def test_mtp_module_of_v3_is_what_the_files_hold_beyond_671_billion(capsys):
    code, output = inspect(capsys, "deepseek-v3", "--json")
    counts = json.loads(output)["parameters"]
    assert code == 0
    assert counts["mtp"] == 11_610_068_224
    assert round((counts["total"] + counts["mtp_stored"]) / 1e9, 1) == 684.5
    components = counts["components"]
    assert components["embedding"] == components["lm_head"] == 129280 * 7168
    assert components["routed_experts"] == 58 * 256 * 3 * 2048 * 7168
    assert components["shared_experts"] == 58 * 3 * 2048 * 7168
    assert components["dense_mlp"] == 3 * 3 * 18432 * 7168
    assert components["router"] == 58 * (256 * 7168 + 256)
    assert components["norms"] == 7168 + 61 * (2 * 7168 + 1536 + 512)


@pytest.mark.parametrize("name", config_names())
def test_every_bundled_config_is_shown(name, capsys):
    code, output = inspect(capsys, name)
    assert code == 0
    assert output.startswith(f"{name}\n\nconfig\n")
    assert "activated per token" in output


def test_folder_is_described(tmp_path, capsys):
    tensors = random_tensors("F8_E4M3")
    folder = write_folder(tmp_path / "x", tensors, fields_of("F8_E4M3"), shards=2)
    code, output = inspect(capsys, folder, "--json")
    found = json.loads(output)
    assert code == 0
    assert found["tensors"] == {
        "expected": len(tensors),
        "as_expected": len(tensors),
        "missing": [],
        "unexpected": [],
        "wrong_shape": [],
        "wrong_dtype": [],
        "agree": True,
    }
    scales = sum(array.nbytes for name, array in tensors.items() if name.endswith("_scale_inv"))
    assert found["bytes"]["F8_E4M3"] + found["bytes"]["BF16"] + found["bytes"]["F32"] == sum(
        array.nbytes for array in tensors.values()
    )
    counts = found["parameters"]
    elements = sum(array.size for array in tensors.values()) - scales // 4
    assert counts["total"] + counts["mtp"] == elements
    assert found["config"]["quantization_config"]["quant_method"] == "fp8"


def test_disagreement_is_exit_code_1_and_at_most_20_names(tmp_path, capsys):
    tensors = random_tensors("BF16")
    tensors["model.extra.weight"] = np.zeros((2, 3), np.float32)
    removed = [name for name in tensors if ".mlp.experts." in name][:24]
    kept = {name: array for name, array in tensors.items() if name not in removed}
    folder = write_folder(tmp_path / "x", kept, fields_of("BF16"))
    code, output = inspect(capsys, folder)
    assert code == 1
    total = len(tensors) - 1
    lines = output[output.index(f"\n{total - 24} of {total} tensors as expected") :].split("\n")[2:-1]
    assert lines[0] == f"  missing: {min(removed)}: expected BF16 or F16 or F32 [160, 136]"
    assert len(lines) == 21
    assert lines[-1] == "  and 5 more"
    code, output = inspect(capsys, folder, "--json")
    found = json.loads(output)["tensors"]
    assert code == 1
    assert len(found["missing"]) == 24
    assert found["unexpected"] == [
        "model.extra.weight: F32 [2, 3] in model.safetensors; expected no such tensor"
    ]
    assert not found["agree"]


def test_absent_mtp_module_is_told(tmp_path, capsys):
    tensors = random_tensors("BF16")
    main_model = {name: array for name, array in tensors.items() if not name.startswith("model.layers.3.")}
    code, output = inspect(capsys, write_folder(tmp_path / "x", main_model, fields_of("BF16")))
    assert code == 0
    assert "announced by config.json, but not in the files" in output


def test_what_cannot_be_inspected_is_named(tmp_path, capsys):
    assert main(["inspect", "no-such-model"]) == 2
    assert "no-such-model: no such config; expected a folder or one of" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert f"dsv3: {tmp_path}/none: no such folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "not a checkpoint folder" in capsys.readouterr().err
    folder = write_folder(tmp_path / "x", random_tensors("BF16"), fields_of("BF16"), shards=2)
    (folder / "model-00001-of-000002.safetensors").unlink()
    assert main(["inspect", str(folder)]) == 2
    assert "model-00001-of-000002.safetensors: shard file is missing" in capsys.readouterr().err
