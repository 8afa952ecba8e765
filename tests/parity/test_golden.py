"""Parity with `transformers` through golden files (tests/parity/make_golden.py); no torch needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.evaluate import main_logits, mtp_logits
from tests.parity.cases import CASES, Case, prompts, stored_tensors, write_checkpoint

GOLDEN = Path(__file__).parent / "golden"
# Of the logits' standard deviation. Sums in another order make about 1e-5 in float32; the nearest real mistake
# (eps 1e-5 in place of 1e-6) makes 1e-4 in a layer and more in four.
TOLERANCE = 2e-4
MTP_CASE = next(case for case in CASES if case.config["num_nextn_predict_layers"])


class Loaded(NamedTuple):
    """A case's checkpoint in memory, and what the reference says of it."""

    case: Case
    model: dsv3_jax.Model
    golden: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Loaded]:
    loaded: dict[str, Loaded] = {}

    def load(case: Case) -> Loaded:
        if case.name not in loaded:
            loaded[case.name] = read(case)
        return loaded[case.name]

    def read(case: Case) -> Loaded:
        folder = write_checkpoint(tmp_path_factory.mktemp(case.name), case.config, stored_tensors(case))
        model = dsv3_jax.load(folder, dtype="float32", mtp=bool(case.config["num_nextn_predict_layers"]))
        with np.load(GOLDEN / f"{case.name}.npz") as arrays:
            return Loaded(case, model, dict(arrays))

    return load


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
Load = Callable[[Case], Loaded]


def assert_close(got: np.ndarray, golden: dict[str, np.ndarray], name: str) -> None:
    positions, expected = golden[f"{name}_positions"], golden[name]
    difference = np.abs(got[positions[:, 0], positions[:, 1]] - expected).max() / expected.std()
    assert difference <= TOLERANCE, f"{name}: {difference:.1e} of the logits' std"


@every_case
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_logits(case: Case, load: Load, mode: Literal["prefill", "decode"]) -> None:
    loaded = load(case)
    assert_close(main_logits(loaded.model, *prompts(case), mode=mode), loaded.golden, "logits")


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("hidden", ["post", "pre"])
def test_mtp_logits(load: Load, mode: Literal["prefill", "decode"], hidden: Literal["post", "pre"]) -> None:
    loaded = load(MTP_CASE)
    logits = mtp_logits(loaded.model, *prompts(MTP_CASE), mode=mode, hidden=hidden)
    assert_close(logits, loaded.golden, f"mtp_{hidden}")


@pytest.mark.slow
@every_case
def test_greedy_tokens_of_a_mixed_batch(case: Case, load: Load) -> None:
    loaded = load(case)
    tokens, lengths = prompts(case)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    together = loaded.model.generate(rows, max_new_tokens=64, ignore_eos=True)
    assert [row.token_ids for row in together] == loaded.golden["greedy"].tolist()
    alone = [loaded.model.generate([row], max_new_tokens=64, ignore_eos=True)[0] for row in rows]
    assert [row.token_ids for row in alone] == loaded.golden["greedy"].tolist()
