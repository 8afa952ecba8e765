"""What the pipeline of a compiled Pallas TPU kernel fetches, read from the kernel itself.

The custom call of a Pallas TPU kernel carries the kernel as MLIR, and with it the grid, the block shapes and the index
maps. The pipeline moves a block of an operand whenever its block index differs from the one of the step before. This
rests on internals of JAX that no release promises to keep; tests/aot holds it against figures counted by hand.
"""

import base64
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_ARITHMETIC = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": lambda a, b: np.trunc(a / b).astype(np.int64),
    "remsi": np.fmod,
    "minsi": np.minimum,
    "maxsi": np.maximum,
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "xori": np.bitwise_xor,
    "select": lambda condition, a, b: np.where(condition.astype(bool), a, b),
} | dict.fromkeys(("index_cast", "extui", "extsi", "trunci"), lambda a: a)
_COMPARISONS = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)
_MAX_STEPS = 4_000_000


@dataclasses.dataclass(frozen=True)
class PallasKernel:
    """The pipeline of one kernel.

    Attributes:
        grid: () for a kernel without one, None if a bound is known at run time only.
        parallel: of every grid dimension, whether its steps may run on different cores.
        moved_elements: of every operand and result, what the pipeline moves; None for an array that the kernel moves
            by hand (`memory_space=ANY`) or whose index map is not understood. A block that hangs over the edge of its
            array counts in full.
    """

    grid: tuple[int, ...] | None
    parallel: tuple[bool, ...]
    moved_elements: tuple[int | None, ...]

    def steps(self, cores: int = 1) -> int | None:
        """Grid steps of the busiest of `cores` cores, over which the first parallel dimension is split."""
        if self.grid is None:
            return None
        bounds = list(self.grid)
        for i, (bound, parallel) in enumerate(zip(self.grid, self.parallel, strict=False)):
            if parallel and bound > 1:
                bounds[i] = -(-bound // cores)
                break
        return math.prod(bounds)


def read_kernel(
    body: str,
    sizes: Sequence[int],
    *,
    scalars: Sequence[np.ndarray] | None = None,
    grid: tuple[int, ...] | None = None,
) -> PallasKernel:
    """Reads a kernel from `body`, the base64 text in its custom call.

    Args:
        sizes: elements of the operands and results.
        scalars: values of the prefetched scalars. Without them an index that is read from one is taken to change
            whenever it is read from another position.
        grid: stands for a grid that is known at run time only.
    """
    module = _parse(body)  # which owns what the functions refer to
    functions = {} if module is None else {f.attributes["sym_name"].value: f for f in module.body.operations}
    unknown = PallasKernel(None, (), (None,) * len(sizes))
    kernel = next((f for f in functions.values() if "scalar_prefetch" in f.attributes), None)
    if kernel is None:
        return unknown
    bounds = tuple(kernel.attributes["iteration_bounds"]) if "iteration_bounds" in kernel.attributes else ()
    if any(bound < 0 for bound in bounds):
        if grid is None:
            return unknown
        bounds = grid
    prefetched = kernel.attributes["scalar_prefetch"].value
    windows = list(kernel.attributes["window_params"]) if "window_params" in kernel.attributes else []
    references = [str(a.type) for a in kernel.regions[0].blocks[0].arguments][len(bounds) + prefetched :]
    moved: list[int | None] = list(sizes)
    for i in range(prefetched, len(sizes)):
        reference, window = references[i - prefetched], windows[i - prefetched] if windows else {}
        if "memory_space<any>" in reference or "memory_space<hbm>" in reference:
            moved[i] = None
        elif "window_bounds" in window:
            index_map = functions[window["transform_indices"].value]
            fetches = _count_fetches(index_map, bounds, scalars)
            moved[i] = None if fetches is None else fetches * math.prod(window["window_bounds"])
    return PallasKernel(bounds, _parallel(kernel), tuple(moved))


def _parse(body: str) -> Any:
    """The MLIR module; None if this version of JAX cannot read it."""
    from jax._src.interpreters.mlir import make_ir_context
    from jax._src.lib import tpu  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

    context = make_ir_context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    try:
        return ir.Module.parse(base64.b64decode(body), context)
    except ir.MLIRError:
        return None


def _parallel(kernel: Any) -> tuple[bool, ...]:
    if "dimension_semantics" not in kernel.attributes:
        return ()
    return tuple("parallel" in str(dimension) for dimension in kernel.attributes["dimension_semantics"])


def _count_fetches(function: Any, grid: tuple[int, ...], scalars: Sequence[np.ndarray] | None) -> int | None:
    """How often the block index changes in the course of the grid, and once more for the first block."""
    if math.prod(grid) > _MAX_STEPS:
        return None
    try:
        index = _block_indices(function, grid, scalars)
    except (KeyError, TypeError):
        return None
    return 1 + int(np.count_nonzero((index[:, 1:] != index[:, :-1]).any(axis=0)))


def _block_indices(function: Any, grid: tuple[int, ...], scalars: Sequence[np.ndarray] | None) -> np.ndarray:
    """Block indices [dimensions, steps] of an index map, evaluated for all steps at once."""
    block = function.regions[0].blocks[0]
    steps = np.indices(grid).reshape(len(grid), -1)
    values: dict[Any, Any] = dict(zip(block.arguments, steps, strict=False))
    references = {argument: i for i, argument in enumerate(list(block.arguments)[len(grid) :])}
    for op in block.operations:
        kind = op.operation.name.split(".")[-1]
        operands: list[Any] = [values.get(operand) for operand in op.operands]
        if kind == "return":
            return np.stack([np.broadcast_to(operand, steps.shape[1:]) for operand in operands])
        if kind == "constant":
            value = np.int64(int(op.attributes["value"].value))
        elif kind == "load":
            value = _load(references[op.operands[0]], operands[1:], scalars)
        elif kind == "cmpi":
            value = _COMPARISONS[op.attributes["predicate"].value](*operands).astype(np.int64)
        else:
            value = _ARITHMETIC[kind](*operands)
        values[op.results[0]] = value
    raise KeyError("index map without return")


def _load(reference: int, position: list, scalars: Sequence[np.ndarray] | None) -> np.ndarray:
    """A prefetched scalar; where its value is not known, a code of its position."""
    if scalars is not None:
        return np.asarray(scalars[reference]).astype(np.int64)[tuple(position)]
    code = sum(part * 1_000_003**i for i, part in enumerate(position))
    return np.asarray(code + (reference + 1) * 2**40)
