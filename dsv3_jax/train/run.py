"""A whole run of `dsv3 train`: tokenizer, packing, steps, and the checkpoint at the end."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from dsv3_jax.checkpoint import load_params, open_checkpoint, save_checkpoint
from dsv3_jax.checkpoint.hf_config import config_fields
from dsv3_jax.config import ModelConfig, read_json_object
from dsv3_jax.errors import InputError
from dsv3_jax.model import init_params
from dsv3_jax.precision import Precision
from dsv3_jax.train.batches import batch_at, num_windows, pack
from dsv3_jax.train.bpe import BOS_ID, EOS_ID, train_tokenizer, write_tokenizer
from dsv3_jax.train.corpus import Corpus
from dsv3_jax.train.evaluate import bits_per_byte, xz_bits_per_byte
from dsv3_jax.train.export import stored_params
from dsv3_jax.train.optimizer import learning_rate_at, make_optimizer
from dsv3_jax.train.state_file import load_state, save_state
from dsv3_jax.train.step import TRAIN_PRECISION, TrainState, init_state, make_train_step

RUN_FILE = "training_run.json"
LOG_FILE = "training_log.jsonl"
STEPS_BETWEEN_LINES = 50
STEPS_BETWEEN_SAVES = 500

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is: with the same corpus, config and numbers, the same model comes out on the same machine.

    Attributes:
        data, pattern: where the corpus came from.
        batch_size: sequences a step.
        sequence_length: predictions a sequence.
        learning_rate: peak of the schedule.
        seed: of the initialisation and of the order of the windows.
    """

    data: str
    pattern: str | None
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.sequence_length

    def identity(self, config: ModelConfig) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on from; sequences may become longer and fewer."""
        fields = dataclasses.asdict(self) | {
            "tokens_a_step": self.tokens_a_step,
            "config": config_fields(config),
        }
        return {
            name: value for name, value in fields.items() if name not in ("batch_size", "sequence_length")
        }


@dataclasses.dataclass(frozen=True)
class Streams:
    """A packed corpus: int32 streams of tokens, and the bytes of the held-out texts as one."""

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: bytes


def train(
    run: Run,
    config: ModelConfig,
    corpus: Corpus,
    output: Path,
    *,
    num_tokens: int,
    resume: bool,
    report: Report,
) -> dict[str, float]:
    """Trains a model and writes it as a checkpoint, with the files that `resume` goes on from.

    Args:
        config: its token ids of BOS and EOS give way to the tokenizer's.
        output: an existing folder, or one to be made in an existing folder.
        num_tokens: predictions in all, those of earlier runs included.
        resume: goes on from the state in `output`; it must be of the same run and config.
        report: gets lines for the reader.

    Returns:
        Bits per byte of the held-out files, by the checkpoint as it is stored and by xz -9.

    Raises:
        InputError: `output` cannot be written, holds another run's state, or the corpus is too small.
    """
    config = dataclasses.replace(config, bos_token_id=BOS_ID, eos_token_id=(EOS_ID,))
    tokenizer = _prepare(run, config, corpus, output, resume)
    streams = _pack(run, corpus, tokenizer)
    report(
        f"{len(corpus.train)} files to train on, {len(streams.train)} tokens; {len(corpus.held_out)} held out, "
        f"{len(streams.held_out)} tokens, {len(streams.held_out_bytes)} bytes"
    )
    num_steps = max(num_tokens // run.tokens_a_step, 1)
    optimizer = make_optimizer(run.learning_rate, num_steps)
    params = init_params(config, TRAIN_PRECISION, jax.random.key(run.seed))
    state = init_state(params, optimizer)
    if resume:
        state = load_state(output, state)
    state = _steps(run, config, state, streams, output, num_steps, report)
    save_checkpoint(output, config, stored_params(state.params, config))
    return _final_figures(run, output, streams)


def _prepare(
    run: Run, config: ModelConfig, corpus: Corpus, output: Path, resume: bool
) -> tokenizers.Tokenizer:
    """Makes the folder and the tokenizer, or checks and reads those of the run that is resumed."""
    identity = run.identity(config)
    if resume:
        if read_json_object(output / RUN_FILE) != identity:
            raise InputError(
                f"{output / RUN_FILE}: is of another run; expected the flags and config it began with"
            )
        tokenizer = tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer((document.text for document in corpus.train), config.vocab_size)
    try:
        output.mkdir(exist_ok=True)
        (output / RUN_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(output, tokenizer, config.max_position_embeddings)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from error
    return tokenizer


def _pack(run: Run, corpus: Corpus, tokenizer: tokenizers.Tokenizer) -> Streams:
    train = pack(tokenizer, [document.text for document in corpus.train])
    if not num_windows(train, run.sequence_length):
        raise InputError(
            f"--data {run.data}: {len(train)} tokens to train on; expected more than --sequence-length "
            f"{run.sequence_length}"
        )
    held_out = [document.text for document in corpus.held_out]
    return Streams(train, pack(tokenizer, held_out), "".join(held_out).encode("utf-8"))


def _steps(
    run: Run,
    config: ModelConfig,
    state: TrainState,
    streams: Streams,
    output: Path,
    num_steps: int,
    report: Report,
) -> TrainState:
    train_step = make_train_step(config, make_optimizer(run.learning_rate, num_steps))
    losses, began, first = [], time.monotonic(), int(state.step)
    for step in range(first, num_steps):
        batch = batch_at(
            streams.train, step, batch_size=run.batch_size, length=run.sequence_length, seed=run.seed
        )
        state, metrics = train_step(state, jnp.asarray(batch))
        losses.append(metrics["loss"])
        done = step + 1
        if done % STEPS_BETWEEN_LINES == 0 or done == num_steps:
            line = {
                "step": done,
                "tokens": done * run.tokens_a_step,
                "loss": round(float(np.mean(losses)), 4),
                "imbalance": round(float(metrics["imbalance"]), 2),
                "learning_rate": float(learning_rate_at(step, peak=run.learning_rate, num_steps=num_steps)),
                "tokens_per_second": round((done - first) * run.tokens_a_step / (time.monotonic() - began)),
            }
            losses = []
            if done % STEPS_BETWEEN_SAVES == 0 or done == num_steps:
                save_state(output, state)
                line["held_out_bits_per_byte"] = round(_quick_bits_per_byte(run, config, state, streams), 4)
            _log(output, line, report)
    return state


def _log(output: Path, line: dict[str, float], report: Report) -> None:
    report("  ".join(f"{name} {value:g}" for name, value in line.items()))
    with (output / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _quick_bits_per_byte(run: Run, config: ModelConfig, state: TrainState, streams: Streams) -> float:
    return bits_per_byte(
        state.params,
        streams.held_out,
        len(streams.held_out_bytes),
        length=run.sequence_length,
        context=0,
        config=config,
        precision=TRAIN_PRECISION,
    )


def _final_figures(run: Run, output: Path, streams: Streams) -> dict[str, float]:
    """Measures what was written, read back as any other checkpoint is."""
    checkpoint = open_checkpoint(output)
    weights = "float8" if checkpoint.config.quantization_config else checkpoint.config.torch_dtype
    precision = Precision(weights=weights, activations="none", dtype="float32")  # type: ignore[arg-type]
    model = bits_per_byte(
        load_params(checkpoint, "stored", progress=lambda _: None),
        streams.held_out,
        len(streams.held_out_bytes),
        length=run.sequence_length,
        context=run.sequence_length // 2,
        config=checkpoint.config,
        precision=precision,
    )
    return {"model": model, "xz -9": xz_bits_per_byte(streams.held_out_bytes)}
