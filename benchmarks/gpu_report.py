"""docs/gpu_kernels.md from what `gpu_check.py` found: `python -m benchmarks.gpu_report RESULTS.json ...`.

One file of results a JAX version, each of `python -m benchmarks.gpu_check --json RESULTS.json` in its environment.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from dsv3_jax.aot import GPUS, GpuModel

REPORT = Path(__file__).parent.parent / "docs" / "gpu_kernels.md"
LATENCY_SECONDS = 0.8e-6
"""Of a copy from device memory while the memory is busy, which the pipelines have to cover."""
REGISTERS_AN_SM = 65536
PREFACE = """\
# GPU kernels: what was compiled, and what that says

Made by `python -m benchmarks.gpu_report` from the results of `python -m benchmarks.gpu_check` with jax {versions};
not to be edited. Every kernel was compiled to machine code by XLA, Mosaic GPU and `ptxas` at V3's shapes, whole (TP 1)
and cut by eight (TP 8). {measured}
The arithmetic of each was run by Mosaic's interpreter on a CPU against the references (`tests/kernels/test_*_gpu.py`),
at small shapes. cuDNN, NCCL and cuBLAS were not involved.

- **registers**: of a thread, at launch, with the oldest / the newest JAX; none spills (a spill fails the check).
- **shared**: KiB of shared memory of a block, and blocks that one SM holds beside one another.
- **instructions**: tensor-core instructions in the kernel's PTX, and how many of them stand there.
- **in flight**: KiB that one SM has requested at a time: bytes of a pipeline stage x stages x blocks on an SM. By
  Little's law an SM needs bandwidth x latency / SMs of it: {needs} KiB ({latency:.1f} us assumed).
  Above that the pipeline is deep enough for the whole bandwidth.
- **tensor**: time that the tensor cores need for a stage, padding included, over the time that its bytes need at the
  peak bandwidth. Well below 1 the kernel is bound by memory, as a decode step should be, above 1 by its products.
- **floor**: microseconds that the operation's bytes take at the chip's peak bandwidth, or its FLOPs at the peak of the
  tensor cores, whichever is longer: no kernel can be faster.
- **fill**: blocks with work over the SMs times the blocks that each holds: below 1 some SMs stand idle.

## How near the chip's bandwidth they should come

Decode is bound by memory: a kernel can reach 80 % of the bandwidth where the bytes in flight cover the latency, the
tensor cores and the conversion of FP8 keep up, and all SMs have work. For the weights of a decode step the first two
hold ("in flight" above the need, "tensor" below 1), and a Hopper SM converts 25-30 bytes a clock (counted by hand in
the machine code), of which memory brings 14.5 (h100) or 20.8 (h200). Where "fill" is well below 1 (TP 8, heads cut by
eight) SMs stand idle, and the share will be lower. Latent attention of 128 heads is bound by its products, not by
memory; its FP8 cache costs the conversion besides (estimates are in decisions.md). For many tokens "tensor" is what the
bytes of a stage would cost from device memory; most of them come from the second-level cache.

