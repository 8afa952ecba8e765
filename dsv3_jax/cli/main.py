"""The command `dsv3`: runs the command asked for, and says in one line what is wrong with its input."""

import argparse
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from dsv3_jax.cli import convert, generate, inspect, logits, train
from dsv3_jax.cli.report import report
from dsv3_jax.errors import InputError
from pallas_kernels.errors import ImplementationError

COMMANDS = (generate, logits, convert, inspect, train)

EXIT_BAD_INPUT = 2
# What a shell reports for a program that the signal ended.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as all other bad input is refused."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Prints the version of the installed package; read when it is asked for, as a bare checkout has none."""

    def __call__(self, *_: Any) -> NoReturn:
        try:
            version = importlib.metadata.version("dsv3-jax")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"dsv3 {version}")
        sys.exit(0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; parsed arguments carry `run`, the command's function."""
    parser = _Parser(prog="dsv3", description="DeepSeek-V3 and its relatives, in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.allow_abbrev = False
        # Read on either side of the command; a default here would undo the one given before it.
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 2 where the input was wrong, after a line on stderr that says how (with `--debug`,
        after the traceback); 130 after ^C; 141 where nobody reads the output any more. A command may give
        another.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # A terminal that cannot show a character of the model's is no reason to end; nor is a line that is no UTF-8,
    # which is refused where it is encoded.
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        args = build_parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except (InputError, ImplementationError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        report(error if isinstance(error, InputError) else InputError(f"--implementation: {error}"))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        # A file that may not be read, a disk that is full.
        if "--debug" in arguments:
            traceback.print_exc()
        report(InputError(f"{error.filename or 'input or output'}: {error.strerror or error}"))
        return EXIT_BAD_INPUT
