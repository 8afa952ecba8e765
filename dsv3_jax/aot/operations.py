"""The operations that one execution of a TPU program consists of: XLA's own, and Pallas kernels.

On a TPU every operation outside a kernel costs some 1,800 cycles whatever it does, so that a decode step is judged by
how many there are; and a copy of a weight or of a cache, which costs its bytes again, must not be among them.
"""

import dataclasses
from collections.abc import Iterator

from dsv3_jax.aot.hlo_program import VIEWS, Computation, HloOp, HloProgram
from dsv3_jax.aot.hlo_traffic import SLICES, UPDATES, TrafficCounter, is_free
from dsv3_jax.aot.kernels import is_kernel

_MOVING = VIEWS | SLICES | UPDATES.keys() | {"broadcast", "concatenate", "pad", "reverse"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One scheduled operation.

    Attributes:
        name: the instruction's.
        opcode: "fusion", "copy", "sort", ...; "kernel" for a Pallas kernel.
        op_name: the source operation, as a path of JAX's names.
        times: executions, by the trip counts of the loops around it.
        hbm_bytes: read from and written to HBM by one execution; of a kernel, every operand and result in full.
        written_bytes: written by one execution, in any memory.
        written_to_hbm: whether some of that goes to HBM.
        estimated_cycles: the compiler's figure for one execution; 0 where it makes none.
        only_moves: it computes nothing: a copy, another layout or data type, a slice, a gather, an update.
        asynchronous: a transfer that runs beside other operations.
        scalar: its results are single numbers, which the scalar core computes in passing.
    """

    name: str
    opcode: str
    op_name: str
    times: int
    hbm_bytes: int
    written_bytes: int
    written_to_hbm: bool
    estimated_cycles: int
    only_moves: bool
    asynchronous: bool
    scalar: bool


def list_operations(text: str, default_trips: int = 1) -> list[Operation]:
    """All operations of one execution of the optimised program `text`, in the scheduled order.

    Left out is what executes nothing: parameters, constants, bitcasts, tuples and their elements. Of a conditional
    the branch with the most operations counts.

    Args:
        default_trips: trip count of loops that have no constant one.
    """
    program = HloProgram(text)
    return list(_Lister(program, default_trips).operations(program.entry.name, 1, False))


def xla_operations(text: str, default_trips: int = 1) -> list[Operation]:
    """The operations outside kernels that cost their fixed overhead: neither asynchronous nor scalar."""
    operations = list_operations(text, default_trips)
    return [op for op in operations if op.opcode != "kernel" and not op.asynchronous and not op.scalar]


def large_copies(text: str, larger_than_bytes: int, default_trips: int = 1) -> list[Operation]:
    """Operations that only move data, more than `larger_than_bytes` of it in one execution.

    A copy to HBM is a transfer too many, in whatever form: `copy`, a slice of a stack of weights handed to a kernel, a
    weight converted to another data type. One to VMEM may be a prefetch that a later operation would have to make.
    """
    operations = list_operations(text, default_trips)
    return [op for op in operations if op.only_moves and op.written_bytes > larger_than_bytes]


class _Lister:
    def __init__(self, program: HloProgram, default_trips: int):
        self._program = program
        self._default_trips = default_trips
        self._traffic = TrafficCounter(program, default_trips, "operands")

    def operations(self, computation_name: str, times: int, asynchronous: bool) -> Iterator[Operation]:
        computation = self._program.computations[computation_name]
        for op in computation.ops.values():
            if is_free(op):
                continue
            if op.opcode == "while":
                trips = self._program.trips(computation, op)
                trips = self._default_trips if trips is None else trips
                yield from self.operations(op.called("body"), times * trips, asynchronous)
            elif op.opcode == "conditional":
                branches = [list(self.operations(b, times, asynchronous)) for b in self._program.branches(op)]
                yield from max(branches, key=lambda branch: sum(inner.times for inner in branch))
            elif op.kind in ("call", "async"):
                yield from self.operations(op.called(), times, asynchronous or op.kind == "async")
            else:
                yield self._operation(computation, op, times, asynchronous)

    def _operation(self, computation: Computation, op: HloOp, times: int, asynchronous: bool) -> Operation:
        reads, writes = self._traffic.transfers(computation, op)
        kernel = is_kernel(op)
        return Operation(
            name=op.name,
            opcode="kernel" if kernel else op.kind,
            op_name=op.op_name,
            times=times,
            hbm_bytes=round(sum(array.hbm_bytes * part for array, part in reads + writes)),
            written_bytes=round(sum(array.size_bytes * part for array, part in writes)),
            written_to_hbm=any(array.hbm_bytes * part for array, part in writes),
            estimated_cycles=op.estimated_cycles,
            only_moves=self._only_moves(op),
            asynchronous=asynchronous or op.opcode.endswith("-start"),
            scalar=not kernel and all(array.elements <= 1 for array, _ in writes),
        )

    def _only_moves(self, op: HloOp) -> bool:
        if op.opcode != "fusion":
            return op.kind in _MOVING
        parts = [part for part in self._program.computations[op.called()].ops.values() if not is_free(part)]
        arrays = [
            part for part in parts if any(array.elements > 1 for array in part.arrays)
        ]  # not index arithmetic
        return all(self._only_moves(part) for part in arrays)
