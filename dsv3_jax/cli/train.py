"""`dsv3 train`: trains a small model from scratch on text files, and writes it as a checkpoint."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dsv3_jax.cli.compilation_cache import add_cache_arguments, enable_compilation_cache
from dsv3_jax.config import ModelConfig, config_names, named_config
from dsv3_jax.errors import InputError


def add_parser(subparsers: Any) -> None:
    """Adds the command to `dsv3`."""
    parser = subparsers.add_parser(
        "train",
        help="train a small model on text files",
        description="Trains a model from scratch on the text files of a folder, with a tokenizer of its own, and "
        "writes a checkpoint that `dsv3 generate --checkpoint` takes. One file in 32, by a hash of its name, is "
        "held out; bits per byte of these are printed next to those of xz -9.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        required=True,
        help="folder of UTF-8 text files, or stdlib: the sources of Python's standard library",
    )
    add("--pattern", metavar="GLOB", help="only files with such names (default: *.py for stdlib, else all)")
    add(
        "--output",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder of the checkpoint and of the run's state",
    )
    add("--config", metavar="NAME|FILE", default="tiny", help="bundled config or config.json (default: tiny)")
    add("--tokens", metavar="N", type=_positive_int, default=13_000_000, help="in all (default: %(default)s)")
    add(
        "--batch-size",
        metavar="N",
        type=_positive_int,
        default=4,
        help="sequences a step (default: %(default)s)",
    )
    add(
        "--sequence-length",
        metavar="N",
        type=_positive_int,
        default=512,
        help="tokens (default: %(default)s)",
    )
    add(
        "--learning-rate", metavar="R", type=_positive_float, default=3e-3, help="peak (default: %(default)s)"
    )
    add("--seed", metavar="S", type=int, default=0, help="of initialisation and order (default: 0)")
    add(
        "--resume",
        action="store_true",
        help="go on from the state in --output; --tokens may differ, and sequences may be longer and fewer a step",
    )
    add_cache_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises InputError where the corpus, the config, the output or the flags are at fault."""
    config = read_config(args.config)
    if args.sequence_length > config.max_position_embeddings:
        raise InputError(
            f"--sequence-length is {args.sequence_length}; expected at most max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    check_output(args.output, resume=args.resume)
    from dsv3_jax.train.corpus import read_corpus

    corpus = read_corpus(args.data, args.pattern)
    if corpus.skipped:
        shown = ", ".join(corpus.skipped[:5]) + (", ..." if len(corpus.skipped) > 5 else "")
        print(f"skipped {len(corpus.skipped)} files that are not UTF-8: {shown}")
    from dsv3_jax.train.run import Run, train

    enable_compilation_cache(args)
    figures = train(
        Run(args.data, args.pattern, args.batch_size, args.sequence_length, args.learning_rate, args.seed),
        config,
        corpus,
        args.output,
        num_tokens=args.tokens,
        resume=args.resume,
        report=lambda line: print(line, flush=True),
    )
    print("held-out bits per byte:  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    return 0


def read_config(name: str) -> ModelConfig:
    """The bundled config of that name, or a config.json's."""
    config = named_config(name) if name in config_names() else _config_of_file(Path(name))
    if config.num_nextn_predict_layers:
        raise InputError(
            f"--config {name}: num_nextn_predict_layers is {config.num_nextn_predict_layers}; expected 0"
        )
    return config


def _config_of_file(path: Path) -> ModelConfig:
    if not path.is_file():
        raise InputError(
            f"--config {path}: no such file; expected one, or one of {', '.join(config_names())}"
        )
    return ModelConfig.from_file(path)


def check_output(output: Path, *, resume: bool) -> None:
    """Raises InputError, naming the flag, where the output cannot be written, or is not there to be resumed."""
    if resume and not output.is_dir():
        raise InputError(f"--output {output}: no such folder; expected that of the run to --resume")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; expected a folder")
    if output.is_dir() and not resume and any(output.iterdir()):
        raise InputError(f"--output {output}: is not empty; expected a new folder, or --resume")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its parent is not a folder; expected an existing one")
    try:
        with tempfile.TemporaryFile(dir=output if output.is_dir() else output.absolute().parent):
            pass
    except OSError as error:
        raise InputError(
            f"--output {output}: cannot be written ({error.strerror}); expected a writable folder"
        ) from error


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
