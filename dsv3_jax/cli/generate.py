"""`dsv3 generate`: continues prompts, or talks."""

import argparse
from pathlib import Path
from typing import Any

from dsv3_jax.cli.compilation_cache import add_cache_arguments
from dsv3_jax.cli.logits import add_precision_arguments
from dsv3_jax.cli.output import check_output_file
from dsv3_jax.errors import InputError

DEFAULT_NEW_TOKENS = 256


def add_parser(subparsers: Any) -> None:
    """Adds the command to `dsv3`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts, or talk",
        description="Continues prompts with a checkpoint's model, or with the small bundled one. A "
        "continuation is printed while it comes; of several, each is printed under its prompt.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--checkpoint", metavar="DIR", type=Path, help="folder from Hugging Face (default: the bundled model)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", nargs="+", action="extend", help="text to continue")
    source.add_argument(
        "--token-ids", metavar="1,2,3", nargs="+", action="extend", help="token ids to continue, as they are"
    )
    source.add_argument(
        "--input-file", metavar="F", type=Path, help="a prompt a line, or JSON lines with prompt or messages"
    )
    source.add_argument("--interactive", action="store_true", help="talk: what was said before counts")
    add("--chat", action="store_true", help="put prompts through the checkpoint's chat template")
    add("--system", metavar="TEXT", help="system message of a chat")
    add(
        "--template-variable",
        metavar="NAME=JSON",
        action="append",
        default=[],
        help="variable of the chat template, such as thinking=true; may be repeated",
    )
    _add_sampling_arguments(parser)
    add_precision_arguments(parser)
    add("--output", metavar="OUT.json", type=Path, help="write results and statistics there")
    add("--batch-size", metavar="N", type=int, default=8, help="prompts at a time (default: %(default)s)")
    add("--no-stream", action="store_true", help="print a text when it is complete, which is a little faster")
    add_cache_arguments(parser)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        help=f"default: {DEFAULT_NEW_TOKENS}, or what the model's context has room for",
    )
    add("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", metavar="K", type=int, default=0, help="only the K likeliest tokens; 0 is off (default)")
    add(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="only the likeliest P of all; 1 is off (default)",
    )
    add(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="only P times as likely as the likeliest, or more",
    )
    add("--seed", metavar="S", type=int, default=0, help="of the random numbers (default: 0)")
    add(
        "--stop",
        metavar="STR",
        nargs="+",
        action="extend",
        default=[],
        help="end a text before this string; may be repeated ($'\\n' is a new line in most shells)",
    )
    add("--ignore-eos", action="store_true", help="go on past the end of a text")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        InputError: something is wrong with the input; all but the weights is looked at before they are read.
    """
    _check_arguments(args)
    # Not at the top: they import JAX, and `dsv3 --help` need not wait for it.
    from dsv3_jax.cli.continuation import continue_prompts, prepare
    from dsv3_jax.cli.interactive import talk
    from dsv3_jax.cli.prompts import read_prompt_file, text_prompts, token_id_prompts

    if args.prompt:
        prompts = text_prompts(args.prompt)
    elif args.token_ids:
        prompts = token_id_prompts(args.token_ids)
    else:
        prompts = [] if args.interactive else read_prompt_file(args.input_file)
    job = prepare(args, prompts)
    if args.interactive:
        talk(args, job)
    else:
        continue_prompts(args, job, prompts)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; expected at least 1")
    if "" in args.stop:
        raise InputError("--stop is empty; expected a text")
    if args.chat and args.token_ids:
        raise InputError(
            "--chat does not go with --token-ids, which are taken as they are; expected --prompt"
        )
    if args.output is not None:
        if args.interactive:
            raise InputError("--output does not go with --interactive; expected --prompt or --input-file")
        check_output_file(args.output, "--output")
