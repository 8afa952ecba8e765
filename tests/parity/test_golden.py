"""Parity with `transformers` through golden files (tests/parity/make_golden.py); no torch needed."""

from pathlib import Path

import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.evaluate import main_logits, mtp_logits
from tests.parity.cases import CASES, Case, prompts, stored_tensors, write_checkpoint

GOLDEN = Path(__file__).parent / "golden"
# Of the logits' standard deviation. Sums in another order make about 1e-5 in float32; the nearest real mistake
# (eps 1e-5 in place of 1e-6) makes 1e-4 in a layer and more in four.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def golden(case: Case) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{case.name}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dsv3_jax.Model:
    folder = write_checkpoint(tmp_path_factory.mktemp(case.name), case.config, stored_tensors(case))
    return dsv3_jax.load(folder, dtype="float32", mtp=bool(case.config["num_nextn_predict_layers"]))


def assert_close(got: np.ndarray, golden: dict[str, np.ndarray], name: str) -> None:
    positions, expected = golden[f"{name}_positions"], golden[name]
    difference = np.abs(got[positions[:, 0], positions[:, 1]] - expected).max() / expected.std()
    assert difference <= TOLERANCE, f"{name}: {difference:.1e} of the logits' std"


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_logits(case: Case, model: dsv3_jax.Model, golden: dict[str, np.ndarray], mode: str) -> None:
    assert_close(main_logits(model, *prompts(case), mode=mode), golden, "logits")


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("hidden", ["post", "pre"])
def test_mtp_logits(
    case: Case, model: dsv3_jax.Model, golden: dict[str, np.ndarray], mode: str, hidden: str
) -> None:
    if not case.config["num_nextn_predict_layers"]:
        pytest.skip("no MTP module")
    assert_close(mtp_logits(model, *prompts(case), mode=mode, hidden=hidden), golden, f"mtp_{hidden}")


def test_greedy_tokens_of_a_mixed_batch(
    case: Case, model: dsv3_jax.Model, golden: dict[str, np.ndarray]
) -> None:
    tokens, lengths = prompts(case)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    results = model.generate(rows, max_new_tokens=64, ignore_eos=True)
    assert [r.token_ids for r in results] == golden["greedy"].tolist()
    alone = [model.generate([row], max_new_tokens=64, ignore_eos=True)[0] for row in rows]
    assert [r.token_ids for r in alone] == golden["greedy"].tolist()
