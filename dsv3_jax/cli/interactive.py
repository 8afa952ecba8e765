"""`dsv3 generate --interactive`: a conversation in the terminal."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from dsv3_jax.cli.continuation import Job, load_model
from dsv3_jax.cli.prompts import Prompt
from dsv3_jax.cli.report import report
from dsv3_jax.errors import InputError
from dsv3_jax.generate.chat import Message
from dsv3_jax.generate.complete import complete
from dsv3_jax.generate.loop import Conversation

HELP = "/reset forgets the conversation, /exit or end of input ends it, ^C stops an answer"

# Given the conversation, prints the answer as it comes and returns it; asks `interrupted` whether to go on.
Answer = Callable[[list[Message], Callable[[], bool]], str]


def talk(args: argparse.Namespace, job: Job) -> None:
    """Runs a conversation with the model; without a chat template, each line is a text to continue by itself.

    Raises:
        InputError: there is no tokenizer, or a chat option is given and there is no chat template.
    """
    if job.tokenizer is None:
        raise InputError("--interactive needs a tokenizer; expected tokenizer.json or tiktoken.model")
    has_template = bool(job.tokenizer.chat_templates)
    if not has_template:
        if args.chat or args.system is not None or args.template_variable:
            raise InputError(f"{job.folder}: has no chat template; expected --interactive alone, or one")
        print("dsv3: no chat template: each line is a text to continue by itself", file=sys.stderr)
    model = load_model(args, job)
    conversation = Conversation()

    def answer(messages: list[Message], interrupted: Callable[[], bool]) -> str:
        if has_template:
            prompt = Prompt("the conversation", messages=tuple(messages))
        else:
            prompt = Prompt("the text", text=messages[-1]["content"])
        ids = job.encode(prompt)
        [completion] = complete(
            model.engine,
            job.tokenizer,
            [ids],
            job.sampling_after(ids),
            stop=job.stop,
            on_text=lambda _, piece: print(piece, end="", flush=True),
            interrupted=interrupted,
            conversation=conversation if has_template else None,
        )
        return completion.text or ""

    converse(answer, remembers=has_template)


def converse(answer: Answer, *, remembers: bool) -> None:
    """Reads lines from stdin and has each answered, until `/exit` or the end of the input.

    Args:
        answer: answers the last message of a conversation.
        remembers: earlier messages are part of the conversation; else each line stands alone.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing for input())
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(HELP, file=sys.stderr)
    messages: list[Message] = []
    while True:
        try:
            line = input(">>> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # at the prompt it drops the line, as in a shell
            print(file=sys.stderr)
            continue
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            messages.clear()
            if is_terminal:
                print("forgotten", file=sys.stderr)
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line.strip() if remembers else line}]
        try:
            with watch_interrupts() as interrupted:
                text = answer(asked, interrupted)
        except InputError as error:
            report(error)
            continue
        print(flush=True)
        if remembers:
            messages = [*asked, {"role": "assistant", "content": text}]


@contextlib.contextmanager
def watch_interrupts() -> Iterator[Callable[[], bool]]:
    """Makes the first ^C in the block a question to ask, instead of an exception in the middle of something.

    Yields:
        Whether ^C came. The second one raises KeyboardInterrupt, as ever.
    """
    count = 0

    def handler(signum: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, previous)
