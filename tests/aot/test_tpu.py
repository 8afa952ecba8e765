"""The extra `tpu` is enough to compile for TPUs that are not there."""

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("compiling for an absent TPU needs the extra `tpu`", allow_module_level=True)

# libtpu reads its environment once, and its flags and lock would leak into other tests: hence a process of its own.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_decode_step_compiles(topology: str) -> None:
    command = [sys.executable, "-m", "tests.aot.compile_decode", topology, "tiny"]
    result = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    arguments, temporaries = map(int, result.stdout.split())
    assert arguments > 7_000_000
    assert temporaries < 100_000_000
