"""Chat templates: the environment that transformers gives them, and errors that say what is wrong."""

import datetime
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from dsv3_jax.errors import InputError
from dsv3_jax.generate.chat import compile_chat_template, read_chat_templates, render_chat, with_system
from dsv3_jax.generate.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, USER, train_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind.\n"},
    {"role": "user", "content": "  What is 1 + 1?  "},
    {"role": "assistant", "content": "<think>One and one.</think>\n\nTwo. 二"},
    {"role": "user", "content": "And {{ 2 + 2 }}?"},
]
TOOL_CALL = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
}

# What templates of this family and their neighbours make use of, each in a template of its own.
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "blocks are trimmed": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n"
    "  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nA:{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }};"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ {'é<': 1} | tojson(ensure_ascii=True) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "what is not given": "{{ tools is none }}{{ documents is none }}{{ thinking is defined }}{{ pad_token }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}",
    "methods": "{{ messages[2]['content'].split('</think>')[-1].strip() }}{{ messages[0].items() | list }}",
    "macro": "{% macro say(m) -%}{{ m.role | upper }}: {{ m.content | trim }}{%- endmacro %}"
    "{% for m in messages %}{{ say(m) }}\n{% endfor %}",
}


def render(source: str, conversation: list[dict[str, object]], **variables: object) -> str:
    return render_chat(
        compile_chat_template(source),
        conversation,
        add_generation_prompt=True,
        special_tokens={"bos_token": BOS, "eos_token": EOS},
        variables=variables,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = transformers.render_jinja_template(
        [CONVERSATION],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        bos_token=BOS,
        eos_token=EOS,
    )
    assert render(TEMPLATES[name], CONVERSATION) == rendered[0]


def test_a_conversation_is_written_as_one_prompt() -> None:
    assert render(CHAT_TEMPLATE, CONVERSATION) == (
        f"{BOS}Be <brief> & kind.\n{USER}  What is 1 + 1?  "
        f"{ASSISTANT}<think>One and one.</think>\n\nTwo. 二{EOS}{USER}And {{{{ 2 + 2 }}}}?{ASSISTANT}"
    )


def test_variables_reach_the_template() -> None:
    assert render(CHAT_TEMPLATE, HELLO) == f"{BOS}{USER}Hello{ASSISTANT}"
    assert render(CHAT_TEMPLATE, HELLO, thinking=True) == f"{BOS}{USER}Hello{ASSISTANT}<think>"
    assert render(CHAT_TEMPLATE, HELLO, bos_token="") == f"{USER}Hello{ASSISTANT}"
    assert render("{{ tools[0] }}", HELLO, tools=["add"]) == "add"


def test_strftime_now_is_the_clock() -> None:
    before = datetime.datetime.now().strftime("%Y-%m-%d")
    rendered = render("{{ strftime_now('%Y-%m-%d') }}", HELLO)
    assert before <= rendered <= datetime.datetime.now().strftime("%Y-%m-%d")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation: .*str"),
        ("{{ missing.field }}", "refuses the conversation: 'missing' is undefined"),
        ("{{ messages.append(1) }}", "refuses the conversation: .*append.* is unsafe"),
        (
            "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "refuses the conversation",
        ),
        ("{% for i in range(999999999) %}{% endfor %}", "refuses the conversation: .*Range too big"),
        ("a\n{% if %}", r"line 2: Expected an expression"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
    ],
)
def test_a_failing_template_is_named_in_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^chat template:? {message}") as raised:
        render(source, HELLO)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected a list of at least one message"),
        ("Hello", "messages: expected a list"),
        (["Hello"], "message 1 is not an object"),
        ([*HELLO, {"content": "Hello"}], "message 2 is not an object"),
    ],
)
def test_malformed_messages_are_refused(messages: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(CHAT_TEMPLATE, messages)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt"])
def test_reserved_variables_are_refused(name: str) -> None:
    tokenizer = Tokenizer(train_tokenizer(), chat_templates={"default": CHAT_TEMPLATE})
    with pytest.raises(InputError, match=f"template variable '{name}'"):
        tokenizer.apply_chat_template(HELLO, variables={name: []})


def test_with_system() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert with_system(HELLO, None) == HELLO
    assert with_system(HELLO, "Be brief.") == [system, *HELLO]
    assert with_system(CONVERSATION, "Be brief.") == CONVERSATION


def test_templates_of_a_folder(tmp_path: Path) -> None:
    assert read_chat_templates(tmp_path, {}) == {}
    assert read_chat_templates(tmp_path, {"chat_template": "a"}) == {"default": "a"}
    named = {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}
    assert read_chat_templates(tmp_path, named) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("é\n", encoding="utf-8")
    assert read_chat_templates(tmp_path, named) == {"default": "é\n"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja: cannot be read as UTF-8"):
        read_chat_templates(tmp_path, named)


def test_the_template_is_the_default_or_the_only_one() -> None:
    backend = train_tokenizer()
    assert Tokenizer(backend, chat_templates={"default": "a", "rag": "b"}).chat_template == "a"
    assert Tokenizer(backend, chat_templates={"rag": "b"}).apply_chat_template(HELLO) == "b"
    several = Tokenizer(backend, chat_templates={"rag": "b", "tool_use": "c"})
    assert several.chat_template is None
    with pytest.raises(InputError, match="chat templates are rag, tool_use"):
        several.apply_chat_template(HELLO)
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(backend).apply_chat_template(HELLO)


def test_a_prompt_has_one_bos(tiny_tokenizer_files: list[Path]) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_files[0].parent)
    assert tokenizer is not None
    prompt = tokenizer.apply_chat_template(HELLO)
    assert prompt == f"{BOS}{USER}Hello{ASSISTANT}"
    assert tokenizer.encode(prompt, add_bos=False) == tokenizer.encode(prompt)
    assert tokenizer.encode(prompt).count(0) == 1
    assert tokenizer.apply_chat_template(HELLO, add_generation_prompt=False) == f"{BOS}{USER}Hello"


@pytest.mark.parametrize(
    "conversation", [HELLO, CONVERSATION, [*HELLO, TOOL_CALL]], ids=["hello", "turns", "tool"]
)
def test_the_real_template_renders_as_transformers_renders_it(
    tmp_path: Path, conversation: list[dict[str, object]]
) -> None:
    facts = os.environ.get("DSV3_REAL_FACTS")
    if not facts:
        pytest.skip("DSV3_REAL_FACTS is not set: no real tokenizer at hand")
    transformers = pytest.importorskip("transformers")
    with gzip.open(Path(facts) / "tokenizer" / "tokenizer.json.gz") as packed:
        (tmp_path / "tokenizer.json").write_bytes(packed.read())
    shutil.copy(Path(facts) / "tokenizer" / "tokenizer_config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    for add_generation_prompt in (True, False):
        prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt)
        options = {"add_generation_prompt": add_generation_prompt}
        assert prompt == reference.apply_chat_template(conversation, tokenize=False, **options)
        ids = reference.apply_chat_template(conversation, tokenize=True, return_dict=False, **options)
        assert tokenizer.encode(prompt, add_bos=False) == ids
