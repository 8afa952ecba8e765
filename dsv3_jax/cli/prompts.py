"""Prompts as the command line gives them: texts, token ids, or a file of texts or conversations."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.generate.chat import Message, check_messages, with_system
from dsv3_jax.generate.tokenizer import Tokenizer

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt; exactly one of `text`, `messages` and `token_ids` is given.

    Attributes:
        source: what error messages call it: the flag, or the file and its line.
    """

    source: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How prompts are put through the chat template.

    Attributes:
        wrap_text: texts, too, go through it, each as a user's message.
        system: a system message for conversations that have none.
        variables: further variables of the template.
    """

    wrap_text: bool = False
    system: str | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def text_prompts(texts: Sequence[str]) -> list[Prompt]:
    """The prompts of `--prompt`. Raises InputError where one is empty."""
    return [_text_prompt(text, "--prompt") for text in texts]


def token_id_prompts(lists: Sequence[str]) -> list[Prompt]:
    """The prompts of `--token-ids`, each "1,2,3". Raises InputError where one is not of this form."""
    prompts = []
    for listed in lists:
        try:
            ids = tuple(int(token_id) for token_id in listed.split(","))
        except ValueError as error:
            raise InputError(
                f"--token-ids is {listed!r}; expected ids with commas between, as 1,2,3"
            ) from error
        prompts.append(Prompt("--token-ids", token_ids=ids))
    return prompts


def read_prompt_file(path: Path) -> list[Prompt]:
    """Reads a file of prompts, one a line.

    A line is the prompt itself; or, in a file called `.jsonl` or whose first line is such an object, a
    JSON object with `prompt` (a text) or `messages` (a conversation). Empty lines at the end do not count.

    Raises:
        InputError: the file cannot be read, is empty, or has a bad line, which is named with its number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"--input-file: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"--input-file: {path}: line {line} is not UTF-8 text") from error
    # Not splitlines(): it would also split at U+2028 and others, which JSON allows inside a string.
    lines = text.rstrip("\r\n").split("\n")
    if not lines[0] and len(lines) == 1:
        raise InputError(f"--input-file: {path} is empty; expected one prompt a line")
    is_json = path.suffix in JSON_LINES_SUFFIXES or _is_json_prompt(lines[0])
    read = _json_prompt if is_json else _text_prompt
    return [read(line.removesuffix("\r"), f"{path}: line {n}") for n, line in enumerate(lines, start=1)]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, chat: ChatOptions) -> list[int]:
    """Token ids of a prompt: given ids as they are, a conversation through the template, a text with BOS.

    Raises:
        InputError: there is no tokenizer, the template refuses the conversation, or no token is left.
    """
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if tokenizer is None:
        raise InputError(
            f"{prompt.source}: the checkpoint has no tokenizer; expected tokenizer.json or tiktoken.model in "
            "its folder, or --token-ids"
        )
    messages = prompt.messages
    if messages is None and chat.wrap_text:
        messages = ({"role": "user", "content": prompt.text},)
    try:
        if messages is None:
            ids = tokenizer.encode(prompt.text or "")
        else:
            conversation = with_system(messages, chat.system)
            ids = tokenizer.encode(
                tokenizer.apply_chat_template(conversation, variables=chat.variables), add_bos=False
            )
    except InputError as error:
        raise InputError(f"{prompt.source}: {error.message}", error.details) from error
    if not ids:
        raise InputError(f"{prompt.source} gives no token at all; expected at least one")
    return ids


def check_token_ids(ids: Sequence[int], source: str, config: ModelConfig, new_tokens: int) -> None:
    """Raises InputError, beginning with `source`, where the model cannot make so many tokens after them."""
    for token_id in ids:
        if not 0 <= token_id < config.vocab_size:
            raise InputError(
                f"{source}: token id {token_id} is out of range; expected 0 to {config.vocab_size - 1} "
                f"(vocab_size is {config.vocab_size})"
            )
    context = config.max_position_embeddings
    if len(ids) > context:
        raise InputError(
            f"{source}: {len(ids)} tokens are beyond the context; expected at most {context} "
            "(max_position_embeddings)"
        )
    if len(ids) + new_tokens > context:
        raise InputError(
            f"{source}: {len(ids)} tokens and --max-new-tokens {new_tokens} are beyond the context; expected "
            f"at most {context} together (max_position_embeddings)"
        )


def _text_prompt(text: str, source: str) -> Prompt:
    if not text:
        raise InputError(f"{source} is empty; expected a text")
    return Prompt(source, text=text)


def _json_prompt(line: str, source: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{source} is not valid JSON ({error})") from error
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise InputError(f"{source}: expected a JSON object with either prompt or messages")
    if "messages" in value:
        check_messages(value["messages"], f"{source}: messages")
        return Prompt(source, messages=tuple(value["messages"]))
    if not isinstance(value["prompt"], str):
        raise InputError(f"{source}: prompt is {value['prompt']!r}; expected a text")
    return _text_prompt(value["prompt"], f"{source}: prompt")


def _is_json_prompt(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and ("prompt" in value or "messages" in value)
