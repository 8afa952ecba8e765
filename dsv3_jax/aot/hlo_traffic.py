"""What a compiled TPU program moves: bytes, cycles, collectives and kernels of one execution on one device."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from typing import Any, Literal

from dsv3_jax.aot.hlo_program import VIEWS, Computation, HloArray, HloOp, HloProgram
from dsv3_jax.aot.kernels import is_kernel, read_call

KernelBytes = Literal["claimed", "blocks", "operands"]
Sums = defaultdict[Any, float]
Transfer = tuple[HloArray, float]
"""An array, and which part of it is moved (0 to 1)."""

SLICES = frozenset({"dynamic-slice", "slice", "gather"})
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcode -> which operand is the update."""
FREE = frozenset(
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"}
    | {"replica-id", "opt-barrier", "add-dependency", "copy-done", "async-update"}
)
FREE_TARGETS = frozenset(
    {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}
    | {"PrepareAsyncCallStart", "PrepareAsyncCallDone"}
)
WIRE = {
    "all-reduce": lambda operand, result, n: 2 * operand * (n - 1) / n,
    "reduce-scatter": lambda operand, result, n: operand * (n - 1) / n,
    "all-gather": lambda operand, result, n: result * (n - 1) / n,
    "all-to-all": lambda operand, result, n: operand * (n - 1) / n,
    "ragged-all-to-all": lambda operand, result, n: operand * (n - 1) / n,
    "collective-permute": lambda operand, result, n: operand,
}
"""Collective -> bytes that one of n devices sends under a ring algorithm, by bytes of its operands and results."""


def is_free(op: HloOp) -> bool:
    """Whether nothing is executed for `op`, or all of it with the operation that started it."""
    return op.opcode in FREE or op.opcode.endswith("-done") or op.target in FREE_TARGETS


