"""`dsv3 convert`: a checkpoint folder to FP8 or BF16."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to `dsv3`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint folder between FP8 and BF16",
        description="Write a complete checkpoint folder in another number format. "
        "An interrupted conversion goes on when it is started again.",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder")
    parser.add_argument("target", metavar="DST", help="new folder, or one with this conversion, interrupted")
    parser.add_argument("--to", required=True, choices=("bfloat16", "float8"), help="format of linears")
    parser.add_argument("--ue8m0", action="store_true", help="with float8: scales are powers of two (V3.1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code. Raises InputError."""
    from dsv3_jax.checkpoint.convert import convert_checkpoint

    convert_checkpoint(args.source, args.target, args.to, ue8m0=args.ue8m0)
    return 0
