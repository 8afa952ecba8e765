"""Schedules of compiled kernels: loops, grids, cores."""

import pytest

from dsv3_jax.aot import CHIPS, kernel_schedule
from dsv3_jax.aot.schedule import KernelSchedule, Loop
from tests.aot.programs import INNER, LAYERS, OUTER, WIDTH

HOSTS = [chip.host for chip in CHIPS.values()]


@pytest.mark.parametrize("topology", HOSTS)
def test_grid_multiplies(measure, topology: str) -> None:
    cost = measure("scan_of_indexing_kernels", topology, schedules=True)
    schedule, steps = cost["schedules"]["matmul"], (WIDTH // 512) * (WIDTH // 1024)
    assert cost["kernels"]["matmul"]["grid_steps"] == LAYERS * steps
    assert schedule["spills"] == schedule["fills"] == 0
    assert 100 < schedule["bundles"] < 1000
    # Nearly all of the kernel is its grid loop; the parallel dimension, 24 columns, halves on two cores.
    assert 0.8 * steps * schedule["bundles"] < schedule["issued"] <= steps * schedule["bundles"]
    assert schedule["issued_by_one_of_two_cores"] == pytest.approx(schedule["issued"] / 2, rel=0.02)


@pytest.mark.parametrize("topology", HOSTS)
def test_loops_multiply(measure, topology: str) -> None:
    looped = measure("looped_sums", topology, schedules=True)["schedules"]["looped_sums"]
    rolled = measure("rolled_sums", topology, schedules=True)["schedules"]["rolled_sums"]
    assert looped["trips"] == [OUTER, INNER]
    assert rolled["trips"] == [OUTER, 2 * INNER]
    assert rolled["bundles"] < looped["bundles"]
    # The same work: half as much in a trip of the inner loop, which is left out of the wider loop's latency.
    assert looped["issued"] <= rolled["issued"] < 2 * looped["issued"]


def test_vmem_is_what_the_blocks_need(measure) -> None:
    call = measure("looped_sums")["calls"]["looped_sums"]
    blocks = 2 * OUTER * (INNER * 8 * 8 + 8) * 128 * 4  # double-buffered
    assert blocks <= call["vmem_bytes"] < blocks + 2**18  # and the compiler's own scratch


NESTED = KernelSchedule(
    (
        Loop(None, 10, 0, 0, 1),
        Loop(0, 100, 1, 2, None),
        Loop(1, 20, 0, 0, 4),
        Loop(2, 7, 3, 4, None),
        Loop(1, 5, 5, 5, 2),
    )
)


def test_trips_are_multiplied_out() -> None:
    assert NESTED.bundles == 142
    assert (NESTED.spills, NESTED.fills) == (9, 11)
    assert [loop.spills for loop in NESTED.working_loops(8)] == [0, 3, 5]
    assert [loop.bundles for loop in KernelSchedule(NESTED.loops[:2]).working_loops(8)] == [100]
    assert NESTED.issued(8, (4, 6, 2)) == 10 + 8 * (100 + 4 * (20 + 6 * 7) + 2 * 5)
    assert NESTED.issued(8, (3.5, 6, 0), core_steps=4) == 10 + 4 * (100 + 3.5 * (20 + 6 * 7))
    # A grid of one step is no loop: the first loop is the kernel's own.
    assert NESTED.issued(1, (3, 4, 6, 2)) == 10 + 3 * (100 + 4 * (20 + 6 * 7) + 2 * 5)


def test_copies_at_an_edge_are_counted_but_are_no_loop_of_the_kernel() -> None:
    schedule = KernelSchedule((*NESTED.loops, Loop(1, 65, 0, 0, None, is_edge_copy=True)))
    assert schedule.inner_loops(8) == NESTED.inner_loops(8) == [2, 3, 4]
    assert schedule.issued(8, (4, 6, 2)) == NESTED.issued(8, (4, 6, 2)) + 8 * 65


@pytest.mark.parametrize(
    ("trips", "message"),
    [
        ((4, 6), "2 trip counts for 3 loops"),
        ((5, 6, 2), "has 4 trips, given as 5"),
        ((), "no constant trip count"),
    ],
)
def test_wrong_trips_are_refused(trips: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NESTED.issued(8, trips)


def test_a_kernel_that_is_not_in_the_dump(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no final schedule of a kernel named 'absent'"):
        kernel_schedule(tmp_path, "absent")
