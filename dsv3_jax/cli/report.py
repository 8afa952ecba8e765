"""How the command line says that something is wrong with its input."""

import sys

from dsv3_jax.errors import InputError

MAX_DETAILS = 20


def report(error: InputError) -> None:
    """Prints an error on stderr: its line, then at most 20 of its details."""
    print(f"dsv3: {error.message}", file=sys.stderr)
    for detail in error.details[:MAX_DETAILS]:
        print(f"  {detail}", file=sys.stderr)
    if len(error.details) > MAX_DETAILS:
        print(f"  ... and {len(error.details) - MAX_DETAILS} more", file=sys.stderr)