The best published kernels of their kind, on an H800 SXM5 (peaks as an H100's), and what a step of both needs:

| | published in its README | of the peak | tensor-core work of a step |
| --- | --- | --- | --- |
| FlashMLA, bound by memory | 3000 GB/s | 90 % | 64 query rows x 64 tokens x (576 + 512), no product twice |
| FlashMLA, bound by products | 660 TFLOP/s | 67 % | the same |
| DeepGEMM, W8A8, many rows | 1550 TFLOP/s | 78 % | 4 instructions of depth 32 for every 128 of K, summed afresh |
"""
HEADER = (
    "| shape | chip | registers | shared | instructions | in flight | tensor | floor | fill |\n"
    "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |"
)


def own_kernel(result: dict[str, Any]) -> dict[str, Any]:
    """The Mosaic kernel that the case is about."""
    return next(kernel for kernel in result["kernels"] if kernel["name"].startswith(result["kernel"]))


def is_fp8(kernel: dict[str, Any]) -> bool:
    return any("e4m3" in name or "f8f6f4" in name for name in kernel["instructions"])


def blocks_an_sm(kernel: dict[str, Any], gpu: GpuModel) -> int:
    """Blocks that an SM holds, by shared memory and registers; 1 where the launch is unknown."""
    if not kernel["threads"]:
        return 1
    a_thread = -(-kernel["registers"] // 8) * 8
    by_shared = gpu.shared_bytes // (kernel["shared_bytes"] + 1024)
    return max(min(by_shared, REGISTERS_AN_SM // (a_thread * kernel["threads"])), 1)


def short_name(instruction: str) -> str:
    """wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 -> wgmma m64n128k32 e4m3."""
    parts = instruction.split(".")
    shape = next((part for part in parts if part[:1] == "m" and "n" in part[1:] and "k" in part), "")
    if parts[0] == "tcgen05":
        shape = next((part for part in parts if part.startswith("kind")), "").replace("kind::", "")
        return f"tcgen05.mma {shape}"
    return f"{parts[0]} {shape} {parts[-1]}"


def line(results: list[dict[str, Any]]) -> str:
    """One case on one chip, with every JAX version's result, oldest first."""
    result = results[-1]
    gpu = GPUS[result["chip"]]
    if problems := [problem for entry in results for problem in entry["problems"]]:
        return f"| {result['label']} | {result['chip']} | {problems[0].splitlines()[0]} | | | | | | | |"
    kernel, tile = own_kernel(result), result["tile"]
    resident = blocks_an_sm(kernel, gpu)
    peak = gpu.fp8_flops if is_fp8(kernel) else gpu.bf16_flops
    on_one = min(resident, -(-tile["blocks"] // gpu.sms))
    ideal_seconds = max(result["ideal_bytes"] / gpu.hbm_bytes_per_s, result["flops"] / peak)
    tensor = (tile["flops"] / peak) / (tile["bytes"] / gpu.hbm_bytes_per_s)
    counts: dict[str, int] = {}
    for name, count in kernel["instructions"].items():
        counts[short_name(name)] = counts.get(short_name(name), 0) + count
    cells = (
        result["label"],
        result["chip"],
        " / ".join(str(own_kernel(entry)["registers"]) for entry in results),
        f"{kernel['shared_bytes'] / 1024:.0f}, {resident}",
        ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
        f"{tile['bytes'] * tile['stages'] * on_one / 1024:.0f}",
        f"{tensor:.2f}",
        f"{ideal_seconds * 1e6:.1f}",
        f"{tile['blocks'] / (gpu.sms * resident):.2f}",
    )
    return f"| {' | '.join(cells)} |"


def report(results: list[dict[str, Any]], measured: str) -> str:
    """The Markdown document."""
    versions = sorted({result["jax"] for result in results}, key=version_key)
    needs = ", ".join(
        f"{name} {gpu.hbm_bytes_per_s * LATENCY_SECONDS / gpu.sms / 1024:.0f}"
        for name, gpu in GPUS.items()
        if any(result["chip"] == name for result in results)
    )
    parts = [
        PREFACE.format(
            versions=" and ".join(versions),
            needs=needs,
            latency=LATENCY_SECONDS * 1e6,
            measured=measured,
        )
    ]
    order = {result["label"]: i for i, result in reversed(list(enumerate(results)))}
    chips = list(GPUS)
    key = sorted(
        results,
        key=lambda r: (r["kernel"], order[r["label"]], chips.index(r["chip"]), version_key(r["jax"])),
    )
    for kernel, group in itertools.groupby(key, key=lambda r: r["kernel"]):
        cases = itertools.groupby(group, key=lambda r: (r["label"], r["chip"]))
        rows = "\n".join(line(list(entries)) for _, entries in cases)
        parts.append(f"## `{kernel}`\n\n{HEADER}\n{rows}\n")
    return "\n".join(parts)


def version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args()
    results = [json.loads(text) for path in options.results for text in path.read_text().splitlines()]
    REPORT.write_text(
        report(results, "**No GPU was at hand: nothing in this document was executed on one.**")
    )
    return 1 if any(result["problems"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
