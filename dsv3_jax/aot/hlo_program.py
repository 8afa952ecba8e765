"""Optimised HLO text of a TPU program, parsed: arrays with their memories, operations, computations, loop trips."""

import dataclasses
import functools
import math
import re

VIEWS = frozenset({"bitcast", "copy", "reshape", "transpose", "convert"})
"""Inside a fusion: the same elements, seen otherwise."""


@dataclasses.dataclass(frozen=True)
class HloArray:
    """One array of a result.

    Attributes:
        elements: without padding.
        hbm_bytes: with tile padding; 0 if the array lies in another memory.
        size_bytes: without padding, in any memory.
    """

    elements: int
    hbm_bytes: float
    size_bytes: float


@functools.cache
def parse_array(dtype: str, dimensions: str, layout: str) -> HloArray:
    """The array `dtype[dimensions]{layout}`, such as `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`."""
    sizes = [int(size.lstrip("<=")) for size in dimensions.split(",") if size]
    order, _, rest = layout.partition(":")
    padded = [sizes[int(i)] for i in reversed(order.split(","))] if order else list(sizes)
    if tile := re.match(r"T\(([\d,]+)\)", rest):
        tiles = [int(size) for size in tile[1].split(",")]
        padded = [1] * (len(tiles) - len(padded)) + padded
        for i, size in enumerate(reversed(tiles), 1):
            padded[-i] = -(-padded[-i] // size) * size
    width = re.match(r"[a-z]+(\d+)", dtype)
    item_bytes = int(width[1]) / 8 if width else float(dtype == "pred")
    in_hbm = "S(" not in rest  # S(1) is VMEM, S(2) and S(6) hold scalars, S(5) is host memory
    return HloArray(math.prod(sizes), math.prod(padded) * item_bytes * in_hbm, math.prod(sizes) * item_bytes)


@dataclasses.dataclass(frozen=True)
class HloOp:
    """One instruction.

    Attributes:
        arrays: the leaves of the result.
        operands: names.
        argument: what stands between the opcode's parentheses.
        attributes: what follows them.
    """

    name: str
    opcode: str
    arrays: tuple[HloArray, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str

    @property
    def kind(self) -> str:
        """The opcode, the same for the start of an asynchronous operation."""
        return self.opcode.removesuffix("-start")

    @property
    def target(self) -> str | None:
        """Of a custom call; "tpu_custom_call" is a Pallas kernel."""
        return self.attribute(r'target="(\w+)"')

    @property
    def op_name(self) -> str:
        """The source operation, as a path of JAX's names; the instruction's own name if there is none."""
        return self.attribute(r'op_name="([^"]*)"') or self.name

    @property
    def estimated_cycles(self) -> int:
        """The compiler's figure; 0 where it makes none, as for kernels and collectives."""
        return int(self.attribute(r'"estimated_cycles":"(\d{1,12})"') or 0)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self, key: str = "(?:calls|to_apply)") -> str:
        """Name of the computation called."""
        name = self.attribute(rf"\b{key}=%([^\s,]+)")
        if name is None:
            raise ValueError(f"{self.name} calls no computation by {key}")
        return name

    def results(self) -> tuple[HloArray, ...]:
        """The arrays produced; the result of a start operation also repeats its operands and holds a context."""
        if self.opcode == "copy-start":
            return self.arrays[:1]
        if self.opcode.endswith("-start") and self.opcode != "all-reduce-start":
            return self.arrays[len(self.operands) : 2 * len(self.operands)]
        return self.arrays


def _parse_op(name: str, text: str) -> HloOp:
    def closing(start: int) -> int:
        depth = 0
        for bracket in re.compile(r"[()]").finditer(text, start):
            depth += 1 if bracket[0] == "(" else -1
            if depth == 0:
                return bracket.start()
        raise ValueError(f"unbalanced HLO: {text[:120]}")

    end = closing(0) + 1 if text[0] == "(" else text.index(" ")
    opening = text.index("(", end)
    argument, attributes = text[opening + 1 : closing(opening)], text[closing(opening) + 1 :]
    arrays = re.findall(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?", text[:end])
    operands = tuple(re.findall(r"%([^\s,()]+)", argument))
    parsed = tuple(parse_array(*array) for array in arrays)
    return HloOp(name, text[end:opening].strip(), parsed, operands, argument, attributes)


class Computation:
    """Operations by name, in the scheduled order; `root` is the result."""

    def __init__(self, name: str):
        self.name = name
        self.ops: dict[str, HloOp] = {}
        self.root: HloOp

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[HloOp, int]]]:
        """Operation name -> who uses it, and as which operand."""
        users: dict[str, list[tuple[HloOp, int]]] = {name: [] for name in self.ops}
        for op in self.ops.values():
            for i, operand in enumerate(op.operands):
                users[operand].append((op, i))
        return users

    def source(self, name: str) -> HloOp:
        """The operation behind any views."""
        op = self.ops[name]
        return self.source(op.operands[0]) if op.opcode in VIEWS else op

    def roots(self) -> list[HloOp]:
        """What the parts of the result come from, behind any views."""
        names = self.root.operands if self.root.opcode == "tuple" else (self.root.name,)
        return [self.source(name) for name in names]

    def operand_arrays(self, op: HloOp) -> tuple[HloArray, ...]:
        """The leaves of all operands."""
        return tuple(array for name in op.operands for array in self.ops[name].arrays)

    def parameter(self, index: int) -> HloOp:
        """The parameter of that number."""
        return next(op for op in self.ops.values() if op.opcode == "parameter" and op.argument == str(index))


