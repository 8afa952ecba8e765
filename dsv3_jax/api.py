"""The Python interface: `load` a checkpoint, `generate` from it."""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from dsv3_jax.checkpoint import load_params, open_checkpoint, stored_format
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.generate.chat import Message
from dsv3_jax.generate.complete import TextCompletion, complete
from dsv3_jax.generate.loop import Engine
from dsv3_jax.generate.sampling import SamplingParams
from dsv3_jax.generate.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from dsv3_jax.precision import ActivationFormat, ComputeType, Implementation, Precision

StoredFormat = Literal["stored", "float32", "bfloat16", "float8"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint in memory, ready to generate.

    Attributes:
        config: its architecture; without MTP modules unless they were asked for.
        params: nested dict of arrays, as `dsv3_jax.model.abstract_params` describes it.
        precision: its number formats.
        tokenizer: None where the checkpoint has none.
        eos_token_ids: ids that end a text.
        engine: continues token ids; `engine.params` has the same weights in the form that is fast on the platform
            (`dsv3_jax.model.layout`), in the same memory.
    """

    config: ModelConfig
    params: dict
    precision: Precision
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    engine: Engine

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int] | Sequence[Message]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[TextCompletion]:
        """Continues a batch of prompts.

        Args:
            prompts: each a text, token ids, or the messages of a chat ({"role", "content"} each); a text alone is a
                batch of one.
            stop: strings before which a text is cut and its row ends.
            template_variables: of the chat template, such as V3.1's {"thinking": True}.
            on_text: is given texts piece by piece as they come, each with its row.
            max_new_tokens, temperature, top_k, top_p, min_p, seed, ignore_eos: see `SamplingParams`.

        Raises:
            InputError: a value is out of range, a prompt does not fit the model, or a text is given and there is
                no tokenizer.
        """
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            eos_token_ids=self.eos_token_ids,
            ignore_eos=ignore_eos,
        )
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.encode(prompt, template_variables) for prompt in prompts]
        return complete(self.engine, self.tokenizer, rows, sampling, stop=stop, on_text=on_text)

    def encode(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt: ids as they are, a text with BOS, messages through the chat template.

        Raises:
            InputError: a text or messages are given and the checkpoint has no tokenizer or no chat template.
        """
        if not isinstance(prompt, str) and all(isinstance(part, numbers.Integral) for part in prompt):
            return [int(part) for part in prompt]  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer; expected tokenizer.json or token ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        messages: list[Message] = list(prompt)  # type: ignore[arg-type]
        text = self.tokenizer.apply_chat_template(messages, variables=template_variables or {})
        return self.tokenizer.encode(text, add_bos=False)


def load(
    folder: str | Path | None = None,
    *,
    weights: StoredFormat = "stored",
    activations: ActivationFormat = "none",
    dtype: ComputeType | None = None,
    implementation: Implementation | None = None,
    mtp: bool = False,
    with_tokenizer: bool = True,
    shardings: Mapping[str, Any] | None = None,
) -> Model:
    """Reads a checkpoint of Hugging Face's layout.

    Args:
        folder: with config.json and safetensors; the bundled `tiny` if None.
        weights: "stored" keeps the checkpoint's own format (FP8 stays FP8); the others convert while reading.
        activations: "float8" quantises the linears' inputs too (W8A8).
        dtype: of the activations; float32 on a CPU and bfloat16 elsewhere if None.
        implementation: "pallas" or "reference" runs all operations so (see `Precision`); the platform's own if None.
        mtp: read the multi-token prediction modules too.
        with_tokenizer: read the tokenizer; without it, prompts are token ids.
        shardings: nested dict of `jax.sharding.Sharding`s, such as `sharding.tree_shardings` makes for
            `abstract_params`; each device gets, and each process reads, its own part. One device if None.

    Raises:
        InputError: not a checkpoint folder, or its files and its config do not agree; the culprit is named.
    """
    folder = bundled_checkpoint() if folder is None else Path(folder)
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder) if with_tokenizer else None
    config = checkpoint.config if mtp else dataclasses.replace(checkpoint.config, num_nextn_predict_layers=0)
    precision = Precision(
        weights=stored_format(checkpoint) if weights == "stored" else weights,
        activations=activations,
        dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        implementation=implementation,
    )
    params = load_params(checkpoint, weights, mtp=mtp, shardings=shardings)
    engine = Engine(params, config, precision, tokenizer.vocab_size if tokenizer else None)
    eos = eos_token_ids(folder, config, tokenizer)
    return Model(config, params, precision, tokenizer, eos, engine)


def bundled_checkpoint() -> Path:
    """Folder of `tiny`, the model that comes with the package (docs/tiny.md)."""
    return Path(__file__).resolve().parent / "tiny"
