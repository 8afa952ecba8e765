"""The TPU kernels at the real model's shapes, by the real compiler: `python -m benchmarks.tpu_schedule`.

Compiles every case of tpu_cases.py for v5e, v5p, v6e and TPU7x, which need not be present (extra `tpu`), prints the
figures and writes them to docs/tpu_schedule.md. `--chips v6e --kernels dsv3_mla_decode` does a part, and with --update
replaces the rows of that part in the document.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from benchmarks.tpu_compile import Figures
from dsv3_jax.aot import CHIPS, llo_dump_environment

REPORT = Path(__file__).parent.parent / "docs" / "tpu_schedule.md"
PREFACE = """\
# Schedules of the TPU kernels

Made by `python -m benchmarks.tpu_schedule` with jax {jax} and libtpu {libtpu}; not to be edited. Every kernel was
compiled by the TPU compiler, at V3's shapes, for one device of each generation. **Nothing was executed**: these are no
times, but what the compiled programs contain.

- **bundles**: VLIW instructions that one TensorCore issues for the whole operation, one a cycle: the grid loop and all
  loops inside multiplied out. Code that a branch skips (`pl.when`) counts in every step, which makes this an upper
  bound. On v5p, whose devices have two cores, the first parallel grid dimension is split over them.
- **DMA**: cycles that the kernel's HBM bytes take at the peak bandwidth of the data sheet. The bytes are the blocks
  that the compiled kernel's grid and index maps fetch and write back, never an author's estimate. `*`: the kernel moves
  data by its own copies, which the program doesn't tell; its bytes are then the ideal.
- **ratio**: bundles / DMA. Below 1 the kernel waits for memory (as it should in decode), above 1 for its instructions.
- **spills / fills**: vector registers stored and loaded for want of registers, in the whole kernel and, in parentheses,
  in the loops inside a grid step (in the grid's own loop where there are none); static counts.
- **VMEM**: MiB of scoped vector memory in use, and what the kernel may use.
- **HBM**: MB that the program moves, XLA's operations and other kernels around the kernel included (such as the
  quantisation of W8A8), and their ratio to the ideal: every weight and cache entry used read once, activations read
  once, results written once.
"""
HEADER = (
    "| shape | chip | bundles | DMA | ratio | spills / fills | VMEM | HBM | of ideal |\n"
    "| --- | --- | ---: | ---: | ---: | --- | --- | ---: | ---: |"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `error` instead of figures where the case failed."""

    kernel: str
    label: str
    chip: str
    error: str | None
    figures: Figures | None

    def __str__(self) -> str:
        if self.figures is None:
            return f"| {self.label} | {self.chip} | {self.error} | | | | | | |"
        entry, dma = self.figures, CHIPS[self.chip].dma_cycles(self.figures.kernel_bytes)
        bundles = entry.bundles or 0
        cells = (
            self.label,
            self.chip,
            f"{bundles:,}",
            f"{dma:,.0f}{'*' if entry.by_hand else ''}",
            f"{bundles / dma:.2f}",
            f"{entry.spills} / {entry.fills} ({entry.inner_spills} / {entry.inner_fills})",
            f"{entry.vmem_bytes / 2**20:.1f} of {entry.vmem_limit_bytes / 2**20:.0f}",
            f"{entry.program_bytes / 1e6:,.2f}",
            f"{entry.program_bytes / entry.ideal_bytes:.3f}",
        )
        return f"| {' | '.join(cells)} |"


def compile_for(chip: str, kernel_prefix: str, label_pattern: str) -> Iterator[Row]:
    """Compiles the cases for one chip in a new process whose schedules are dumped."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        dump.mkdir()
        command = [sys.executable, "-m", "benchmarks.tpu_compile", chip]
        command += ["--kernels", kernel_prefix, "--labels", label_pattern, "--dump", str(dump)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | llo_dump_environment(dump)
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            result = json.loads(line)
            if result["error"]:
                yield Row(result["kernel"], result["label"], chip, result["error"].split("\n")[0], None)
            for entry in result["figures"]:
                yield Row(entry["kernel"], result["label"], chip, None, Figures(**entry))
        if child.wait():
            raise subprocess.CalledProcessError(child.returncode, command)


Lines = dict[tuple[str, str], dict[str, str]]
"""(kernel, shape) -> chip -> line of the table."""


def read_report(text: str) -> Lines:
    """The lines of a document that `report` made."""
    lines: Lines = {}
    for line in text.splitlines():
        if line.startswith("## `"):
            kernel = line.removeprefix("## `").removesuffix("`")
        elif line.startswith("| ") and line.split(" | ")[1] in CHIPS:
            label, chip = line.removeprefix("| ").split(" | ")[:2]
            lines.setdefault((kernel, label), {})[chip] = line
    return lines


def report(lines: Lines) -> str:
    """The Markdown document: a table for every kernel, shapes in the order of the cases, chips one below the other."""
    parts = [PREFACE.format(jax=version("jax"), libtpu=version("libtpu"))]
    shapes = sorted(lines, key=lambda shape: shape[0])
    for kernel, group in itertools.groupby(shapes, key=lambda shape: shape[0]):
        rows = [lines[shape][chip] for shape in group for chip in CHIPS if chip in lines[shape]]
        parts.append(f"## `{kernel}`\n\n{HEADER}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated; default: all")
    parser.add_argument("--kernels", default="", help="only kernels whose name begins so")
    parser.add_argument(
        "--labels", default="", help="only shapes whose label matches this regular expression"
    )
    parser.add_argument("--update", action="store_true", help="replace the rows of a part in the document")
    options = parser.parse_args()
    chips = options.chips.split(",")
    everything = not options.kernels and not options.labels and set(chips) == set(CHIPS)
    lines = read_report(REPORT.read_text()) if options.update and not everything else {}
    failed = 0
    for chip in chips:
        for row in compile_for(chip, options.kernels, options.labels):
            print(f"{row.kernel} {row}", flush=True)
            lines.setdefault((row.kernel, row.label), {})[chip] = str(row)
            failed += row.error is not None
    if everything or options.update:
        REPORT.write_text(report(lines))
    print(f"{failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
