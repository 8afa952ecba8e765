"""`dsv3 generate`, end to end on a small random checkpoint."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.cli.interactive import converse, watch_interrupts
from dsv3_jax.cli.main import main
from dsv3_jax.errors import InputError
from dsv3_jax.generate.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import ASSISTANT, BOS, EOS, USER


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path) -> Run:
    """Runs the command in this process, on `tiny_checkpoint` unless the arguments name another."""

    def run(*arguments: str | Path) -> Outcome:
        given = [str(argument) for argument in arguments]
        if "--checkpoint" not in given:
            given += ["--checkpoint", str(tiny_checkpoint)]
        code = main(["generate", *given, "--no-compilation-cache"])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def results(run: Run, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the command and gives the results of its output file."""

    def results(*arguments: str | Path) -> list[dict[str, Any]]:
        output = tmp_path / "results.json"
        outcome = run(*arguments, "--output", output)
        assert (outcome.code, outcome.err) == (0, "")
        return json.loads(output.read_text(encoding="utf-8"))["results"]

    return results


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    loaded = load_tokenizer(tiny_checkpoint)
    assert loaded is not None
    return loaded


def copy_of(checkpoint: Path, folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    return Path(shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*without)))


# Every shape of prompts and cache is compiled anew: what looks at prompts alone makes no tokens.
NEW = ("--max-new-tokens", "14")
NONE = ("--max-new-tokens", "0")


def test_output_file(run: Run, tmp_path: Path, tokenizer: Tokenizer) -> None:
    output = tmp_path / "out.json"
    outcome = run("--prompt", "def add", *NEW, "--output", output)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert set(written) == {"results", "stats"}
    [result] = written["results"]
    assert set(result) == {"prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"}
    assert result["prompt"] == "def add"
    assert result["prompt_token_ids"] == tokenizer.encode("def add")
    assert len(result["token_ids"]) == 14
    assert result["text"] == tokenizer.decode(result["token_ids"], skip_special=True)
    assert result["finish_reason"] == "length"
    assert written["stats"]["prompt_tokens"] == len(result["prompt_token_ids"])
    assert written["stats"]["new_tokens"] == 14
    assert written["stats"]["decode_tokens_per_second"] > 0
    assert outcome == Outcome(0, result["text"] + "\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_not_streaming_prints_the_same(run: Run) -> None:
    arguments = ("--prompt", "def add", *NEW)
    assert run(*arguments, "--no-stream") == run(*arguments)


def test_token_ids_need_no_tokenizer(
    run: Run, results: Callable, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bare = copy_of(tiny_checkpoint, tmp_path / "bare", without=("tokenizer*", "generation_config.json"))
    arguments = ("--token-ids", "5,6,7,8,9", *NEW, "--ignore-eos")
    [result] = results("--checkpoint", bare, *arguments)
    assert (result["prompt"], result["prompt_token_ids"], result["text"]) == (None, [5, 6, 7, 8, 9], None)
    assert run("--checkpoint", bare, *arguments).out == ",".join(map(str, result["token_ids"])) + "\n"
    [with_text] = results(*arguments)
    assert with_text["prompt_token_ids"] == [5, 6, 7, 8, 9]
    assert with_text["text"] is not None


TEXTS = ("def", "The fox", "class A:")


def test_a_batch_gives_what_each_row_gives_alone(run: Run, results: Callable) -> None:
    batch = results("--prompt", *TEXTS, *NEW)
    assert [result["prompt"] for result in batch] == list(TEXTS)
    assert results("--prompt", TEXTS[0], "--prompt", *TEXTS[1:], *NEW, "--batch-size", "1") == batch
    printed = run("--prompt", *TEXTS, *NEW).out
    assert printed == "".join(f"[{n}] {r['prompt']}\n{r['text']}\n\n" for n, r in enumerate(batch, start=1))


def test_no_new_tokens(results: Callable) -> None:
    [result] = results("--prompt", "def", *NONE)
    assert (result["token_ids"], result["text"], result["finish_reason"]) == ([], "", "length")


def test_stop_strings_cut_the_text(results: Callable, tokenizer: Tokenizer) -> None:
    whole = results("--prompt", *TEXTS, *NEW)
    text = whole[0]["text"]
    # Not U+FFFD: the beginning of a character would be one, too.
    stop = next(text[n : n + 2] for n in range(2, len(text)) if "\ufffd" not in text[n : n + 2])
    stopped = results("--prompt", *TEXTS, *NEW, "--stop", "never in there", stop)
    for before, after in zip(whole, stopped, strict=True):
        if stop not in before["text"]:
            assert after == before
            continue
        assert after["text"] == before["text"].partition(stop)[0]
        assert after["finish_reason"] == "stop"
        assert after["token_ids"] == before["token_ids"][: len(after["token_ids"])]
        assert stop in tokenizer.decode(after["token_ids"], skip_special=True)
        assert stop not in tokenizer.decode(after["token_ids"][:-1], skip_special=True)
    assert stopped[0]["finish_reason"] == "stop"
    assert results("--prompt", TEXTS[0], *NEW, "--stop", stop) == stopped[:1]


def test_an_eos_id_of_the_generation_config_ends_a_text(
    results: Callable, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    [free] = results("--prompt", "def", *NEW)
    eos = free["token_ids"][5]
    at = free["token_ids"].index(eos)
    folder = copy_of(tiny_checkpoint, tmp_path / "other-eos")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, eos]}))
    [ended] = results("--checkpoint", folder, "--prompt", "def", *NEW)
    assert (ended["token_ids"], ended["finish_reason"]) == (free["token_ids"][:at], "stop")
    [ignored] = results("--checkpoint", folder, "--prompt", "def", *NEW, "--ignore-eos")
    assert (ignored["token_ids"], ignored["finish_reason"]) == (free["token_ids"], "length")