@dataclasses.dataclass
class Traffic:
    """Sums over one execution; `dsv3_jax.aot.cost.Cost` has the rules.

    Attributes:
        figures: "read_bytes", "write_bytes": HBM; "custom_call_bytes": all operands and results of custom calls in
            full; "cycles": the compiler's estimates.
        collectives: (kind, "count" | "payload_bytes" | "wire_bytes") -> sum.
        kernels: (kernel, "calls" | "grid_steps" | "operand_bytes" | "block_bytes" | "claimed_bytes") -> sum;
            NaN where one of the calls does not tell.
        unknown_loops: loops without a constant trip count.
        sources: source operation -> HBM bytes.
    """

    figures: Sums = dataclasses.field(default_factory=lambda: defaultdict(float))
    collectives: Sums = dataclasses.field(default_factory=lambda: defaultdict(float))
    kernels: Sums = dataclasses.field(default_factory=lambda: defaultdict(float))
    unknown_loops: Sums = dataclasses.field(default_factory=lambda: defaultdict(float))
    sources: Sums = dataclasses.field(default_factory=lambda: defaultdict(float))

    @property
    def hbm_bytes(self) -> float:
        """Read and written."""
        return self.figures["read_bytes"] + self.figures["write_bytes"]

    def add(self, other: "Traffic", times: int = 1) -> None:
        """Adds `times` executions of `other`."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            for key, value in theirs.items():
                mine[key] += value * times


class TrafficCounter:
    """Adds up what computations of a program cost."""

    def __init__(self, program: HloProgram, default_trips: int, kernel_bytes: KernelBytes):
        self._program = program
        self._default_trips = default_trips
        self._kernel_bytes: KernelBytes = kernel_bytes
        self.of_computation = functools.cache(self._of_computation)

    def _of_computation(self, name: str) -> Traffic:
        """One execution of the computation `name`."""
        computation, total = self._program.computations[name], Traffic()
        for op in computation.ops.values():
            if not is_free(op):
                self._add(total, computation, op)
        return total

    def _add(self, total: Traffic, computation: Computation, op: HloOp) -> None:
        if op.opcode == "while":
            trips = self._program.trips(computation, op)
            if trips is None:
                total.unknown_loops[op.name] += 1
            body = self.of_computation(op.called("body"))
            total.add(body, self._default_trips if trips is None else trips)
        elif op.opcode == "conditional":
            branches = [self.of_computation(branch) for branch in self._program.branches(op)]
            total.add(max(branches, key=lambda branch: branch.hbm_bytes))
        elif op.kind in ("call", "async"):
            total.add(self.of_computation(op.called()))
        else:
            total.add(self._of_operation(computation, op))

    def _of_operation(self, computation: Computation, op: HloOp) -> Traffic:
        reads, writes = self.transfers(computation, op)
        read, write = _hbm_bytes(reads), _hbm_bytes(writes)
        total = Traffic()
        if is_kernel(op):
            self._add_kernel(total, computation, op, read, write)
        else:
            total.figures |= {"read_bytes": read, "write_bytes": write, "cycles": op.estimated_cycles}
            if op.opcode == "custom-call":
                total.figures["custom_call_bytes"] = read + write
            self._add_collectives(total, computation, op)
        total.sources[op.op_name] = total.hbm_bytes
        return total

    def transfers(self, computation: Computation, op: HloOp) -> tuple[list[Transfer], list[Transfer]]:
        """What `op` reads and writes: of an operand only sliced the slice, of an update in place the update."""
        reads, writes = [], []
        for i, array in enumerate(computation.operand_arrays(op)):
            if op.opcode in VIEWS or not array.hbm_bytes:
                used = array.elements
            elif op.opcode in UPDATES and i == 0:
                used = 0
            else:
                used = self._used(computation, op, i, array.elements)
            reads.append((array, min(1, used / max(1, array.elements))))
        inner = self._program.computations[op.called()] if op.opcode == "fusion" else computation
        sources = inner.roots() if op.opcode == "fusion" else [op] * len(op.arrays)
        started = (
            op.opcode == "fusion" and _async_stage(inner) == "Start"
        )  # the result repeats the operand first
        for array, source in zip(op.arrays[1:2] if started else op.results(), sources, strict=False):
            written = array.elements
            if source.opcode in UPDATES:
                written = inner.ops[source.operands[UPDATES[source.opcode]]].arrays[0].elements
            elif op.opcode == "fusion" and _passes(inner, inner.root, source):
                written = 0
            writes.append((array, min(1, written / max(1, array.elements))))
        return reads, writes

    def _used(self, computation: Computation, user: HloOp, i: int, full: int) -> int:
        """How many of the `full` elements of its operand i the operation `user` reads."""
        if user.kind in SLICES and i == 0:
            return user.results()[0].elements
        if _passes(computation, user, computation.ops[user.operands[i]]):
            return 0
        if user.opcode in UPDATES and i == 0 and user in computation.roots():
            return 0
        if user.opcode == "fusion":
            inner = self._program.computations[user.called()]
            if not all(op.opcode in VIEWS or op.opcode == "parameter" for op in inner.ops.values()):
                return self._read(inner, inner.parameter(i).name, full)
        elif user.opcode not in VIEWS:
            return full
        return self._read(computation, user.name, full)

    def _read(self, computation: Computation, name: str, full: int) -> int:
        total = sum(self._used(computation, user, i, full) for user, i in computation.users[name])
        return min(full, total + full * (computation.root.name == name))

    def _add_collectives(self, total: Traffic, computation: Computation, op: HloOp) -> None:
        fused = self._program.computations[op.called()] if op.opcode == "fusion" else None
        inner = fused or computation
        for part in fused.ops.values() if fused else [op]:
            if part.kind not in WIRE or _async_stage(inner) not in (None, "Start"):
                continue
            kind = "reduce-scatter" if "all-reduce-scatter" in inner.name else part.kind
            operands = inner.operand_arrays(part)
            if kind == "ragged-all-to-all":  # then come offsets and sizes
                operands = operands[:1]
            sent = sum(array.size_bytes for array in operands)
            received = sum(array.size_bytes for array in part.results())
            total.collectives[kind, "count"] += 1
            total.collectives[kind, "payload_bytes"] += max(sent, received)
            total.collectives[kind, "wire_bytes"] += WIRE[kind](sent, received, _group_size(part))

    def _add_kernel(
        self, total: Traffic, computation: Computation, op: HloOp, read: float, write: float
    ) -> None:
        call = read_call(computation, op)
        moved = {"blocks": (call.read_bytes, call.write_bytes), "operands": (read, write)}
        figures = {
            "calls": 1,
            "grid_steps": math.nan if call.pipeline.grid is None else math.prod(call.pipeline.grid),
            "operand_bytes": read + write,
            "block_bytes": call.read_bytes + call.write_bytes,
        }
        if call.claimed_bytes is not None:
            figures["claimed_bytes"] = call.claimed_bytes
            share = call.claimed_bytes / max(1, read + write)
            moved["claimed"] = (share * read, share * write)
        order: tuple[KernelBytes, ...] = ("claimed", "blocks", "operands")
        candidates = [moved[key] for key in order[order.index(self._kernel_bytes) :] if key in moved]
        read_bytes, write_bytes = next(pair for pair in candidates if not math.isnan(sum(pair)))
        total.figures |= {
            "read_bytes": read_bytes,
            "write_bytes": write_bytes,
            "custom_call_bytes": read + write,
        }
        total.kernels |= {(call.name, figure): value for figure, value in figures.items()}


def _hbm_bytes(transfers: list[Transfer]) -> float:
    return sum(array.hbm_bytes * part for array, part in transfers)


def _async_stage(fused: Computation) -> str | None:
    """Which part of a collective a fusion runs, when one is spread over several: "Start", "Step" or "Done".

    All of them name the collective, which counts once, with the first.
    """
    stages = [
        op.attribute(r'target="AsyncCollective(\w+)"')
        for op in fused.ops.values()
        if op.opcode == "custom-call"
    ]
    by_name = "Step" if fused.name.startswith("async_collective_fusion") else None
    return next((stage for stage in stages if stage), by_name)


def _passes(fused: Computation, user: HloOp, value: HloOp) -> bool:
    """Whether `value` goes through the fusion untouched: a parameter returned, or the state of a collective."""
    if _async_stage(fused) in ("Step", "Done") and any(
        op.kind in WIRE or op.kind == "custom-call" for op in (user, value)
    ):
        return True
    return user.opcode == "tuple" and user is fused.root and value.opcode == "parameter"


def _group_size(op: HloOp) -> int:
    """Devices that take part in one collective."""
    if listed := op.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return listed.count(",") + 1
    if axes := op.attribute(
        r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}"
    ):  # 'a' is an axis, 'a':(2)4 a part of one
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", op.attributes))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or sizes[name]) for name, part in parts)
    return int(op.attribute(r"replica_groups=\[\d+,(\d+)\]") or 1)


def count_traffic(text: str, default_trips: int = 1, kernel_bytes: KernelBytes = "claimed") -> Traffic:
    """One execution of the optimised program `text`; `dsv3_jax.aot.cost.analyse` describes the arguments."""
    program = HloProgram(text)
    return TrafficCounter(program, default_trips, kernel_bytes).of_computation(program.entry.name)
