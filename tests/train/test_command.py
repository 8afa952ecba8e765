"""`dsv3 train`, as it is called."""

import json
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import load_params, open_checkpoint
from dsv3_jax.checkpoint.hf_config import config_fields
from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(config_fields(tiny_config)), encoding="utf-8")
    return path


def command(data: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--data", str(data), "--output", str(output), "--no-compilation-cache", *more]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command line is refused with."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_small_folder_becomes_a_checkpoint(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    for number in range(4):
        (data / f"{number}.txt").write_text(f"text {number} " * 30, encoding="utf-8")
    (data / "latin.txt").write_bytes(b"gr\xf6\xdfer")
    sizes = ("--tokens", "96", "--batch-size", "2", "--sequence-length", "16")
    assert main(command(data, output, "--config", str(config_file), *sizes)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "skipped 1 files that are not UTF-8: latin.txt"
    assert printed[-2].startswith("step 3  tokens 96  loss ")
    assert printed[-1].startswith("held-out bits per byte:  model ")
    assert "xz -9 " in printed[-1]
    load_params(open_checkpoint(output), "stored")


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(capsys, command(tmp_path / "empty", tmp_path / "output"))
    assert line.startswith(f"dsv3: --data {tmp_path / 'empty'}: no UTF-8 text")
    assert not (tmp_path / "output").exists()


def test_a_missing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, command(tmp_path / "absent", tmp_path / "output"))


def test_outputs_that_cannot_be_written_are_refused(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("text", encoding="utf-8")
    assert "is a file" in refused(capsys, command(text_folder, file))
    assert "is not empty" in refused(capsys, command(text_folder, tmp_path))
    assert "parent" in refused(capsys, command(text_folder, tmp_path / "absent" / "output"))
    assert "no such folder" in refused(capsys, command(text_folder, tmp_path / "absent", "--resume"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_that_takes_no_files_is_refused(
    text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # /proc refuses root too, whom permission bits do not stop.
    assert "cannot be written" in refused(capsys, command(text_folder, Path("/proc/output")))


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--tokens", "0"), "--tokens"),
        (("--batch-size", "two"), "--batch-size"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--config", "absent"), "--config absent"),
        (("--config", "deepseek-v3"), "num_nextn_predict_layers"),
        (("--sequence-length", "5000"), "max_position_embeddings"),
    ],
)
def test_bad_flags_are_refused(
    text_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    expected: str,
) -> None:
    assert expected in refused(capsys, command(text_folder, tmp_path / "output", *flags))
    assert not (tmp_path / "output").exists()