def test_sampling_is_reproducible(results: Callable) -> None:
    arguments = ("--prompt", "def", *NEW, "--temperature", "1.5", "--top-k", "50", "--top-p", "0.95")
    first, again = results(*arguments, "--seed", "1"), results(*arguments, "--seed", "1")
    assert first == again
    assert results(*arguments, "--seed", "2") != first
    assert results(*arguments, "--min-p", "1") == results("--prompt", "def", *NEW)


def test_top_p_one_is_off(results: Callable) -> None:
    arguments = ("--prompt", *TEXTS, *NEW, "--temperature", "1")
    assert results(*arguments, "--top-p", "1") == results(*arguments)


def test_ids_beyond_the_tokenizer_are_never_sampled(results: Callable) -> None:
    """At this temperature, each of the 304 rows of the head is as likely; 4 of them belong to no token."""
    arguments = ("--prompt", *["def"] * 3, *NEW, "--temperature", "10000", "--ignore-eos")
    rows = [row for seed in range(20) for row in results(*arguments, "--seed", seed)]
    ids = {token_id for row in rows for token_id in row["token_ids"]}
    assert sum(len(row["token_ids"]) for row in rows) == 20 * 3 * 14
    assert len(ids) > 200
    assert max(ids) < 300


# Chats


def test_chat_wraps_prompts_in_the_template(results: Callable, tokenizer: Tokenizer) -> None:
    [plain] = results("--prompt", "Hi", "--chat", *NONE)
    assert plain["prompt"] == "Hi"
    assert tokenizer.decode(plain["prompt_token_ids"]) == f"{BOS}{USER}Hi{ASSISTANT}"
    assert plain["prompt_token_ids"].count(0) == 1
    [full] = results(
        "--prompt", "Hi", "--chat", *NONE, "--system", "Be brief.", "--template-variable", "thinking=true"
    )
    assert tokenizer.decode(full["prompt_token_ids"]) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}<think>"


