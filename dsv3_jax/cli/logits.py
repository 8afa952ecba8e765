"""`dsv3 logits`: logits of given tokens, to compare with another implementation."""

import argparse
import zipfile
from pathlib import Path

from dsv3_jax.cli.compilation_cache import add_cache_arguments, enable_compilation_cache
from dsv3_jax.errors import InputError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `dsv3`."""
    parser = subparsers.add_parser("logits", help="write the logits of given tokens to a file")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--input",
        required=True,
        metavar="IN.npz",
        help="tokens int32 [B, T], right-padded, and lengths int32 [B]",
    )
    parser.add_argument("--output", required=True, metavar="OUT.npz", help="logits float32 [B, T, V]")
    parser.add_argument(
        "--mode",
        choices=("prefill", "decode"),
        default="prefill",
        help="whole sequences at once, or one token at a time through the cache",
    )
    parser.add_argument("--module", choices=("main", "mtp"), default="main", help="whose logits")
    parser.add_argument(
        "--mtp-hidden",
        choices=("post", "pre"),
        default="post",
        help="hidden state that the MTP module gets: after (default) or before the final norm",
    )
    add_precision_arguments(parser)
    add_cache_arguments(parser)
    parser.set_defaults(run=run)


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --weights, --activations, --dtype and --implementation, whose values `dsv3_jax.load` takes."""
    parser.add_argument(
        "--weights",
        choices=("stored", "float32", "bfloat16", "float8"),
        default="stored",
        help="format of the weights in memory (default: as stored)",
    )
    parser.add_argument(
        "--activations",
        choices=("none", "float8"),
        default="none",
        help="float8 quantises what enters the linears too (W8A8)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the activations (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    parser.add_argument(
        "--implementation",
        choices=("reference", "pallas"),
        help="plain XLA or Pallas kernels for all operations (default: the platform's own)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    import numpy as np

    from dsv3_jax.api import load
    from dsv3_jax.cli.output import atomic_file, check_output_file
    from dsv3_jax.evaluate import main_logits, mtp_logits

    output = Path(args.output)
    check_output_file(output, "--output")
    enable_compilation_cache(args)
    tokens, lengths = _read_input(Path(args.input))
    is_mtp = args.module == "mtp"
    model = load(
        args.checkpoint,
        weights=args.weights,
        activations=args.activations,
        dtype=args.dtype,
        implementation=args.implementation,
        mtp=is_mtp,
        with_tokenizer=False,
    )
    if is_mtp:
        logits = mtp_logits(model, tokens, lengths, mode=args.mode, hidden=args.mtp_hidden)
    else:
        logits = main_logits(model, tokens, lengths, mode=args.mode)
    with atomic_file(output) as unfinished, unfinished.open("wb") as file:
        np.savez(file, logits=logits)
    return 0


def _read_input(path: Path) -> tuple:
    """Tokens [B, T] and lengths int32 [B] of the input file. Raises InputError, naming what is wrong."""
    import numpy as np

    try:
        arrays = np.load(path)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: is one array; expected an .npz of tokens [B, T] and lengths [B]")
        with arrays:
            missing = [name for name in ("tokens", "lengths") if name not in arrays.files]
            if missing:
                raise InputError(
                    f"{path}: has no array {missing[0]!r}; expected tokens [B, T] and lengths [B]"
                )
            tokens, lengths = arrays["tokens"], arrays["lengths"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as .npz ({error})") from error
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"{path}: tokens is {tokens.dtype} {tokens.shape}; expected integers [B, T]")
    if lengths.shape != tokens.shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise InputError(
            f"{path}: lengths is {lengths.dtype} {lengths.shape}; expected integers [{len(tokens)}]"
        )
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise InputError(
            f"{path}: lengths are {lengths.min()} to {lengths.max()}; expected 1 to {tokens.shape[1]}"
        )
    return tokens, lengths.astype(np.int32)
