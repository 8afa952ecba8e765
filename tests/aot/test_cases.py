"""Every kernel compiles for every chip at the real model's shapes.

By default one shape of each kernel; `pytest tests/aot -m aot_full` compiles all shapes, which takes several minutes a
chip.
"""

import json
import os
import subprocess
import sys

import pytest

from dsv3_jax.aot import CHIPS


def compile_cases(chip: str, *options: str) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.tpu_compile", chip, *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results
    return results


def failures(results: list[dict]) -> dict[str, str]:
    return {f"{r['kernel']}, {r['label']}": r["error"] for r in results if r["error"]}


@pytest.mark.parametrize("chip", CHIPS)
def test_one_shape_of_every_kernel_compiles(libtpu: None, chip: str) -> None:
    assert failures(compile_cases(chip, "--first")) == {}


@pytest.mark.aot_full
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_all_shapes_of_every_kernel_compile(libtpu: None, chip: str) -> None:
    assert failures(compile_cases(chip)) == {}
