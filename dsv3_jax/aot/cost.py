"""How good a compiled TPU program is, with no TPU present.

    mesh = topology_mesh("v5e:8x8", (8, 8), ("data", "tensor"))
    with jax.set_mesh(mesh):
        cost = analyse(jax.jit(step).lower(*abstract_arguments).compile())
    print(cost.hbm_bytes, cost.collectives, predict_seconds(cost, "v5e"))

All figures are per device and per execution. They come from the production compiler, but nothing has been executed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

import jax

from dsv3_jax.aot.hlo_traffic import KernelBytes, count_traffic
from dsv3_jax.aot.topology import CHIPS

TOP_SOURCES = 8


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes, counts and compiler-estimated cycles of one execution on one device.

    Attributes:
        argument_bytes, output_bytes, temp_bytes, peak_bytes: the compiler's memory plan.
        hbm_read_bytes, hbm_write_bytes: arrays that the optimised HLO places in HBM, with tile padding. An operand
            that a fusion only slices or gathers counts the slice, an update in place counts the update; a loop body
            counts once per trip, a conditional its dearest branch. Every operand is taken to be read once: a matmul
            that re-reads moves more.
        custom_call_operand_bytes: HBM bytes of custom calls with every operand and result in full.
        estimated_cycles: the compiler's figures for fusions and copies, each with about 2,000 cycles of fixed
            overhead; there are none for kernels and collectives.
        collectives: kind -> executed "count", "payload_bytes" (the larger of operands and results) and "wire_bytes"
            (what a device sends under a ring algorithm).
        kernels: name -> figures of a Pallas kernel, summed over its calls. "operand_bytes": all operands and results
            in full, far too much for a kernel that indexes into a stack. "block_bytes": from grid, block shapes and
            index maps of the compiled kernel; None if it moves HBM data by hand or has a dynamic grid.
            "claimed_bytes": the author's `pl.CostEstimate`, which nothing checks, less the operands that the compiler
            has placed in VMEM. "grid_steps", "calls".
        unknown_trip_counts: loops whose trip count is no constant of the program.
        top_hbm: the dearest source operations and their HBM bytes.
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int
    hbm_read_bytes: int
    hbm_write_bytes: int
    custom_call_operand_bytes: int
    estimated_cycles: int
    collectives: dict[str, dict[str, int | None]]
    kernels: dict[str, dict[str, int | None]]
    unknown_trip_counts: list[str]
    top_hbm: dict[str, int]

    @property
    def hbm_bytes(self) -> int:
        """Read and written."""
        return self.hbm_read_bytes + self.hbm_write_bytes


def analyse(
    compiled: jax.stages.Compiled, *, kernel_bytes: KernelBytes = "claimed", default_trips: int = 1
) -> Cost:
    """What one execution of a program compiled for TPU costs on one device.

    Args:
        kernel_bytes: which figure of a Pallas kernel enters the HBM bytes: "claimed" takes its claim, failing that
            its blocks, failing that its operands; "blocks" ignores claims; "operands" takes the crudest one.
        default_trips: trip count of loops that have no constant one.

    Raises:
        ValueError: `kernel_bytes` is none of the three.
    """
    if kernel_bytes not in get_args(KernelBytes):
        raise ValueError(f"kernel_bytes {kernel_bytes!r}; expected one of {', '.join(get_args(KernelBytes))}")
    traffic = count_traffic(compiled.as_text() or "", default_trips, kernel_bytes)
    memory: Any = compiled.memory_analysis()
    return Cost(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        hbm_read_bytes=round(traffic.figures["read_bytes"]),
        hbm_write_bytes=round(traffic.figures["write_bytes"]),
        custom_call_operand_bytes=round(traffic.figures["custom_call_bytes"]),
        estimated_cycles=round(traffic.figures["cycles"]),
        collectives=_grouped(traffic.collectives),
        kernels=_grouped(traffic.kernels),
        unknown_trip_counts=sorted(traffic.unknown_loops),
        top_hbm={name: round(value) for name, value in _dearest(traffic.sources)},
    )


def _dearest(sources: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(sources.items(), key=lambda item: -item[1])[:TOP_SOURCES]


def _grouped(counts: Mapping[tuple[str, str], float]) -> dict[str, dict[str, int | None]]:
    """(name, figure) -> value as nested dicts; None for NaN."""
    groups: dict[str, dict[str, int | None]] = {}
    for (name, figure), value in counts.items():
        groups.setdefault(name, {})[figure] = None if math.isnan(value) else round(value)
    return groups


def predict_seconds(
    cost: Cost,
    chip_name: str,
    *,
    collective_latency_s: float = 15e-6,
    ici_bytes_per_s: float | None = None,
    kernel_hbm_bytes: dict[str, float] | None = None,
    kernel_bundles: dict[str, float] | None = None,
) -> float:
    """XLA's cycles, kernels and collectives, one after the other: to compare programs with, never a measurement.

    XLA's operations take the compiler's cycles, which contain their own HBM time. A kernel, which has none, takes the
    larger of its HBM time at the chip's peak (its blocks, failing that its claim, failing that its operands) and its
    issue time. The larger of the HBM and the cycle total instead of this sum would forgive a kernel-heavy program its
    XLA operations.

    Args:
        chip_name: one of `CHIPS`.
        collective_latency_s: of every collective, to which wire_bytes / ici_bytes_per_s is added where that is given.
        kernel_hbm_bytes: name -> bytes of all executions, where they depend on data, such as the experts chosen.
        kernel_bundles: name -> bundles that one core issues in all executions (`kernel_schedule`).
    """
    chip = CHIPS[chip_name]
    seconds = cost.estimated_cycles / chip.clock_hz
    for name, kernel in cost.kernels.items():
        figures = (kernel.get(key) for key in ("block_bytes", "claimed_bytes", "operand_bytes"))
        moved = (kernel_hbm_bytes or {}).get(name, next(figure for figure in figures if figure is not None))
        issued = (kernel_bundles or {}).get(name, 0)
        seconds += max(moved / chip.hbm_bytes_per_s, issued / chip.clock_hz)
    for collective in cost.collectives.values():
        seconds += (collective["count"] or 0) * collective_latency_s
        if ici_bytes_per_s:
            seconds += (collective["wire_bytes"] or 0) / ici_bytes_per_s
    return seconds