class HloProgram:
    """All computations of an optimised program (`jax.stages.Compiled.as_text`)."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry: Computation
        self._loops: dict[str, tuple[Computation, HloOp]] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
                computation = self.computations[header[2]] = Computation(header[2])
                if header[1]:
                    self.entry = computation
            elif found := re.match(r"\s+(ROOT )?%(\S+) = ", line):
                op = computation.ops[found[2]] = _parse_op(found[2], line[found.end() :])
                if found[1]:
                    computation.root = op
                if op.opcode == "while":
                    self._loops[op.called("body")] = self._loops[op.called("condition")] = (computation, op)

    def branches(self, op: HloOp) -> list[str]:
        """Names of the computations that a `conditional` chooses from."""
        names = re.findall(r"%([^\s,{}]+)", op.attribute(r"((?:branch|true)_comp.*)") or "")
        return [name for name in names if name in self.computations]

    def trips(self, computation: Computation, loop: HloOp) -> int | None:
        """How often the body of `loop`, an operation of `computation`, runs; None if that is no constant.

        libtpu prints no trip count: counter and limit are followed through the loop's state to integers.
        """
        if known := loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"'):
            return int(known)
        body, test = (self.computations[loop.called(key)] for key in ("body", "condition"))
        if test.root.opcode != "compare" or body.root.opcode != "tuple":
            return None
        for counter, limit in (test.root.operands, test.root.operands[::-1]):
            k, stop = self._carried(test, test.source(counter)), self._integer(test, limit)
            if k is None or stop is None:
                continue
            start, update = self._initial(computation, loop, k), body.source(body.root.operands[k])
            steps = [step for step in (self._integer(body, name) for name in update.operands) if step]
            if start is not None and update.opcode == "add" and len(steps) == 1:
                inclusive = test.root.attribute(r"direction=(\w\w)") in ("LE", "GE")
                return len(range(start, stop + inclusive * (1 if steps[0] > 0 else -1), steps[0]))
        return None

    def _carried(self, computation: Computation, op: HloOp) -> int | None:
        """k if `op` is element k of the state of the loop whose body or condition `computation` is."""
        if computation.name not in self._loops or op.opcode != "get-tuple-element":
            return None
        index = op.attribute(r"index=(\d+)")
        is_state = computation.ops[op.operands[0]].opcode == "parameter"
        return int(index) if is_state and index else None

    def _initial(self, computation: Computation, loop: HloOp, k: int) -> int | None:
        state = computation.ops[loop.operands[0]]
        return self._integer(computation, state.operands[k]) if state.opcode == "tuple" else None

    def _integer(self, computation: Computation, name: str) -> int | None:
        op = computation.source(name)
        if op.opcode == "constant":
            return int(op.argument) if re.fullmatch(r"-?\d+", op.argument) else None
        k = self._carried(computation, op)
        if k is None:
            return None
        outer, loop = self._loops[computation.name]
        body = self.computations[loop.called("body")]
        if body.root.opcode != "tuple" or self._carried(body, body.source(body.root.operands[k])) != k:
            return None  # the loop changes it
        return self._initial(outer, loop, k)