def test_file_of_texts(results: Callable, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffdef\r\nThe\u2028fox\r\n\r\n".encode())
    from_file = results("--input-file", path, *NONE)
    assert [result["prompt"] for result in from_file] == ["def", "The\u2028fox"]
    assert from_file == results("--prompt", "def", "The\u2028fox", *NONE)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_file_of_json_lines(results: Callable, tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [{"prompt": "def", "id": 7}, {"messages": [*messages, {"role": "user", "content": "c\u2028"}]}]
    path = tmp_path / name
    path.write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8"
    )
    text, chat = results("--input-file", path, *NONE)
    assert text == results("--prompt", "def", *NONE)[0]
    assert chat["prompt"] == lines[1]["messages"]
    prompt = f"{BOS}{USER}a{ASSISTANT}b{EOS}{USER}c\u2028{ASSISTANT}"
    assert tokenizer.decode(chat["prompt_token_ids"]) == prompt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\n\xff\n", "line 3 is not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "a"\n', "line 2 is not valid JSON"),
        (b'{"prompt": "a"}\n["a"]\n', "line 2: expected a JSON object with either prompt or messages"),
        (b'{"prompt": "a"}\n{"prompt": "a", "messages": []}\n', "line 2: expected a JSON object with either"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2: prompt is 3"),
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "line 2: prompt is empty"),
        (b'{"prompt": "a"}\n{"messages": []}\n', "line 2: messages: expected a list of at least one"),
        (b'{"messages": [{"role": "user", "content": "a"}, "b"]}\n', "line 1: messages: message 2 is not"),
        (b'{"messages": [{"role": "cook", "content": "a"}]}\n', "line 1: chat template refuses .* role cook"),
    ],
)
def test_a_bad_line_is_named(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    refused(run("--input-file", path), rf"prompts\.txt:? {message}")


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_conversation_remembers(
    run: Run, results: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    feed(monkeypatch, "def\n\nThe fox\n/reset\nThe fox\n/exit\nnever read\n")
    answers = run("--interactive", *NEW)
    first = {"role": "user", "content": "def"}
    second = {"role": "user", "content": "The fox"}
    path = tmp_path / "turns.jsonl"

    def answer(*messages: dict[str, str]) -> str:
        path.write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8")
        return results("--input-file", path, *NEW)[0]["text"]

    one = answer(first)
    two = answer(first, {"role": "assistant", "content": one}, second)
    three = answer(second)
    assert answers == Outcome(0, f"{one}\n{two}\n{three}\n", "")
    assert two != three


def test_a_conversation_goes_on_after_a_refused_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "a" * 300 + "\ndef\n")
    outcome = run("--interactive", *NEW)
    assert outcome.err.startswith("dsv3: the conversation: 303 tokens")
    assert outcome.err.count("\n") == 1
    feed(monkeypatch, "def\n")
    assert run("--interactive", *NEW) == Outcome(0, outcome.out, "")


def test_without_template_each_line_stands_alone(
    run: Run, results: Callable, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    feed(monkeypatch, "def\ndef\n")
    outcome = run("--checkpoint", folder, "--interactive", *NEW)
    [result] = results("--prompt", "def", *NEW)
    assert outcome.out == f"{result['text']}\n" * 2
    assert "no chat template" in outcome.err
    refused(run("--checkpoint", folder, "--interactive", "--system", "x"), "has no chat template")
    refused(run("--checkpoint", folder, "--prompt", "a", "--chat"), "has no chat template")


def test_interrupt_ends_the_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "first\nsecond\n")
    seen = []

    def answer(messages: list, interrupted: Callable[[], bool]) -> str:
        before = interrupted()
        if len(messages) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        seen.append((before, interrupted(), [message["content"] for message in messages]))
        return "cut short"

    converse(answer, remembers=True)
    assert seen == [(False, True, ["first"]), (False, False, ["first", "cut short", "second"])]


def test_second_interrupt_ends_the_program() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with watch_interrupts() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


# Bad input


def refused(outcome: Outcome, message: str) -> None:
    """One line on stderr, nothing on stdout, exit code 2."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("dsv3: ")
    assert outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --prompt --token-ids --input-file --interactive is required"),
        (["--prompt", "a", "--token-ids", "1"], "--token-ids: not allowed with argument --prompt"),
        (["--prompt", "a", "--interactive"], "--interactive: not allowed with argument --prompt"),
        (["--prompt", ""], "--prompt is empty; expected a text"),
        (["--prompt", "a", ""], "--prompt is empty; expected a text"),
        (["--token-ids", ""], "--token-ids is ''; expected ids with commas"),
        (["--token-ids", "1,x"], "--token-ids is '1,x'; expected ids with commas"),
        (["--token-ids", "1,304"], r"--token-ids: token id 304 is out of range; .* \(vocab_size is 304\)"),
        (["--token-ids", "1,-1"], "--token-ids: token id -1 is out of range"),
        (["--token-ids", "1", "--chat"], "--chat does not go with --token-ids"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature is nan; expected a finite number"),
        (["--prompt", "a", "--temperature", "inf"], "--temperature is inf"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0"),
        (["--prompt", "a", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--prompt", "a", "--top-p", "0"], "--top-p is 0.0; expected more than 0"),
        (["--prompt", "a", "--top-p", "1.01"], "--top-p is 1.01"),
        (["--prompt", "a", "--top-p", "nan"], "--top-p is nan"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k is -1"),
        (["--prompt", "a", "--top-k", "1.5"], "--top-k: invalid int value: '1.5'"),
        (["--prompt", "a", "--min-p", "-0.1"], "--min-p is -0.1"),
        (["--prompt", "a", "--min-p", "nan"], "--min-p is nan"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens is -1; expected 0 or more"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        (["--prompt", "a", "--stop", ""], "--stop is empty; expected a text"),
        (["--prompt", "a", "--weights", "int4"], "--weights: invalid choice: 'int4'"),
        (["--prompt", "a", "--system", "b"], "--system is for chats; expected --chat"),
        (["--prompt", "a", "--template-variable", "x=1"], "--template-variable is for chats"),
        (["--prompt", "a", "--chat", "--template-variable", "x=yes"], "--template-variable is 'x=yes'"),
        (
            ["--prompt", "a", "--chat", "--template-variable", "x"],
            "--template-variable is 'x'; expected NAME",
        ),
        (["--prompt", "a", "--chat", "--template-variable", "messages=1"], "'messages' cannot be set"),
        (["--prompt", "a\udcff"], "--prompt: text is not valid Unicode"),
        (["--prompt", "a" * 300], "--prompt: 301 tokens are beyond the context; expected at most 256"),
        (["--token-ids", "7,7", "--max-new-tokens", "255"], "2 tokens and --max-new-tokens 255 are beyond"),
        (["--input-file", "nowhere.txt"], r"nowhere\.txt cannot be read \(No such file"),
        (["--checkpoint", "nowhere", "--prompt", "a"], "nowhere: no such folder; expected a checkpoint"),
        (["--prompt", "a", "--prom", "b"], "unrecognized arguments: --prom b"),
        (["--interactive", "--output", "o.json"], "--output does not go with --interactive"),
    ],
)
def test_bad_arguments_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_without_tokenizer_is_refused(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bare = copy_of(tiny_checkpoint, tmp_path / "bare", without=("tokenizer*",))
    refused(run("--checkpoint", bare, "--prompt", "a"), "--prompt: the checkpoint has no tokenizer")
    refused(run("--checkpoint", bare, "--interactive"), "--interactive needs a tokenizer")
    refused(run("--checkpoint", bare, "--token-ids", "1", "--stop", "a"), "--stop needs a tokenizer")


def test_folders_that_are_no_checkpoint_are_refused(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(run("--checkpoint", tmp_path, "--prompt", "a"), "not a checkpoint folder")
    other = copy_of(tiny_checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    refused(run("--checkpoint", other, "--prompt", "a"), r"config\.json: model_type is 'llama'; expected")
    (other / "config.json").write_text(json.dumps({**config, "scoring_func": "tanh"}))
    refused(run("--checkpoint", other, "--prompt", "a"), r"config\.json: scoring_func is 'tanh'; expected")
    shutil.copy(tiny_checkpoint / "config.json", other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("--checkpoint", other, "--prompt", "a"), r"model\.safetensors")


def test_output_is_checked_before_any_work(run: Run, tmp_path: Path) -> None:
    # A prompt that is out of range, too: it would be noticed next.
    arguments = ("--token-ids", "9999", "--output")
    refused(run(*arguments, tmp_path / "nowhere" / "o.json"), "--output: .*nowhere is not a folder")
    refused(run(*arguments, tmp_path), "--output: .* is not a regular file")
    (tmp_path / "file").touch()
    refused(run(*arguments, tmp_path / "file" / "o.json"), "--output: .*file is not a folder")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write, as /proc")
def test_a_folder_that_cannot_be_written_is_refused(run: Run) -> None:
    refused(run("--prompt", "a", "--output", "/proc/o.json"), "--output: /proc cannot be written")


def test_a_refused_prompt_leaves_the_old_output(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "o.json"
    output.write_text("old")
    refused(run("--token-ids", "9999", "--output", output), "out of range")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("o.json", "old")]


def test_default_length_gives_way_to_the_context(results: Callable) -> None:
    ids = ",".join(["7"] * 250)
    long, full = results("--token-ids", ids, ids + ",7" * 6, "--ignore-eos")
    assert [len(result["token_ids"]) for result in (long, full)] == [6, 0]
    assert full["finish_reason"] == "length"


def test_debug_shows_the_traceback(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run("--prompt", "", "--debug")
    assert outcome.code == 2
    assert outcome.err.startswith("Traceback")
    assert outcome.err.endswith("dsv3: --prompt is empty; expected a text\n")
    assert main(["--debug", "generate", "--prompt", ""]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_at_most_twenty_details(capsys: pytest.CaptureFixture[str]) -> None:
    from dsv3_jax.cli.report import report

    report(InputError("23 tensors do not match", tuple(f"tensor {n}" for n in range(23))))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "dsv3: 23 tensors do not match",
        *(f"  tensor {n}" for n in range(20)),
        "  ... and 3 more",
    ]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, "dsv3 0.1.0\n")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "generate" in capsys.readouterr().out


# Whole processes


def test_help_does_not_import_jax() -> None:
    code = "import sys, dsv3_jax.cli.main as m; m.build_parser(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
