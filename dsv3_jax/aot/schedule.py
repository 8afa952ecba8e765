"""The instruction schedule of a Pallas TPU kernel, from the compiler's dump of its low-level code (LLO).

A VLIW bundle issues in one cycle, so bundles times executions are the cycles of a kernel that never waits. The dump is
static: a loop stands there once, and its body has to be multiplied by its trips. A bundle counts whether or not a
predicate or a branch (`pl.when`) skips it, which makes the total an upper bound of what is issued.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s+(>*)")
_BACK_EDGE = re.compile(r"sbr\.rel \(!%([^)\s]+)\) target = \$region(\d+)")


def llo_dump_environment(dump_dir: str | Path) -> dict[str, str]:
    """The variables that make libtpu write its final schedules to `dump_dir`, some MB a kernel.

    They count if set before libtpu is loaded, hence best for a new process.
    """
    flags = f"--xla_jf_dump_to={Path(dump_dir).resolve()} --xla_jf_dump_llo_text=true"
    flags += " --xla_jf_dump_llo_pass_label_regex=final_.*"  # all passes would be five times as much
    return {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel, or the code outside all loops.

    Attributes:
        parent: index of the loop around it in `KernelSchedule.loops`; None for the code outside.
        bundles, spills, fills: of its body without the loops in it; spills and fills are vector registers stored to
            and loaded from VMEM for want of registers.
        trips: as the compiled code has them; None where they are no constant or not understood.
        is_edge_copy: the compiler's own loop that copies what lies inside the array of a block that hangs over its
            edge. It takes a trip for 64 vector registers, and is counted as one.
    """

    parent: int | None
    bundles: int
    spills: int
    fills: int
    trips: int | None
    is_edge_copy: bool = False


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """A kernel's loops in the order of the compiled code; the first is the code outside all loops, taken once."""

    loops: tuple[Loop, ...]

    @property
    def bundles(self) -> int:
        """Static bundles: every loop once."""
        return sum(loop.bundles for loop in self.loops)

    @property
    def spills(self) -> int:
        """In all places."""
        return sum(loop.spills for loop in self.loops)

    @property
    def fills(self) -> int:
        """In all places."""
        return sum(loop.fills for loop in self.loops)

    def inner_loops(self, grid_steps: int) -> list[int]:
        """Indices of the kernel's own loops inside one grid step."""
        grid_loop = self._grid_loop(grid_steps)
        return [i for i, loop in enumerate(self.loops) if i not in (0, grid_loop) and not loop.is_edge_copy]

    def working_loops(self, grid_steps: int) -> list[Loop]:
        """The loops inside a grid step; where there are none the grid's, failing that the whole kernel."""
        inner = [self.loops[i] for i in self.inner_loops(grid_steps)]
        return inner or [self.loops[self._grid_loop(grid_steps) or 0]]

    def issued(self, grid_steps: int, trips: Sequence[float] = (), *, core_steps: int | None = None) -> int:
        """Bundles that a core issues, with the loops multiplied out.

        Args:
            grid_steps: of all cores; 1 for a kernel without a grid.
            trips: of the loops inside a grid step, in order, on an average of all steps; a loop inside another counts
                its own trips only. May be left out where the compiled code has them all as constants.
            core_steps: those grid steps that fall to the core; all of them if None.

        Raises:
            ValueError: the trips are not as many as the loops, are more than the compiled code has, or are missing.
        """
        inner, grid_loop = self.inner_loops(grid_steps), self._grid_loop(grid_steps)
        if trips and len(trips) != len(inner):
            raise ValueError(f"{len(trips)} trip counts for {len(inner)} loops: {self.loops}")
        given = dict(zip(inner, trips, strict=True)) if trips else {}
        executions: list[float] = [1]
        for i, loop in enumerate(self.loops[1:], 1):
            if i == grid_loop:
                times = grid_steps if core_steps is None else core_steps
            elif loop.is_edge_copy:
                times = 1
            else:
                times = given.get(i, loop.trips)
                if times is None:
                    raise ValueError(f"loop {inner.index(i)} of {len(inner)} has no constant trip count")
                if loop.trips is not None and times > loop.trips:  # it may be less: steps can skip the loop
                    raise ValueError(
                        f"loop {inner.index(i)} of {len(inner)} has {loop.trips} trips, given as {times}"
                    )
            executions.append(times * executions[loop.parent or 0])
        return round(sum(loop.bundles * times for loop, times in zip(self.loops, executions, strict=True)))

    def _grid_loop(self, grid_steps: int) -> int | None:
        """The loop over grid steps; a grid of one step has none."""
        return next((i for i, loop in enumerate(self.loops) if loop.parent == 0 and grid_steps > 1), None)


