"""What `ptxas` says of the kernels of a program compiled for a GPU, and what stands in their PTX."""

import collections
import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TENSOR_CORE = re.compile(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[.\w:]*")
_TENSOR_COPY = re.compile(r"cp\.async\.bulk\.tensor[.\w:]*")
_LAUNCH = re.compile(
    r"gpu\.launch .* threads\([^)]*\) in \((?P<threads>(?:%\w+ = %c\d+\w*(?:, )?)+)\)"
    r" dynamic_shared_memory_size %c(?P<shared>\d+)"
)
"""Once the passes have made constants of its operands, which MLIR names after their values."""
_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized.*?function '(\w+)'")


@dataclasses.dataclass(frozen=True)
class PtxKernel:
    """One kernel of a compiled program.

    Attributes:
        name: its entry function.
        registers: of one thread at the launch; warpgroups may move them among themselves afterwards.
        spilled_bytes: of stores and loads.
        shared_bytes: of one block; None where neither XLA nor Mosaic says.
        threads: of one block; None likewise.
        instructions: tensor-core instruction -> how often it stands in the PTX.
        tensor_copies: TMA copies that stand in the PTX.
        serialized: ptxas made its wgmma instructions wait for one another.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int | None
    threads: int | None
    instructions: dict[str, int]
    tensor_copies: int
    serialized: bool

    def blocks_an_sm(self, shared_bytes: int, registers: int = 65536) -> int | None:
        """Blocks that one SM holds, with so much shared memory (1 KiB of it goes with every block) and registers."""
        if self.shared_bytes is None or self.threads is None:
            return None
        a_thread = -(-self.registers // 8) * 8
        return min(shared_bytes // (self.shared_bytes + 1024), registers // (a_thread * self.threads))


def dump_environment(folder: Path) -> dict[str, str]:
    """Environment to set before anything is compiled: XLA and Mosaic then log and dump what this module reads."""
    flags = f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx"
    return {
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "subprocess_compilation=5",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    }


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collects file descriptor 2, where XLA logs what ptxas says, into the list yielded."""
    text: list[str] = []
    with tempfile.TemporaryFile() as sink:
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield text
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            text.append(sink.read().decode(errors="replace"))


def read_kernels(log: str, dump: Path) -> list[PtxKernel]:
    """All kernels of what was compiled into a dump.

    Args:
        log: standard error of the compilation.
        dump: the folder of `dump_environment`, emptied before.
    """
    ptx = "\n".join(path.read_text(errors="replace") for path in sorted(dump.glob("*.ptx")))
    shared = _xla_shared_bytes(dump)
    launches = _mosaic_launches(dump)
    serialized = set(_SERIALIZED.findall(log))
    kernels = []
    for name, (registers, spilled) in _resources(log).items():
        body = ptx.partition(f".entry {name}(")[2].partition(".entry ")[0]
        threads, mosaic_shared = launches.get(name, (None, None))
        kernels.append(
            PtxKernel(
                name=name,
                registers=registers,
                spilled_bytes=spilled,
                shared_bytes=shared.get(name, mosaic_shared),
                threads=threads,
                instructions=dict(collections.Counter(_TENSOR_CORE.findall(body))),
                tensor_copies=len(_TENSOR_COPY.findall(body)),
                serialized=name in serialized,
            )
        )
    return kernels


def ptxas_errors(log: str) -> list[str]:
    """Lines in which ptxas or a compiler pass refuses something."""
    return [line[-300:] for line in log.splitlines() if "error:" in line or "fatal" in line]


def _resources(log: str) -> dict[str, tuple[int, int]]:
    """Entry function -> registers, bytes spilled."""
    found: dict[str, tuple[int, int]] = {}
    name, spilled = "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name, spilled = match[1], 0
        elif match := re.search(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled += int(match[1]) + int(match[2])
        elif (match := re.search(r"Used (\d+) registers", line)) and name:
            found[name] = (int(match[1]), spilled)
    return found


def _xla_shared_bytes(dump: Path) -> dict[str, int]:
    thunks = "".join(path.read_text(errors="replace") for path in dump.glob("*.thunk_sequence.txt"))
    return {
        name: int(size) for name, size in re.findall(r"Kernel.*\] (\S+) grid.*shared_memory: (\d+)", thunks)
    }


def _mosaic_launches(dump: Path) -> dict[str, tuple[int, int]]:
    """Entry function of a Mosaic kernel -> threads of a block, dynamic shared memory."""
    found = {}
    for path in dump.glob("*.mlir-passes.log"):
        text = path.read_text(errors="replace")
        entry = re.search(r"func\.func @(\w+)_mosaic_gpu\(", text)
        launch = _LAUNCH.search(text)
        if entry and launch:
            threads = 1
            for constant in re.findall(r"= %c(\d+)", launch["threads"]):
                threads *= int(constant)
            found[f"{entry[1]}_mosaic_gpu_kernel"] = (threads, int(launch["shared"]))
    return found
