"""`python -m tests.aot.gpu_compiler CHIP DEVICES PROGRAM`: compiles for absent GPUs and prints what tests compare.

One program a process: Mosaic GPU keeps a compiled kernel by its text, whatever the chip.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import jax

from dsv3_jax.aot import captured_stderr, dump_environment, gpu_mesh, list_operations, read_kernels
from tests.aot import gpu_programs


def main() -> None:
    chip, devices, program = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(dump_environment(Path(folder)))
        mesh = gpu_mesh(chip, (devices,), ("tensor",))
        with captured_stderr() as log, jax.set_mesh(mesh):
            function, arguments, options = getattr(gpu_programs, program)(mesh)
            try:
                traced = jax.jit(function, **options).trace(*arguments)
                compiled = traced.lower(lowering_platforms=("cuda",)).compile()
            except ValueError as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
                return
        kernels = read_kernels(log[0], Path(folder))
    memory = compiled.memory_analysis()
    assert memory is not None
    reply = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "operations": [dataclasses.asdict(op) for op in list_operations(compiled.as_text())],
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
    }
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
