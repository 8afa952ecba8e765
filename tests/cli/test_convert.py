import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.cli.main import main
from tests.checkpoint.synthetic import fields_of, random_tensors, write_folder

STATE = ".dsv3_convert.json"
# Converts, and kills itself with SIGKILL once it has read so many bytes of the source.
CONVERT_AND_DIE = """
import os, signal, sys
from dsv3_jax.checkpoint.convert import convert_checkpoint
left = int(sys.argv[3])
def progress(count):
    global left
    left -= count
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
convert_checkpoint(sys.argv[1], sys.argv[2], "float8", progress=progress)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_folder(
        tmp_path_factory.mktemp("convert") / "source", random_tensors("BF16"), fields_of("BF16"), shards=4
    )
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert_and_die(source: Path, target: Path, after_bytes: int) -> None:
    command = [sys.executable, "-c", CONVERT_AND_DIE, str(source), str(target), str(after_bytes)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2])
    assert result.returncode == -signal.SIGKILL


def error_of(capsys, *arguments: object) -> str:
    """The one line that a command line is refused with."""
    assert main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("killed_in_shard", [0, 2, 3])
def test_killed_conversion_goes_on_and_ends_the_same_to_the_byte(source, tmp_path, killed_in_shard):
    assert main(["convert", str(source), str(tmp_path / "whole"), "--to", "float8"]) == 0
    shards = sorted(source.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in shards]
    convert_and_die(source, tmp_path / "target", sum(sizes[:killed_in_shard]) + sizes[killed_in_shard] // 2)
    finished = [path.name for path in sorted((tmp_path / "target").glob("*.safetensors"))]
    assert finished == [path.name for path in shards[:killed_in_shard]]
    left = {path.name for path in (tmp_path / "target").iterdir()} - set(finished)
    assert left == {STATE, shards[killed_in_shard].name + ".partial"}
    before = {name: (tmp_path / "target" / name).stat().st_mtime_ns for name in finished}
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "float8"]) == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")
    assert before == {name: (tmp_path / "target" / name).stat().st_mtime_ns for name in finished}


def test_kill_before_the_end_of_the_bookkeeping_is_made_good_too(source, tmp_path):
    assert main(["convert", str(source), str(tmp_path / "whole"), "--to", "float8"]) == 0
    convert_and_die(
        source, tmp_path / "target", sum(path.stat().st_size for path in source.glob("*.safetensors")) // 2
    )
    state = (tmp_path / "target" / STATE).read_bytes()
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "float8"]) == 0
    (tmp_path / "target" / STATE).write_bytes(state)
    (tmp_path / "target" / "model.safetensors.index.json").unlink()
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "float8"]) == 0
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_interrupted_folder_takes_the_same_conversion_only(source, tmp_path, capsys):
    convert_and_die(source, tmp_path / "target", 200_000)
    message = f"{tmp_path}/target: holds part of another conversion"
    assert message in error_of(capsys, source, tmp_path / "target", "--to", "float8", "--ue8m0")
    os.utime(source / "model-00001-of-000004.safetensors", (0, 0))
    assert message in error_of(capsys, source, tmp_path / "target", "--to", "float8")


def test_folder_that_is_not_empty_is_left_alone(source, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.txt").write_text("mine")
    message = error_of(capsys, source, tmp_path / "target", "--to", "float8")
    assert message.startswith(f"dsv3: {tmp_path}/target: is not empty; expected")
    assert message.count("\n") == 1
    assert contents(tmp_path / "target") == {"mine.txt": b"mine"}
    assert "is not empty" in error_of(capsys, source, source, "--to", "float8")


def test_target_below_a_file_cannot_be_made(source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = error_of(capsys, source, tmp_path / "file" / "target", "--to", "float8")
    assert message == f"dsv3: {tmp_path}/file/target: cannot be made or read (Not a directory)\n"
    message = error_of(capsys, source, tmp_path / "none" / "target", "--to", "float8")
    assert message == f"dsv3: {tmp_path}/none/target: cannot be made or read (No such file or directory)\n"


def test_source_must_be_a_checkpoint(tmp_path, capsys):
    assert "no such folder" in error_of(capsys, tmp_path / "none", tmp_path / "target", "--to", "float8")
    assert "not a checkpoint folder" in error_of(capsys, tmp_path, tmp_path / "target", "--to", "float8")
    tensors = random_tensors("BF16")
    del tensors["model.norm.weight"]
    broken = write_folder(tmp_path / "broken", tensors, fields_of("BF16"))
    message = error_of(capsys, broken, tmp_path / "target", "--to", "float8")
    assert "missing: model.norm.weight: expected" in message
    assert not (tmp_path / "target").exists()


def test_format_must_be_another_and_known(source, tmp_path, capsys):
    assert "is BF16 already" in error_of(capsys, source, tmp_path / "target", "--to", "bfloat16")
    assert "--to" in error_of(capsys, source, tmp_path / "target")
    assert "invalid choice: 'int4'" in error_of(capsys, source, tmp_path / "target", "--to", "int4")
    assert not (tmp_path / "target").exists()


def test_conversion_does_not_import_jax(source, tmp_path):
    code = (
        "import sys; from dsv3_jax.cli.main import main; "
        "code = main(['convert', sys.argv[1], sys.argv[2], '--to', 'float8']); sys.exit(code or 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "target")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert (
        json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]["fmt"] == "e4m3"
    )
