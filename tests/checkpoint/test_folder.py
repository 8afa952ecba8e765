import json
import shutil

import pytest

from dsv3_jax.checkpoint import open_checkpoint
from dsv3_jax.errors import InputError
from tests.checkpoint.synthetic import fields_of, random_tensors, write_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tensors():
    return random_tensors("BF16")


@pytest.fixture
def sharded(tmp_path, tensors):
    return write_folder(tmp_path / "sharded", tensors, fields_of("BF16"), shards=3)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_single_and_indexed_folders_hold_the_same_tensors(tmp_path, sharded, tensors):
    single = write_folder(tmp_path / "single", tensors, fields_of("BF16"))
    for checkpoint, files in ((open_checkpoint(single), 1), (open_checkpoint(str(sharded)), 3)):
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        assert shapes == {name: array.shape for name, array in tensors.items()}
        assert len(checkpoint.files()) == files
        assert checkpoint.config.num_nextn_predict_layers == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.write_text(""), "no such folder"),
        (lambda folder: folder.mkdir(), r"not a checkpoint folder: it has no config\.json"),
        (
            lambda folder: [
                folder.mkdir(),
                (folder / "config.json").write_text(json.dumps(fields_of("BF16"))),
            ],
            r"not a checkpoint folder: it has neither model\.safetensors\.index\.json nor",
        ),
        (
            lambda folder: [folder.mkdir(), (folder / "config.json").write_text('{"model_type": "llama"}')],
            r"config\.json: model_type is 'llama'",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "x")


def test_missing_shards_are_named(sharded):
    (sharded / "model-00002-of-000003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-000003\.safetensors: shard file is missing"):
        open_checkpoint(sharded)
    (sharded / "model-00001-of-000003.safetensors").unlink()
    with pytest.raises(InputError, match="2 of 3 are missing") as caught:
        open_checkpoint(sharded)
    assert caught.value.details == ("model-00001-of-000003.safetensors", "model-00002-of-000003.safetensors")


def test_truncated_shard_is_named(sharded):
    path = sharded / "model-00003-of-000003.safetensors"
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model-00003-of-000003\.safetensors: truncated"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("file", ["../config.json", "/etc/passwd", "", 3, None])
def test_index_must_name_files_of_the_folder(sharded, file):
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": file}))
    with pytest.raises(InputError, match=r"weight_map\['lm_head.weight'\] is"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_without_weight_map_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(InputError, match="weight_map is missing or empty"):
        open_checkpoint(sharded)


def test_tensor_that_the_index_puts_into_the_wrong_file_is_told(sharded):
    wrong = "model-00002-of-000003.safetensors"
    edit_index(sharded, lambda weight_map: weight_map.update({"model.embed_tokens.weight": wrong}))
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.misplaced == {"model.embed_tokens.weight": wrong}
    assert "model.embed_tokens.weight" not in checkpoint.tensors


def test_index_decides_between_two_copies(sharded):
    first, other = "model-00001-of-000003.safetensors", "model-00004-of-000003.safetensors"
    shutil.copy(sharded / first, sharded / other)
    edit_index(sharded, lambda weight_map: weight_map.update({"model.embed_tokens.weight": other}))
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.tensors["model.embed_tokens.weight"].path.name == other
    assert checkpoint.misplaced == {}
