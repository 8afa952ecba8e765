import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsv3_jax.checkpoint import load_params, open_checkpoint
from dsv3_jax.config import BlockQuantization, ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.generate.tokenizer import load_tokenizer
from dsv3_jax.train.corpus import Corpus
from dsv3_jax.train.run import LOG_FILE, Run, train
from dsv3_jax.train.state_file import STATE_FILE

pytestmark = pytest.mark.slow

LENGTH, BATCH_SIZE = 16, 2
STEP = LENGTH * BATCH_SIZE


def run_of(**changes: object) -> Run:
    fields = {"data": "texts", "pattern": None, "batch_size": BATCH_SIZE, "sequence_length": LENGTH}
    return Run(**(fields | {"learning_rate": 3e-3, "seed": 0} | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def config(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        tiny_config, vocab_size=300, initializer_range=0.02, quantization_config=BlockQuantization()
    )


def run_steps(
    config: ModelConfig,
    corpus: Corpus,
    output: Path,
    steps: int,
    *,
    resume: bool = False,
    run: Run | None = None,
) -> dict[str, float]:
    return train(
        run or run_of(), config, corpus, output, num_tokens=steps * STEP, resume=resume, report=lambda _: None
    )


@pytest.fixture(scope="module")
def finished(
    config: ModelConfig, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """A run of 12 steps, and its figures."""
    output = tmp_path_factory.mktemp("run") / "output"
    return output, run_steps(config, corpus, output, 12)


def test_the_folder_is_a_checkpoint_in_float8(
    finished: tuple[Path, dict[str, float]], config: ModelConfig
) -> None:
    checkpoint = open_checkpoint(finished[0])
    params = load_params(checkpoint, "stored")
    linear = params["moe_layers"]["mlp"]["experts"]["gate_proj"]
    assert linear["weight"].dtype == "float8_e4m3fn"
    assert linear["weight_scale_inv"].dtype == "float32"
    assert params["lm_head"]["weight"].dtype == "bfloat16"
    assert params["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"].any()
    assert checkpoint.config.vocab_size == config.vocab_size
    tokenizer = load_tokenizer(finished[0])
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert checkpoint.config.eos_token_id == (1,)


def test_figures_and_log_are_there(finished: tuple[Path, dict[str, float]]) -> None:
    output, figures = finished
    assert 0 < figures["xz -9"] < figures["model"] < 16
    lines = [json.loads(line) for line in (output / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["step"] == 12
    assert lines[-1]["tokens"] == 12 * STEP
    # What is stored is what was trained, but for the rounding to FP8 and the longer context.
    assert figures["model"] == pytest.approx(lines[-1]["held_out_bits_per_byte"], rel=0.02)


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    finished: tuple[Path, dict[str, float]], config: ModelConfig, corpus: Corpus, tmp_path: Path
) -> None:
    # Both are in the warm-up until step 9, where the schedule does not depend on the number of steps.
    interrupted = tmp_path / "output"
    run_steps(config, corpus, interrupted, 9)
    run_steps(config, corpus, interrupted, 12, resume=True)
    whole, resumed = (load_file(folder / STATE_FILE) for folder in (finished[0], interrupted))
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)


def test_another_run_is_not_resumed(
    finished: tuple[Path, dict[str, float]], config: ModelConfig, corpus: Corpus
) -> None:
    with pytest.raises(InputError, match="is of another run"):
        run_steps(config, corpus, finished[0], 12, resume=True, run=run_of(seed=1))
    with pytest.raises(InputError, match="cannot be read"):
        run_steps(config, corpus, finished[0].parent, 12, resume=True)


def test_sequences_beyond_the_corpus_are_refused(config: ModelConfig, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--sequence-length 1000000"):
        run_steps(config, corpus, tmp_path / "output", 1, run=run_of(sequence_length=1_000_000))
