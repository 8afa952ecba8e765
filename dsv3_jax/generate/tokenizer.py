"""`Tokenizer`: text to token ids and back, from the files in a checkpoint's folder; nothing is fetched."""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from dsv3_jax.config import ModelConfig, read_json_object, token_ids
from dsv3_jax.errors import InputError
from dsv3_jax.generate.chat import Message, compile_chat_template, read_chat_templates, render_chat
from dsv3_jax.generate.tiktoken_file import read_ranks, tiktoken_backend


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Tokens of one checkpoint.

    Attributes:
        backend: does the work; never adds a token of its own here.
        bos_token: opens a text; None where the checkpoint has none.
        eos_token: ends a text; None where the checkpoint has none.
        add_bos_token: `encode` opens a text with BOS unless told otherwise.
        chat_templates: by name; see `chat_template`.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos_token: bool = False
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids.

        Args:
            text: any Unicode text.
            add_bos: puts BOS first, unless the text already begins with it: there are never two. None does as
                the checkpoint says.

        Raises:
            InputError: the text is not valid Unicode (lone surrogates, as an undecodable argument has), or
                BOS is asked for and there is none.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text is not valid Unicode at character {error.start}; expected UTF-8"
            ) from error
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not (self.add_bos_token if add_bos is None else add_bos):
            return ids
        bos = self.bos_token_id
        if bos is None:
            raise InputError(
                "the tokenizer has no BOS token to add; expected bos_token in tokenizer_config.json"
            )
        return ids if ids[:1] == [bos] else [bos, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD; ids that are no token become nothing.

        Args:
            ids: token ids.
            skip_special: leaves out tokens that are marked special, as BOS and EOS are and `<think>` is not.
        """
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @property
    def bos_token_id(self) -> int | None:
        """Id of `bos_token`."""
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of `eos_token`."""
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1. A model's `vocab_size` may be larger: those rows belong to no token."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that chats are written with: "default", or the only one, or None."""
        if len(self.chat_templates) == 1:
            return next(iter(self.chat_templates.values()))
        return self.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> str:
        """Writes a conversation as one prompt; encode it with `add_bos=False`: a template writes BOS itself.

        Args:
            messages: objects with `role` and `content`.
            add_generation_prompt: ends the prompt where the assistant's answer begins.
            variables: further variables of the template, such as V3.1's `thinking`.

        Raises:
            InputError: the checkpoint has no chat template, or it fails on this conversation.
        """
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return render_chat(
            self._compiled_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens={name: token for name, token in names.items() if token is not None},
            variables=variables,
        )

    @functools.cached_property
    def _compiled_template(self) -> jinja2.Template:
        if self.chat_template is not None:
            return compile_chat_template(self.chat_template)
        if self.chat_templates:
            names = ", ".join(sorted(self.chat_templates))
            raise InputError(f"the checkpoint's chat templates are {names}; expected one called default")
        raise InputError(
            "the checkpoint has no chat template; expected chat_template.jinja, or chat_template in "
            "tokenizer_config.json"
        )


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Reads `tokenizer.json`, or else `tiktoken.model`, and `tokenizer_config.json`.

    Returns:
        None where the folder has neither of the two.

    Raises:
        InputError: a file is malformed or asks for what is not supported; it is named.
    """
    folder = Path(folder)
    config_path = folder / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    if (folder / "tokenizer.json").is_file():
        backend = _read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "tiktoken.model").is_file():
        backend = _read_tiktoken(folder / "tiktoken.model", config, str(config_path))
    else:
        return None
    bos_token = _special_token(config, "bos_token", backend, str(config_path))
    return Tokenizer(
        backend=backend,
        bos_token=bos_token,
        eos_token=_special_token(config, "eos_token", backend, str(config_path)),
        add_bos_token=_adds_bos(config, bos_token, backend, str(config_path)),
        chat_templates=read_chat_templates(folder, config),
    )


def eos_token_ids(folder: str | Path, config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """All ids that end a text: those of `generation_config.json`, `config.json` and the tokenizer, ascending.

    Chat checkpoints end a turn with another token than a text, and name it in one of the three only.

    Raises:
        InputError: `generation_config.json` is malformed.
    """
    path = Path(folder) / "generation_config.json"
    ids = set(config.eos_token_id)
    if path.is_file():
        ids.update(token_ids(read_json_object(path).get("eos_token_id"), f"{path}: eos_token_id"))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare Exception on a malformed file
        raise InputError(f"{path}: is not a tokenizer that `tokenizers` reads ({error})") from error
    # A file saved in the middle of training may cut or pad what it encodes.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_tiktoken(path: Path, config: dict[str, Any], source: str) -> tokenizers.Tokenizer:
    # The pattern that splits a text into words is not in the file: only that of Kimi's class is known.
    tokenizer_class = config.get("tokenizer_class", "TikTokenTokenizer")
    if tokenizer_class != "TikTokenTokenizer":
        raise InputError(
            f"{source}: tokenizer_class is {tokenizer_class!r}; expected 'TikTokenTokenizer' beside a "
            "tiktoken.model (Kimi-K2, Moonlight), or a tokenizer.json in its place"
        )
    return tiktoken_backend(read_ranks(path), _added_tokens(config, source))


def _added_tokens(config: dict[str, Any], source: str) -> dict[int, tokenizers.AddedToken]:
    """`added_tokens_decoder` of a `tokenizer_config.json`: token by id."""
    try:
        return {
            int(token_id): tokenizers.AddedToken(
                entry["content"], normalized=False, special=bool(entry.get("special", True))
            )
            for token_id, entry in config.get("added_tokens_decoder", {}).items()
        }
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{source}: added_tokens_decoder is malformed; expected an object of ids, each with its content"
        ) from error


def _special_token(
    config: dict[str, Any], field: str, backend: tokenizers.Tokenizer, source: str
) -> str | None:
    """A token that `tokenizer_config.json` names, by its text or as an AddedToken object with `content`."""
    value = config.get(field)
    token = value.get("content") if isinstance(value, dict) else value
    if token is None:
        return None
    if not isinstance(token, str) or backend.token_to_id(token) is None:
        raise InputError(f"{source}: {field} is {token!r}; expected the text of a token of the vocabulary")
    return token


def _adds_bos(
    config: dict[str, Any], bos_token: str | None, backend: tokenizers.Tokenizer, source: str
) -> bool:
    """`add_bos_token` where it is given; else whether the post-processor of `tokenizer.json` adds BOS."""
    wanted = config.get("add_bos_token")
    if wanted is None:
        added = backend.encode("", add_special_tokens=True).ids
        return bos_token is not None and added[:1] == [backend.token_to_id(bos_token)]
    if not isinstance(wanted, bool):
        raise InputError(f"{source}: add_bos_token is {wanted!r}; expected true or false")
    if wanted and bos_token is None:
        raise InputError(
            f"{source}: add_bos_token is true and bos_token is missing; expected the token to add"
        )
    return wanted
