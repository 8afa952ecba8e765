"""`dsv3 logits` from the command line; what the numbers are is shown in tests/parity."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.checkpoint import save_checkpoint
from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig
from dsv3_jax.evaluate import main_logits
from dsv3_jax.model import init_params
from dsv3_jax.precision import Precision

TOKENS = np.array([[5, 9, 40, 7, 60], [11, 3, -100, -100, -100]])
LENGTHS = np.array([5, 2])


@pytest.fixture(scope="module")
def mtp_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """A checkpoint with an MTP module, and no tokenizer."""
    config = dataclasses.replace(tiny_config, num_nextn_predict_layers=1)
    params = init_params(config, Precision(weights="float32", dtype="float32"), jax.random.key(0))
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    save_checkpoint(folder, config, params)
    return folder


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.npz"
    np.savez(path, tokens=TOKENS, lengths=LENGTHS)
    return path


def run(checkpoint: Path, source: Path, *more: str) -> np.ndarray:
    target = source.with_name("out.npz")
    arguments = ["logits", "--checkpoint", str(checkpoint), "--input", str(source), "--output", str(target)]
    assert main([*arguments, "--dtype", "float32", "--no-compilation-cache", *more]) == 0
    with np.load(target) as arrays:
        assert arrays.files == ["logits"]
        return arrays["logits"]


@pytest.mark.parametrize("module", [(), ("--module", "mtp"), ("--module", "mtp", "--mtp-hidden", "pre")])
def test_prefill_and_decode_agree(mtp_checkpoint: Path, request_file: Path, module: tuple[str, ...]) -> None:
    prefill = run(mtp_checkpoint, request_file, *module)
    decode = run(mtp_checkpoint, request_file, "--mode", "decode", *module)
    assert prefill.shape == (2, 5, 304)
    assert prefill.dtype == np.float32
    # The MTP module has no input at a row's last position.
    lengths = LENGTHS - bool(module)
    for row, length in enumerate(lengths):
        difference = np.abs(prefill[row, :length] - decode[row, :length]).max()
        assert difference <= 2e-5 * prefill[0].std()


def test_output_is_that_of_the_python_interface(mtp_checkpoint: Path, request_file: Path) -> None:
    logits = run(mtp_checkpoint, request_file)
    model = dsv3_jax.load(mtp_checkpoint, dtype="float32")
    np.testing.assert_array_equal(logits, main_logits(model, TOKENS, LENGTHS, mode="prefill"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"lengths": LENGTHS}, "has no array 'tokens'"),
        ({"tokens": TOKENS}, "has no array 'lengths'"),
        ({"tokens": TOKENS * 0.5, "lengths": LENGTHS}, "tokens is float64"),
        ({"tokens": TOKENS[0], "lengths": LENGTHS}, "expected integers [B, T]"),
        ({"tokens": TOKENS, "lengths": LENGTHS[:1]}, "expected integers [2]"),
        ({"tokens": TOKENS, "lengths": np.array([5, 0])}, "lengths are 0 to 5; expected 1 to 5"),
        ({"tokens": TOKENS, "lengths": np.array([6, 1])}, "expected 1 to 5"),
        ({"tokens": TOKENS, "lengths": np.array([5, 3])}, "token ids are -100 to 60; expected 0 to 303"),
        ({"tokens": TOKENS + 2**32, "lengths": np.array([5, 2])}, "expected 0 to 303"),
    ],
)
def test_bad_arrays_are_named(
    mtp_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arrays: dict, message: str
) -> None:
    source = tmp_path / "in.npz"
    np.savez(source, **arrays)
    check_refused(mtp_checkpoint, source, capsys, message)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY\x01\x00cut off", None])
def test_bad_files_are_named(
    mtp_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes | None
) -> None:
    source = tmp_path / "in.npz"
    if content is not None:
        source.write_bytes(content)
    check_refused(mtp_checkpoint, source, capsys, str(source))


def test_single_array_is_refused(mtp_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "in.npy", TOKENS)
    check_refused(mtp_checkpoint, tmp_path / "in.npy", capsys, "is one array")


def test_mtp_of_a_model_without_it(
    tiny_checkpoint: Path, request_file: Path, capsys: pytest.CaptureFixture
) -> None:
    check_refused(tiny_checkpoint, request_file, capsys, "MTP", "--module", "mtp")


def test_kernels_that_do_not_take_the_model(
    tiny_checkpoint: Path, request_file: Path, capsys: pytest.CaptureFixture
) -> None:
    message = "--implementation: absorb_queries: the Pallas kernel does not take heads of"
    more = ("--implementation", "pallas", "--mode", "decode")
    check_refused(tiny_checkpoint, request_file, capsys, message, *more)


def check_refused(
    checkpoint: Path, source: Path, capsys: pytest.CaptureFixture, message: str, *more: str
) -> None:
    target = source.with_name("out.npz")
    arguments = ["logits", "--checkpoint", str(checkpoint), "--input", str(source), "--output", str(target)]
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv3: ")
    assert message in error.splitlines()[0]
    assert "Traceback" not in error
    assert not target.exists()
