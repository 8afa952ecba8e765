"""Import of a synthetic FP8 checkpoint of 4 GB against a plain parallel read of the same files, from a cold
disk.

    python benchmarks/import_checkpoint.py [--folder FOLDER] [--rounds 5]

Prints the rate of both (median of the rounds, which alternate, each in a fresh process) and the memory that
import takes
beyond the arrays: peak RSS less the RSS just before the first byte is read, less the arrays' bytes.
"""

import argparse
import contextlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from dsv3_jax.checkpoint import fp8, load_params, open_checkpoint
from dsv3_jax.checkpoint.hf_config import config_fields, write_index, write_json
from dsv3_jax.checkpoint.names import expected_tensors
from dsv3_jax.checkpoint.safetensors_file import DTYPES, SafetensorsWriter
from dsv3_jax.config import BlockQuantization, ModelConfig

SHARDS = 4
READ_THREADS = 4
READ_BYTES = 1 << 20  # of 1 and 8 MiB, with 1 to 8 threads, the fastest plain read here

CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=8192,
    moe_intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=16,
    n_routed_experts=64,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    quantization_config=BlockQuantization(),
)


def write_checkpoint(folder: Path) -> None:
    """Random finite values in the release's format and order, in SHARDS files."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in expected_tensors(CONFIG).values():
        if tensor.linear:
            tensors[tensor.name] = ("F8_E4M3", tensor.shape)
            tensors[tensor.scale().name] = ("F32", fp8.scale_shape(tensor.shape))
        else:
            kind = "F32" if tensor.name.endswith("e_score_correction_bias") else "BF16"
            tensors[tensor.name] = (kind, tensor.shape)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x7F, 1 << 27, np.uint8)
    names = list(tensors)
    sizes: dict[str, tuple[str, int]] = {}
    for number in range(SHARDS):
        part = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        file = f"model-{number + 1:05}-of-{SHARDS:06}.safetensors"
        with SafetensorsWriter(folder / file, {name: tensors[name] for name in part}) as writer:
            for name in part:
                dtype, shape = tensors[name]
                count = int(np.prod(shape))
                start = int(rng.integers(0, codes.size - count))
                data = codes[start : start + count]
                if dtype != "F8_E4M3":
                    data = (data.astype(np.float32) / 100).astype(DTYPES[dtype])
                writer.write(name, data)
                sizes[name] = (file, data.nbytes)
    write_json(folder / "config.json", config_fields(CONFIG))
    write_index(folder / "model.safetensors.index.json", sizes)


def drop_cache(folder: Path) -> None:
    """Makes the files cold: what is dirty is written, then the kernel forgets the pages."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def status_bytes(field: str) -> int:
    """A memory figure of this process: VmRSS, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_import(folder: Path) -> dict[str, float]:
    """One import, timed with everything from the headers on."""
    before: list[int] = []

    def report(_: int) -> None:
        if not before:
            before.append(status_bytes("VmRSS"))

    start = time.perf_counter()
    params = load_params(open_checkpoint(folder), "stored", progress=report)
    seconds = time.perf_counter() - start
    import jax

    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    overhead = status_bytes("VmHWM") - before[0] - nbytes
    return {"seconds": seconds, "bytes": nbytes, "overhead": overhead}


def measure_read(folder: Path) -> dict[str, float]:
    """One plain read of the files from first to last byte by READ_THREADS threads into fresh memory."""
    files = sorted(folder.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    start = time.perf_counter()
    memory = mmap.mmap(-1, sum(sizes))
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    blocks = iter(
        [
            (path, offset, min(READ_BYTES, size - offset), sum(sizes[:number]) + offset)
            for number, (path, size) in enumerate(zip(files, sizes, strict=True))
            for offset in range(0, size, READ_BYTES)
        ]
    )
    lock = threading.Lock()
    fds = {path: os.open(path, os.O_RDONLY) for path in files}

    def worker() -> None:
        while True:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            path, offset, size, place = block
            os.preadv(fds[path], [view[place : place + size]], offset)

    threads = [threading.Thread(target=worker) for _ in range(READ_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - start, "bytes": sum(sizes)}


def run(folder: Path, rounds: int) -> None:
    """Alternates the two in fresh processes and prints the result."""
    results: dict[str, list[dict[str, float]]] = {"read": [], "import": []}
    for _ in range(rounds):
        for kind, measured in results.items():
            drop_cache(folder)
            command = [sys.executable, __file__, "--folder", str(folder), "--measure", kind]
            measured.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    rates = {}
    for kind, measured in results.items():
        each = [entry["bytes"] / entry["seconds"] / 1e9 for entry in measured]
        rates[kind] = statistics.median(each)
        print(f"{kind:7} {rates[kind]:.2f} GB/s   ({' '.join(f'{rate:.2f}' for rate in each)})")
    overhead = max(entry["overhead"] for entry in results["import"])
    print(f"import / read: {100 * rates['import'] / rates['read']:.0f} %   (wanted: 70 % or more)")
    print(f"memory beyond the arrays: {overhead / 1e6:.0f} MB   (wanted: at most 300 MB)")


def main() -> None:
    """Reads the arguments; makes the checkpoint and deletes it."""
    parser = argparse.ArgumentParser(description="import against a plain read of the same files, cold cache")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=("read", "import"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure = {"read": measure_read, "import": measure_import}[args.measure]
        print(json.dumps(measure(args.folder)))
        return
    with contextlib.ExitStack() as stack:
        if args.folder is None:
            args.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            args.folder.mkdir()
            stack.callback(shutil.rmtree, args.folder)
        write_checkpoint(args.folder)
        run(args.folder, args.rounds)


if __name__ == "__main__":
    main()
