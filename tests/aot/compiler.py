"""Compiles programs in a process of its own: libtpu reads its environment once, and would leak lock and flags.

`python -m tests.aot.compiler DUMP` reads requests from standard input, one line of JSON each, and answers in kind.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.aot import (
    KernelCall,
    analyse,
    kernel_calls,
    kernel_schedule,
    large_copies,
    list_operations,
    topology_mesh,
)
from tests.aot import programs


def answer(request: dict[str, Any], dump: Path) -> dict[str, Any]:
    """Compiles `request["program"]` and reads everything out of it that the tests compare."""
    mesh = topology_mesh(request["topology"], (request["devices"],), ("x",))
    function, arguments, options = getattr(programs, request["program"])(mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, **options).lower(*arguments).compile()
    cost = analyse(compiled, kernel_bytes=request["kernel_bytes"], default_trips=request["default_trips"])
    text = compiled.as_text()
    scalars = request["scalars"] and [np.asarray(values) for values in request["scalars"]]
    calls = {call.name: call for call in kernel_calls(text, scalars=scalars)}
    scheduled = calls if request["schedules"] else {}
    return dataclasses.asdict(cost) | {
        "hbm_bytes": cost.hbm_bytes,
        "schedules": {name: read_schedule(scheduled[name], dump) for name in scheduled},
        "calls": {name: dataclasses.asdict(call) for name, call in calls.items()},
        "operations": [dataclasses.asdict(op) for op in list_operations(text)],
        "copies": [op.name for op in large_copies(text, 1_000_000)],
    }


def read_schedule(call: KernelCall, dump: Path) -> dict[str, Any]:
    """What the tests compare of a kernel whose loops all have constant trips."""
    schedule, steps = kernel_schedule(dump, call.name), call.pipeline.steps() or 1
    return {
        "bundles": schedule.bundles,
        "spills": schedule.spills,
        "fills": schedule.fills,
        "trips": [schedule.loops[i].trips for i in schedule.inner_loops(steps)],
        "issued": schedule.issued(steps),
        "issued_by_one_of_two_cores": schedule.issued(steps, core_steps=call.pipeline.steps(2)),
    }


def main() -> None:
    dump = Path(sys.argv[1])
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), dump)
        except Exception as error:
            # The test that asked fails with it, the next one goes on.
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
        shutil.rmtree(dump)
        dump.mkdir()


if __name__ == "__main__":
    main()
