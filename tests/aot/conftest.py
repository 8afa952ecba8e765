"""A compiler for absent TPUs, one process for all tests that ask it."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsv3_jax.aot.schedule import llo_dump_environment

Measure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def libtpu() -> None:
    """Skips where the TPU compiler is missing."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for an absent TPU needs the extra `tpu`")


@pytest.fixture(scope="session")
def measure(libtpu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measure]:
    """`measure(program, topology)` -> what tests/aot/compiler.py reads out of the compiled program."""
    dump = tmp_path_factory.mktemp("llo")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | llo_dump_environment(dump)
    command = [sys.executable, "-m", "tests.aot.compiler", str(dump)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        replies: dict[str, dict[str, Any]] = {}

        def ask(
            program: str,
            topology: str = "v5e:2x2",
            devices: int = 1,
            kernel_bytes: str = "claimed",
            default_trips: int = 1,
            scalars: list[list[int]] | None = None,
            schedules: bool = False,
        ) -> dict[str, Any]:
            request = json.dumps(
                {
                    "program": program,
                    "topology": topology,
                    "devices": devices,
                    "kernel_bytes": kernel_bytes,
                    "default_trips": default_trips,
                    "scalars": scalars,
                    "schedules": schedules,
                }
            )
            if request not in replies:
                print(request, file=child.stdin, flush=True)
                replies[request] = json.loads(child.stdout.readline())
            reply = replies[request]
            assert "error" not in reply, reply["error"]
            return reply

        yield ask
        child.stdin.close()
