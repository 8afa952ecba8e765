"""Parity with `transformers` through the TPU kernels, interpreted on the CPU: no operation falls back on XLA."""

import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.evaluate import main_logits
from tests.parity.cases import KERNELS, prompts, stored_tensors, write_checkpoint
from tests.parity.test_golden import GOLDEN, assert_close


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dsv3_jax.Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("kernels"), KERNELS.config, stored_tensors(KERNELS))
    return dsv3_jax.load(folder, dtype="float32", implementation="pallas")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{KERNELS.name}.npz") as arrays:
        return dict(arrays)


@pytest.mark.slow
def test_logits_of_prompts(model: dsv3_jax.Model, golden: dict[str, np.ndarray]) -> None:
    assert_close(main_logits(model, *prompts(KERNELS), mode="prefill"), golden, "logits")


@pytest.mark.slow
def test_greedy_tokens_by_decode_steps(model: dsv3_jax.Model, golden: dict[str, np.ndarray]) -> None:
    tokens, lengths = prompts(KERNELS)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    new = model.generate(rows, max_new_tokens=12, ignore_eos=True)
    assert [row.token_ids for row in new] == golden["greedy"][:, :12].tolist()
