"""Kernel cases compiled for one absent TPU: `JAX_PLATFORMS=cpu python -m benchmarks.tpu_compile v5e`.

A process of its own, started by tpu_schedule.py and by tests/aot: libtpu reads its environment once and keeps a lock.
Prints one line of JSON a case: kernel, label, seconds, and either the compiler's error or the kernels' figures.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from pathlib import Path

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.tpu_case import Case
from benchmarks.tpu_cases import all_cases
from dsv3_jax.aot import (
    CHIPS,
    KernelCall,
    kernel_calls,
    kernel_schedule,
    large_copies,
    list_operations,
    topology_mesh,
)
from pallas_kernels.chip import chip

COPY_BYTES = 1 << 20
"""Larger copies beside the kernel are reported: they would be of a weight or of a cache."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """One kernel of one case on one chip.

    Attributes:
        kernel: its full name.
        kernel_bytes: HBM bytes of its blocks.
        by_hand: it moves data by its own copies, which cannot be counted: kernel_bytes is the case's ideal.
        program_bytes: kernel_bytes and the HBM bytes of XLA's operations and other kernels around it.
        ideal_bytes: the case's.
        copied_bytes: written by XLA's copies larger than 1 MiB.
        vmem_bytes, vmem_limit_bytes: scoped VMEM in use, and what the kernel may use.
        bundles: issued by one core, loops multiplied out; None without a dump.
        spills, fills: in the whole kernel, static.
        inner_spills, inner_fills: those in the loops inside a grid step, or in the grid's loop where there are none.
    """

    kernel: str
    kernel_bytes: float
    by_hand: bool
    program_bytes: float
    ideal_bytes: int
    copied_bytes: int
    vmem_bytes: int
    vmem_limit_bytes: int
    bundles: int | None = None
    spills: int = 0
    fills: int = 0
    inner_spills: int = 0
    inner_fills: int = 0


def compile_case(case: Case, mesh: Mesh) -> str:
    """The optimised program, as text, for the one device of `mesh`; arguments lie row-major, as the model's do."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(argument: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        layout = Format(Layout(major_to_minor=tuple(range(argument.ndim))), sharding)
        return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=layout)

    arguments = jax.tree.map(place, case.arguments)
    return jax.jit(case.function).lower(*arguments).compile().as_text() or ""


def read_figures(case: Case, text: str) -> list[Figures]:
    """What the program says of the case's kernels."""
    calls = [call for call in kernel_calls(text, scalars=case.scalars) if call.name.startswith(case.kernel)]
    if not calls:
        raise ValueError(f"the program has no kernel {case.kernel!r}")
    around = sum(op.hbm_bytes * op.times for op in list_operations(text) if op.opcode != "kernel")
    others = [call for call in kernel_calls(text) if not call.name.startswith(case.kernel)]
    around += sum(call.read_bytes + call.write_bytes for call in others)
    copied = sum(op.written_bytes * op.times for op in large_copies(text, COPY_BYTES))
    figures = []
    for call in {call.name: call for call in calls}.values():
        by_hand = math.isnan(call.read_bytes + call.write_bytes)
        kernel_bytes = case.ideal_bytes if by_hand else call.read_bytes + call.write_bytes
        figures.append(
            Figures(
                kernel=call.name,
                kernel_bytes=kernel_bytes,
                by_hand=by_hand,
                program_bytes=kernel_bytes + around,
                ideal_bytes=case.ideal_bytes,
                copied_bytes=copied,
                vmem_bytes=call.vmem_bytes,
                vmem_limit_bytes=call.vmem_limit_bytes or chip().scoped_vmem_bytes,
            )
        )
    return figures


def add_schedule(figures: Figures, case: Case, call: KernelCall, cores: int, dump: Path) -> Figures:
    """The figures with those of the kernel's schedule.

    Raises:
        ValueError: the case's trip counts are not those of the compiled kernel.
    """
    schedule = kernel_schedule(dump, figures.kernel)
    steps = call.pipeline.steps()
    if steps is None:
        raise ValueError("a grid that is known at run time only")
    inner = schedule.working_loops(steps)
    return dataclasses.replace(
        figures,
        bundles=schedule.issued(steps, case.trips, core_steps=call.pipeline.steps(cores)),
        spills=schedule.spills,
        fills=schedule.fills,
        inner_spills=sum(loop.spills for loop in inner),
        inner_fills=sum(loop.fills for loop in inner),
    )


def measure(case: Case, mesh: Mesh, cores: int, dump: Path | None) -> list[Figures]:
    """Compiles a case; with the folder of a dump, which is emptied, also reads the schedule."""
    text = compile_case(case, mesh)
    figures = read_figures(case, text)
    if dump is None:
        return figures
    calls = {call.name: call for call in kernel_calls(text)}
    try:
        return [add_schedule(entry, case, calls[entry.kernel], cores, dump) for entry in figures]
    finally:
        shutil.rmtree(dump)
        dump.mkdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("--kernels", default="", help="only kernels whose name begins so")
    parser.add_argument(
        "--labels", default="", help="only shapes whose label matches this regular expression"
    )
    parser.add_argument("--first", action="store_true", help="only the first case of every kernel")
    parser.add_argument("--dump", type=Path, help="folder that LIBTPU_INIT_ARGS names; adds the schedule")
    options = parser.parse_args()
    target = CHIPS[options.chip]
    mesh = topology_mesh(target.host)
    # Block sizes, and with them trips, depend on the chip; what the cases compute of them runs here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        cases = all_cases(options.kernels, options.labels, first=options.first)
    with jax.set_mesh(mesh):
        for case in cases:
            start = time.perf_counter()
            result = {"kernel": case.kernel, "label": case.label, "error": None, "figures": []}
            try:
                figures = measure(case, mesh, target.cores, options.dump)
                result["figures"] = [dataclasses.asdict(entry) for entry in figures]
            except Exception as error:
                # Whatever the compiler raises belongs to this case; the others still count.
                result["error"] = f"{type(error).__name__}: {error}"
            result["seconds"] = round(time.perf_counter() - start, 2)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
