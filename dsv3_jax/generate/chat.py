"""Chat templates: the Jinja program of a checkpoint that writes a conversation as one prompt.

A template is a program from whoever made the checkpoint: it runs in Jinja's sandbox, in the environment that
transformers gives it (`transformers.utils.chat_template_utils`), so that it renders as it does there.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dsv3_jax.errors import InputError

Message = Mapping[str, Any]

# Variables that are the caller's business; all others a user may set (V3.1's `thinking`).
RESERVED_VARIABLES = ("messages", "add_generation_prompt")


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a checkpoint, by name; the only or the main one is called "default".

    `chat_template.jinja` stands above the field `chat_template` of `tokenizer_config.json`, which is a
    template or a list of objects with `name` and `template`.

    Raises:
        InputError: the file cannot be read, or the field has another form.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    field = tokenizer_config.get("chat_template")
    if field is None:
        return {}
    if isinstance(field, str):
        return {"default": field}
    named = [_named_template(entry) for entry in field] if isinstance(field, list) else [None]
    templates = dict(entry for entry in named if entry is not None)
    if len(templates) != len(named):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: chat_template is malformed; expected a template, or a list "
            "of objects with name and template"
        )
    return templates


def _named_template(entry: Any) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        return None
    name, template = entry.get("name"), entry.get("template")
    return (name, template) if isinstance(name, str) and isinstance(template, str) else None


def compile_chat_template(source: str) -> jinja2.Template:
    """Compiles a template in the sandbox. Raises InputError, with the line, where it is not valid Jinja."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"chat template: line {error.lineno}: {error.message}") from error


def render_chat(
    template: jinja2.Template,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    variables: Mapping[str, Any],
) -> str:
    """Writes a conversation as one prompt.

    Args:
        template: from `compile_chat_template`.
        messages: objects with `role` and `content`, and what else the template knows.
        add_generation_prompt: ends the prompt where the assistant's answer begins.
        special_tokens: `bos_token`, `eos_token`: variables of the template.
        variables: further variables; they stand above `special_tokens`.

    Returns:
        The prompt. Templates of this family write BOS themselves: encode it without adding another.

    Raises:
        InputError: there is no message, one is malformed, a variable is reserved, or the template fails.
    """
    check_messages(messages, "messages")
    for name in RESERVED_VARIABLES:
        if name in variables:
            raise InputError(f"template variable {name!r} cannot be set; expected another name")
    try:
        return template.render(
            messages=[dict(message) for message in messages],
            tools=variables.get("tools"),
            documents=variables.get("documents"),
            add_generation_prompt=add_generation_prompt,
            **{**special_tokens, **{k: v for k, v in variables.items() if k not in ("tools", "documents")}},
        )
    except Exception as error:  # a template is a program of its own: whatever it raises is about that input
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"chat template refuses the conversation: {reason}") from error


def check_messages(messages: Any, source: str) -> None:
    """Raises InputError, beginning with `source`, where this is not a list of messages with a role."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"{source}: expected a list of at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"{source}: message {number} is not an object with a role and a content")


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The conversation, opened by a system message where `system` is given and it has none of its own."""
    if system is None or (messages and messages[0].get("role") == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks what is trained on; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own spelling)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no template of a language model means.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
