"""GPU kernels compiled to machine code for GPUs that are not there, and what ptxas says of them.

    JAX_PLATFORMS=cpu python -m benchmarks.gpu_check --chip h100 --chip b200

Prints, for every case of `gpu_cases.py`: registers, spilled bytes, shared memory, blocks that an SM holds, tensor-core
instructions, and the temporary memory of the program around the kernel. Exits with 1 if anything fails to compile,
spills, has its tensor-core instructions serialised, or lacks the instruction that the case asks for.

A pass means that XLA, Mosaic GPU and ptxas accept the kernel for the chip. It says nothing of right numbers (the tests
run the kernels interpreted) and nothing of speed.

`--functions MODULE:FUNCTION` compiles other code: a function without arguments that yields (name, function, arguments).
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu_case import GpuCase, Tile
from benchmarks.gpu_cases import all_gpu_cases
from dsv3_jax.aot import (
    GPUS,
    PtxKernel,
    captured_stderr,
    dump_environment,
    gpu_mesh,
    ptxas_errors,
    read_kernels,
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One case on one chip.

    Attributes:
        chip: of `GPUS`.
        jax: its version.
        kernel, label: the case's.
        seconds: that compiling took.
        problems: why it does not pass.
        kernels: every kernel in the program, Mosaic's and XLA's.
        temporary_bytes: that the program allocates beside arguments and results.
        ideal_bytes, flops, tile: the case's; None for `--functions`.
    """

    chip: str
    jax: str
    kernel: str
    label: str
    seconds: float
    problems: list[str]
    kernels: list[PtxKernel]
    temporary_bytes: int
    ideal_bytes: int | None = None
    flops: int | None = None
    tile: Tile | None = None

    def lines(self) -> Iterator[str]:
        """What the command line prints."""
        title = f"{self.chip} {self.kernel}: {self.label}"
        for kernel in self.kernels:
            used = ", ".join(f"{count} {name}" for name, count in sorted(kernel.instructions.items()))
            yield (
                f"{title}: {kernel.name}: {kernel.registers} registers, {kernel.spilled_bytes} B spilled, "
                f"{kernel.shared_bytes} B shared, {kernel.blocks_an_sm(GPUS[self.chip].shared_bytes)} blocks an SM; "
                f"{used or 'no tensor-core instruction'}"
            )
        result = "FAILED " + "; ".join(self.problems) if self.problems else "ok"
        yield f"{title}: {result}, {self.temporary_bytes} B temporary, {self.seconds:.1f} s"


def compile_for(mesh: Mesh, function: Callable, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
    """Compiles for the one device of `mesh`; arguments: pytrees of ShapeDtypeStructs."""
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    return jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()


def check(chip: str, mesh: Mesh, case: GpuCase, dump: Path) -> Check:
    """Compiles one case; the dump's folder is emptied."""
    problems, temporary = [], 0
    start = time.perf_counter()
    with captured_stderr() as captured:
        try:
            memory = compile_for(mesh, case.function, case.arguments).memory_analysis()
            temporary = memory.temp_size_in_bytes if memory else 0
        except Exception as error:
            # Whatever the compiler raises belongs to this case; the others still count.
            problems.append(f"{type(error).__name__}: {str(error)[:600]}")
    kernels = read_kernels(captured[0], dump)
    if problems:
        problems += ptxas_errors(captured[0])
    else:
        problems += _problems(case, chip, kernels)
    shutil.rmtree(dump)
    dump.mkdir()
    return Check(
        chip=chip,
        jax=jax.__version__,
        kernel=case.kernel,
        label=case.label,
        seconds=round(time.perf_counter() - start, 2),
        problems=problems,
        kernels=kernels,
        temporary_bytes=temporary,
        ideal_bytes=case.ideal_bytes,
        flops=case.flops,
        tile=case.tile,
    )


def _problems(case: GpuCase, chip: str, kernels: list[PtxKernel]) -> Iterator[str]:
    for kernel in kernels:
        if kernel.spilled_bytes:
            yield f"{kernel.name} spills {kernel.spilled_bytes} B"
        if kernel.serialized:
            yield f"{kernel.name}: its wgmma instructions are serialised"
    own = [kernel for kernel in kernels if kernel.name.startswith(case.kernel)]
    if not own:
        yield f"the program has no kernel {case.kernel}"
    pattern = case.instructions[chip]
    for kernel in own:
        if pattern and not any(re.search(pattern, name) for name in kernel.instructions):
            yield f"{kernel.name} has no instruction {pattern!r}"


def other_functions(chip: str, place: str) -> Iterator[GpuCase]:
    """What `--functions` names, as cases that ask for no instruction."""
    module, _, attribute = place.partition(":")
    named: Iterable = getattr(importlib.import_module(module), attribute)()
    for name, function, arguments in named:
        yield GpuCase("", name, function, arguments, {chip: ""}, 0, 0, Tile(0, 0, 0, 0))


def check_chip(options: argparse.Namespace, chip: str) -> int:
    """All cases on one chip, in this process; returns the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        dump = Path(scratch) / "dump"
        dump.mkdir()
        os.environ.update(dump_environment(dump))
        mesh = gpu_mesh(chip)
        results = []
        with jax.set_mesh(mesh):
            cases = (
                other_functions(chip, options.functions)
                if options.functions
                else all_gpu_cases(chip, options.kernels, options.labels, first=options.first)
            )
            for case in cases:
                results.append(check(chip, mesh, case, dump))
                print("\n".join(results[-1].lines()), flush=True)
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(result)) + "\n" for result in results)
    return 0 if results and not any(result.problems for result in results) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", action="append", choices=sorted(GPUS), help="default: h100 and b200")
    parser.add_argument("--kernels", default="", help="only kernels whose name begins so")
    parser.add_argument(
        "--labels", default="", help="only shapes whose label matches this regular expression"
    )
    parser.add_argument("--first", action="store_true", help="only the first case of every kernel")
    parser.add_argument("--functions", default="", help="module:function to compile instead of the cases")
    parser.add_argument("--json", type=Path, help="file that gets one line of JSON a case, appended")
    options = parser.parse_args()
    chips = options.chip or ["h100", "b200"]
    if len(chips) == 1:
        return check_chip(options, chips[0])
    # One process a chip: Mosaic GPU keeps a compiled kernel by its text, whatever the chip.
    rest = [
        f"--{name}={value}"
        for name, value in vars(options).items()
        if name not in ("chip", "first") and value
    ]
    rest += ["--first"] if options.first else []
    command = [sys.executable, "-m", "benchmarks.gpu_check", *rest]
    return max(subprocess.call([*command, "--chip", chip]) for chip in chips)


if __name__ == "__main__":
    sys.exit(main())
