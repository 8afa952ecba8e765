"""V3's decode step on one chip, a dense layer and a layer of experts: what moves, and what stands between kernels."""

from typing import Any

import pytest

from tests.aot.programs import V3_BATCH, V3_CONTEXT, V3_OF_TWO_LAYERS

CHOSEN = 57
"""Experts that 8 tokens choose, about, of 256."""


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def cost(measure, request: pytest.FixtureRequest) -> dict[str, Any]:
    return measure("v3_decode_step", request.param, kernel_bytes="blocks")


def needed_bytes() -> int:
    """Weights touched and cache read; scales and activations left out."""
    c = V3_OF_TWO_LAYERS
    hidden, heads = c.hidden_size, c.num_attention_heads
    attention = hidden * c.q_lora_rank + c.q_lora_rank * heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    attention += hidden * (c.kv_lora_rank + c.qk_rope_head_dim)
    attention += heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    attention += heads * c.v_head_dim * hidden
    experts = (CHOSEN + c.n_shared_experts) * 3 * hidden * c.moe_intermediate_size
    dense, router = 3 * hidden * c.intermediate_size, c.n_routed_experts * hidden * 2
    head = c.vocab_size * hidden * 2
    cache = 2 * V3_BATCH * V3_CONTEXT * 640 * 2
    return 2 * attention + dense + experts + router + head + cache


def test_step_moves_what_it_needs(cost) -> None:
    kernels = cost["kernels"]
    # The compiled program doesn't know the routing: each of 64 rows counts as another expert (test_targets.py has the
    # kernel on a concrete one). Kernels that copy by hand count operands in full: the cache written, and read, by each
    # of two layers is that of both.
    experts = kernels["dsv3_grouped_swiglu"]["block_bytes"] + kernels["dsv3_grouped_matmul"]["block_bytes"]
    by_hand = [kernel["operand_bytes"] for kernel in kernels.values() if kernel["block_bytes"] is None]
    cache = 2 * V3_BATCH * V3_CONTEXT * 640 * 2
    moved = cost["hbm_bytes"] - experts * (1 - CHOSEN / 64) - sum(by_hand) + cache
    assert 0.99 * needed_bytes() < moved < 1.15 * needed_bytes()


def test_no_weight_and_no_cache_is_copied(cost) -> None:
    names = set(cost["copies"])
    copies = [op for op in cost["operations"] if op["name"] in names]
    assert [op["name"] for op in copies if op["written_to_hbm"]] == []
    # What goes to VMEM ahead of the kernel that needs it, beside other operations, costs nothing twice.
    assert [op["name"] for op in copies if not op["asynchronous"]] == []


def test_few_operations_outside_kernels(cost) -> None:
    outside = [
        op
        for op in cost["operations"]
        if op["opcode"] != "kernel" and not op["asynchronous"] and not op["scalar"]
    ]
    assert sum(op["times"] for op in outside) <= 25
    # None of them streams a weight.
    assert max(op["hbm_bytes"] for op in outside) < 1_000_000


def test_step_fits_the_chip(cost) -> None:
    assert cost["unknown_trip_counts"] == []
    assert cost["temp_bytes"] < 100_000_000
