"""`dsv3_jax.aot` against figures counted by hand: every program is compiled by the real compiler."""

import dataclasses
import functools

import pytest

from dsv3_jax.aot import CHIPS, Cost, predict_seconds
from tests.aot.programs import LAYERS, TOKENS, WIDTH

HOSTS = [chip.host for chip in CHIPS.values()]
WEIGHTS = LAYERS * WIDTH * WIDTH
REFETCHED = 1.2 * LAYERS * (WIDTH // 512) * TOKENS * WIDTH * 2
"""x, read again for each column of blocks where it stays in HBM, and some copies of it."""


@pytest.mark.parametrize("topology", HOSTS)
def test_matmul_moves_operands_and_result_once(measure, topology: str) -> None:
    cost = measure("matmul", topology)
    assert cost["argument_bytes"] == 256 * 7168 * 2 + 7168 * 2048
    assert cost["hbm_bytes"] == cost["argument_bytes"] + 256 * 2048 * 4


@pytest.mark.parametrize("topology", HOSTS)
def test_scan_of_dots_reads_the_stack_once(measure, topology: str) -> None:
    # 2 %: activations, and on v5p their copies.
    assert measure("scan_of_dots", topology)["hbm_bytes"] == pytest.approx(WEIGHTS, rel=0.02)


@pytest.mark.parametrize("topology", HOSTS)
def test_kernel_on_a_slice_copies_every_layer(measure, topology: str) -> None:
    cost = measure("scan_of_kernels_on_slices", topology)
    assert 3 * WEIGHTS < cost["hbm_bytes"] < 3 * WEIGHTS + REFETCHED  # read, written, read again
    copies = [op for op in cost["operations"] if op["name"] in cost["copies"]]
    assert [(op["times"], op["written_bytes"]) for op in copies] == [(LAYERS, WIDTH * WIDTH)]


@pytest.mark.parametrize("topology", HOSTS)
def test_kernel_that_indexes_the_stack_reads_it_once(measure, topology: str) -> None:
    cost = measure("scan_of_indexing_kernels", topology)
    assert WEIGHTS < cost["hbm_bytes"] < WEIGHTS + REFETCHED
    assert cost["kernels"]["matmul"]["calls"] == LAYERS
    # 3 %: activations, counted in full as well.
    assert cost["custom_call_operand_bytes"] == pytest.approx(LAYERS * WEIGHTS, rel=0.03)
    assert cost["copies"] == []


def test_claims_are_preferred_but_can_be_ignored(measure) -> None:
    claimed = measure("claiming_kernels")
    figures = claimed["kernels"]["matmul"]
    assert figures["claimed_bytes"] <= LAYERS * 1_000_000 < figures["block_bytes"]
    assert claimed["hbm_bytes"] < 0.01 * WEIGHTS
    ignored = measure("claiming_kernels", kernel_bytes="blocks")
    assert ignored["hbm_bytes"] == pytest.approx(WEIGHTS, rel=0.03)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_all_reduce_in_a_scan(measure, topology: str) -> None:
    cost = measure("scan_of_all_reduces", topology, devices=8)
    payload = LAYERS * TOKENS * 4096 * 4
    assert cost["collectives"] == {
        "all-reduce": {"count": LAYERS, "payload_bytes": payload, "wire_bytes": payload * 2 * 7 // 8}
    }
    weights = LAYERS * 2 * 4096 * 2048 // 8
    assert weights < cost["hbm_bytes"] < weights + 4 * payload


@pytest.mark.parametrize(
    ("program", "kind", "payload", "wire"),
    [
        ("all_to_all", "all-to-all", 2**21, 2**21 * 7 // 8),
        ("all_gather", "all-gather", 2**24, 2**24 * 7 // 8),
        ("reduce_scatter", "reduce-scatter", 2**21, 2**21 * 7 // 8),
        ("permute", "collective-permute", 2**21, 2**21),
    ],
)
def test_collectives(measure, program: str, kind: str, payload: int, wire: int) -> None:
    cost = measure(program, "v6e:2x4", devices=8)
    assert cost["collectives"] == {kind: {"count": 1, "payload_bytes": payload, "wire_bytes": wire}}


def test_cache_update_in_place_moves_one_token(measure) -> None:
    cost = measure("cache_update")
    assert cost["hbm_bytes"] < 4 * 16 * 640 * 2
    assert cost["argument_bytes"] > 16 * 4096 * 640 * 2
    assert cost["copies"] == []


def test_cache_that_is_not_donated_is_copied(measure) -> None:
    cost = measure("copied_cache_update")
    assert len(cost["copies"]) == 1
    assert cost["hbm_bytes"] > 2 * 16 * 4096 * 640 * 2


@pytest.mark.parametrize("topology", HOSTS)
def test_stacking_in_a_scan_writes_each_row_once(measure, topology: str) -> None:
    cost = measure("stacked_results", topology)
    assert cost["hbm_write_bytes"] == pytest.approx(8 * 2**24, rel=0.15)  # x may be copied once
    assert cost["hbm_read_bytes"] < 10 * 2**24


def test_gather_reads_the_rows_that_it_takes(measure) -> None:
    assert measure("gather_rows")["hbm_bytes"] == pytest.approx(
        2 * 64 * 2048 * 2, rel=0.01
    )  # and the indices


def test_tile_padding_counts(measure) -> None:
    cost = measure("padded_increment")
    assert cost["hbm_bytes"] == cost["argument_bytes"] + cost["output_bytes"] == 2 * 200 * 1024 * 2


def test_nested_loops_multiply(measure) -> None:
    cost = measure("nested_loops")
    assert cost["hbm_bytes"] == pytest.approx(2 * 3 * WIDTH * WIDTH, rel=0.02)
    # Each of the six trips runs the matmul, and nothing else that is as dear.
    streaming = [op for op in cost["operations"] if op["hbm_bytes"] >= WIDTH * WIDTH]
    assert [op["times"] for op in streaming] == [6]


def test_loop_without_a_constant_trip_count_is_reported(measure) -> None:
    once, thrice = measure("open_loop"), measure("open_loop", default_trips=3)
    assert len(once["unknown_trip_counts"]) == 1
    assert thrice["hbm_bytes"] - once["hbm_bytes"] == pytest.approx(2 * WIDTH * WIDTH, rel=0.02)


@pytest.mark.parametrize(("program", "fetches"), [("grouped_heads", 4), ("strided_heads", 32)])
def test_block_is_fetched_when_its_index_changes(measure, program: str, fetches: int) -> None:
    blocks = measure(program)["kernels"]["scores"]["block_bytes"]
    assert blocks == 32 * 128 * 128 * 2 + fetches * 1024 * 128 * 2 + 32 * 128 * 1024 * 4


@pytest.mark.parametrize(
    ("chosen", "fetches"), [(None, 16), ([[7] * 16], 1), ([[7, 7, 3, 3, 3, 9] + [200] * 10], 4)]
)
def test_prefetched_scalars_decide_what_is_fetched(measure, chosen: list | None, fetches: int) -> None:
    call = measure("routed_blocks", scalars=chosen)["calls"]["routed"]
    assert call["read_bytes"] == fetches * 256 * 1024 * 4 + 128 * 4  # and a tile of scalars
    assert call["write_bytes"] == 16 * 256 * 1024 * 4


def test_a_mesh_larger_than_the_topology_is_refused(measure) -> None:
    with pytest.raises(AssertionError, match="v5e:2x2 has 4 devices"):
        measure("matmul", devices=8)


@pytest.mark.parametrize("topology", HOSTS)
def test_decode_step_compiles(measure, topology: str) -> None:
    cost = measure("tiny_decode_step", topology)
    assert cost["argument_bytes"] > 7_000_000
    assert cost["temp_bytes"] < 100_000_000
    assert cost["unknown_trip_counts"] == []


def test_prediction_adds_up() -> None:
    figures = dict.fromkeys((field.name for field in dataclasses.fields(Cost)), 0)
    figures |= {"collectives": {"all-reduce": {"count": 3, "payload_bytes": 8, "wire_bytes": 9_000_000}}}
    kernel = {"block_bytes": 819_000_000, "claimed_bytes": 1, "operand_bytes": 1, "grid_steps": 1000}
    cost = Cost(**figures | {"estimated_cycles": 1_500_000, "kernels": {"experts": kernel}})
    predict = functools.partial(predict_seconds, cost, "v5e", collective_latency_s=1e-6)
    assert predict() == pytest.approx(1e-3 + 1e-3 + 3e-6)
    assert predict(ici_bytes_per_s=9e9) == pytest.approx(3e-3 + 3e-6)
    assert predict(kernel_hbm_bytes={"experts": 409_500_000}) == pytest.approx(1.5e-3 + 3e-6)
    assert predict(kernel_bundles={"experts": 3_000_000}) == pytest.approx(3e-3 + 3e-6)
    kernel |= {"block_bytes": None, "operand_bytes": 8_190_000}
    del kernel["claimed_bytes"]
    assert predict() == pytest.approx(1e-3 + 1e-5 + 3e-6)
