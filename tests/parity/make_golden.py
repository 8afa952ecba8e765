"""Writes the golden files: `python -m tests.parity.make_golden [CASE ...]` (extra `parity`; a few minutes for all).

A file holds the logits of `transformers` at some positions and its greedy tokens; weights and prompts are made anew
from the case's seed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.parity.cases import CASES, Case, prompts
from tests.parity.reference import reference_arrays

GOLDEN = Path(__file__).parent / "golden"


def positions(case: Case) -> np.ndarray:
    """(row, position) pairs whose logits are stored: every ninth and the last two of each row; int32 [n, 2]."""
    pairs = []
    for row, length in enumerate(prompts(case)[1]):
        kept = sorted({*range(0, length, 9), *range(max(length - 2, 0), length)})
        pairs += [(row, position) for position in kept]
    return np.array(pairs, np.int32)


def write_golden(case: Case) -> None:
    """Runs the reference on one case and writes its file."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = reference_arrays(case, Path(folder))
    golden = {"greedy": arrays.pop("greedy")}
    for name, logits in arrays.items():
        pairs = positions(case)
        # A row's last position has no next token for the MTP module.
        if name.startswith("mtp"):
            pairs = pairs[pairs[:, 1] < prompts(case)[1][pairs[:, 0]] - 1]
        golden |= {name: logits[pairs[:, 0], pairs[:, 1]], f"{name}_positions": pairs}
    np.savez_compressed(GOLDEN / f"{case.name}.npz", allow_pickle=False, **golden)
    print(case.name, {name: array.shape for name, array in golden.items()}, flush=True)


if __name__ == "__main__":
    for case in CASES:
        if case.name in sys.argv[1:] or len(sys.argv) == 1:
            write_golden(case)