def kernel_schedule(dump_dir: str | Path, name: str) -> KernelSchedule:
    """The schedule of the kernel `name` (its `pallas_call(name=...)`) in a dump; of several copies the longest.

    Raises:
        FileNotFoundError: the dump has no such kernel.
    """
    pattern = re.compile(rf"(\d+-{re.escape(name)}(?:\.\d+)?-)\d+-final_bundles\.txt")
    files = {path.name: path for path in Path(dump_dir).iterdir()}
    schedules = []
    for file_name, path in files.items():
        if found := pattern.fullmatch(file_name):
            utilization = re.compile(
                re.escape(found[1]) + r"\d+-final_hlo-static-per-bundle-utilization\.txt"
            )
            beside = next(other for other in files if utilization.fullmatch(other))
            schedules.append(_read_schedule(path.read_text(), files[beside].read_text()))
    if not schedules:
        raise FileNotFoundError(f"no final schedule of a kernel named {name!r} in {dump_dir}")
    return max(schedules, key=lambda schedule: schedule.bundles)


def _read_schedule(code: str, utilization: str) -> KernelSchedule:
    lines = [line for line in code.splitlines() if _BUNDLE.match(line)]
    registers = _spills_and_fills(utilization)
    if len(lines) != len(registers):
        raise ValueError(f"{len(lines)} bundles, but {len(registers)} rows of their utilization")
    back_edges = _back_edges(lines)
    parents: list[int | None] = [None]
    counts: list[list[int]] = [[0, 0, 0]]
    trips: list[int | None] = [1]
    edge_copies = [False]
    stack, ends = [0], [len(lines)]
    for i, (line, (spills, fills)) in enumerate(zip(lines, registers, strict=True)):
        mark, depth = _BUNDLE.match(line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        depth = len(depth)
        if mark == "LB":
            del stack[depth:], ends[depth:]
            end, predicate = back_edges.get(i, (i, ""))
            parents.append(stack[-1])
            counts.append([0, 0, 0])
            trips.append(_trips(code, predicate))
            edge_copies.append(_is_edge_copy(lines[i : end + 1], code, predicate))
            stack.append(len(parents) - 1)
            ends.append(end)
        # Predicated parts of a loop may be marked as if they stood outside.
        inside = max(level for level, end in enumerate(ends) if level == 0 or i <= end)
        count = counts[stack[min(max(depth, inside), len(stack) - 1)]]
        for k, amount in enumerate((1, spills, fills)):
            count[k] += amount
    loops = zip(parents, counts, trips, edge_copies, strict=True)
    return KernelSchedule(
        tuple(Loop(parent, count[0], count[1], count[2], trip, copy) for parent, count, trip, copy in loops)
    )


def _spills_and_fills(utilization: str) -> list[tuple[int, int]]:
    """Of every bundle."""
    lines = utilization.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("== UTILIZATION"))
    units = [unit.strip() for unit in lines[1].split(",")]
    spill, fill = units.index("VSTORE:SPILL"), units.index("VLOAD:FILL")
    rows = [list(map(int, line.split())) for line in lines[start + 1 :] if line.strip()]
    return [(row[spill], row[fill]) for row in rows]


def _back_edges(lines: list[str]) -> dict[int, tuple[int, str]]:
    """Bundle that begins a loop -> bundle that branches back to it, and the predicate that ends the loop."""
    begins = {
        region: i
        for i, line in enumerate(lines)
        if " LB:" in line
        for region in re.findall(r"Start region (\d+)", line)
    }
    edges = {}
    for i, line in enumerate(lines):
        for predicate, region in _BACK_EDGE.findall(line):
            if region in begins and begins[region] < i:
                edges[begins[region]] = (i, predicate)
    return edges


def _is_edge_copy(body: list[str], code: str, predicate: str) -> bool:
    """Only loads and stores, and not ended by a test that stems from a loop of the kernel."""
    operations = {found for line in body for found in re.findall(r"(?:= |\{ |;;  )(?:\S+ = )?(v\w+)", line)}
    own = re.search(rf"%{re.escape(predicate)} = [^;}}]*/\* loop exit test \*/", code)
    return own is None and {"vld", "vst"} <= operations <= {"vld", "vst", "vmov"}


def _trips(code: str, predicate: str) -> int | None:
    """Trips of a loop that ends when `predicate` holds: a counter that grows by a constant, between constants."""
    number, guard = r"(-?\d+)\b", r"(?:\(!?%\S+\), )?"

    def definition(name: str, pattern: str) -> re.Match | None:
        return re.search(rf"%{re.escape(name)} = {pattern}", code)

    def origin(name: str) -> str:
        if copied := definition(name, rf"smov {guard}%(\w+)"):
            return origin(copied[1])
        if loaded := definition(name, r"sld \[smem:\[(#allocation\d+_spill)\]\]"):
            store = rf"sst \[smem:\[{loaded[1]}\]\] %(\w+)"
            stored = [found[1] for found in re.finditer(store, code[: loaded.start()])]
            return origin(stored[-1]) if stored else name
        return name

    test = predicate and definition(predicate, rf"scmp\.ge\.s32\.totalorder {guard}%(\w+), {number}")
    update = test and definition(origin(test[1]), rf"sadd\.s32 {guard}{number}, %(\w+)")
    phi = update and definition(origin(update[2]), r"sphi %(\w+), %\w+")
    start = phi and definition(origin(phi[1]), rf"smov {guard}{number}")
    if not (test and update and start):
        return None
    return len(range(int(start[1]), int(test[2]), int(update[1])))
