"""V3's steps for GPUs that are not there: what they allocate and copy, and that the kernels compile."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

MB = 1_000_000
EXPERT_BYTES = 3 * 2048 * 7168
Compile = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def gpu_plugin() -> None:
    """Skips where the CUDA plugin, and with it the compiler, is missing."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("compiling for an absent GPU needs the extra `gpu-aot`")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """A process of its own: Mosaic GPU keeps a compiled kernel by its text, whatever the chip."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def gpu_program(gpu_plugin: None) -> Compile:
    """`gpu_program(program, chip, devices)` -> what tests/aot/gpu_compiler.py prints of it."""
    replies: dict[tuple, dict[str, Any]] = {}

    def ask(program: str, chip: str, devices: int = 1) -> dict[str, Any]:
        key = (program, chip, devices)
        if key not in replies:
            done = run("tests.aot.gpu_compiler", chip, str(devices), program)
            assert done.returncode == 0, done.stderr[-2000:]
            replies[key] = json.loads(done.stdout)
        return replies[key]

    return ask


def largest_written(reply: dict[str, Any]) -> dict[str, Any]:
    """XLA's operation that writes most; kernels (custom calls) and collectives left out."""
    own = [op for op in reply["operations"] if op["opcode"] in ("fusion", "copy")]
    return max(own, key=lambda op: op["written_bytes"])


def kernel_names(reply: dict[str, Any]) -> set[str]:
    mosaic = "_mosaic_gpu_kernel"
    return {k["name"].removesuffix(mosaic) for k in reply["kernels"] if k["name"].endswith(mosaic)}


DECODE_KERNELS = {
    "dsv3_absorb_queries",
    "dsv3_block_scaled_matmul",
    "dsv3_block_scaled_swiglu",
    "dsv3_grouped_matmul",
    "dsv3_grouped_swiglu",
    "dsv3_head_values",
    "dsv3_mla_decode",
    "dsv3_route",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "chip", "devices"),
    [
        ("v3_decode_step", "h100", 1),
        ("v3_decode_step", "h100", 8),
        ("v3_decode_step_w8a8", "h100", 1),
        ("v3_decode_step", "b200", 8),
    ],
)
def test_decode_step_reads_weights_where_they_lie(
    gpu_program: Compile, program: str, chip: str, devices: int
) -> None:
    reply = gpu_program(program, chip, devices)
    assert reply["temporary_bytes"] < 64 * MB  # 256 MB were asked for
    # Neither a weight nor the cache is copied, and no expert is expanded: the largest array that XLA writes is
    # smaller than any projection, let alone a stack of them.
    assert largest_written(reply)["written_bytes"] < 6 * MB / (1 if devices == 1 else 2)
    quantize = {"dsv3_quantize_rows"} if "w8a8" in program else set()
    assert kernel_names(reply) == DECODE_KERNELS | quantize
    # 24 in a layer of experts; each costs microseconds, whatever it does.
    outside = [op for op in reply["operations"] if op["opcode"] in ("fusion", "copy") and not op["scalar"]]
    assert sum(op["times"] for op in outside) <= 120
    assert [k["name"] for k in reply["kernels"] if k["spilled_bytes"] or k["serialized"]] == []


@pytest.mark.slow
def test_two_all_reduces_a_layer(gpu_program: Compile) -> None:
    reply = gpu_program("v3_decode_step", "h100", 8)
    reduces = [op for op in reply["operations"] if op["opcode"].startswith("all-reduce")]
    assert sum(op["times"] for op in reduces) == 2 * 4
    assert reply["argument_bytes"] < 6_000 * MB  # an eighth of four layers


@pytest.mark.slow
def test_prefill_allocates_the_sorted_rows_and_no_scores(gpu_program: Compile) -> None:
    reply = gpu_program("v3_prefill", "h100", 8)
    assert "dsv3_mla_prefill" in kernel_names(reply)
    # 8192 tokens of 8 choices, 7168 wide: 0.94 GB. The scores of one row alone would be 4 MB a head.
    sorted_rows = 8192 * 8 * 7168 * 2
    assert largest_written(reply)["written_bytes"] == sorted_rows
    assert reply["temporary_bytes"] < 1.7 * sorted_rows


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100"])
def test_without_kernels_xla_makes_no_copy_of_a_weight_and_no_dense_experts(
    gpu_program: Compile, chip: str
) -> None:
    reply = gpu_program("v3_decode_step", chip)
    assert kernel_names(reply) == set()
    # A tile of 2 Mi elements in float32; one expert would be 176 MB, all 256 of them 45 GB.
    assert largest_written(reply)["written_bytes"] < 10 * MB
    assert reply["temporary_bytes"] < EXPERT_BYTES


def test_a_kernel_asked_for_by_name_on_an_a100_is_one_line(gpu_program: Compile) -> None:
    error = gpu_program("experts_by_name", "a100")["error"]
    assert error.startswith("ImplementationError: grouped_swiglu: no Pallas kernel for NVIDIA A100")
    assert "\n" not in error


@pytest.mark.parametrize("chip", ["h100", "b200"])
@pytest.mark.parametrize("kernel", ["dsv3_grouped_swiglu", "dsv3_mla_decode"])
def test_one_shape_compiles(gpu_plugin: None, chip: str, kernel: str) -> None:
    done = run("benchmarks.gpu_check", "--chip", chip, "--kernels", kernel, "--first")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.aot_full
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["h100", "b200"])
def test_all_shapes_of_every_kernel_compile(gpu_plugin: None, chip: str) -> None:
    done = run("benchmarks.gpu_check", "--chip", chip)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
