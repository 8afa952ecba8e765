"""Decode and prefill on this CPU against `transformers`, in one run: `python benchmarks/cpu.py` (extra `parity`).

One random model of the DeepSeek-V3 architecture (462 M parameters: hidden 1024, 8 layers of which 1 dense, 32 experts,
4 chosen) is written as a checkpoint; `transformers` runs it in float32 with its fastest expert implementation, this
project in float32 and with stored BF16 and FP8 weights. Every contender has its own process, and all take turns, so
that a noisy machine slows them alike; the best round of each counts. The three workloads: decode at batch 1 and 8 after
prompts of 64 tokens, and the prefill of 512 tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 10000,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "float32",
}
WORKLOADS = {"decode, batch 1": (1, 64, 64), "decode, batch 8": (8, 64, 32), "prefill, 512": (1, 512, 1)}
"""Name -> batch, prompt tokens, new tokens."""
EXPERTS = ("eager", "grouped_mm")
"""Not `batched_mm`: it gathers a copy of the weights for every token, 12 GB for the prefill."""
CONTENDERS = (*(f"transformers {name}" for name in EXPERTS), "float32", "bfloat16", "float8")


def make_checkpoints(folder: Path) -> None:
    """Writes the model in float32, and converted to BF16 and FP8."""
    import jax

    from dsv3_jax.checkpoint import save_checkpoint
    from dsv3_jax.checkpoint.convert import convert_checkpoint
    from dsv3_jax.config import ModelConfig
    from dsv3_jax.model import init_params
    from dsv3_jax.precision import Precision

    config = ModelConfig.from_dict(CONFIG)
    params = init_params(config, Precision(weights="float32", dtype="float32"), jax.random.key(0))
    save_checkpoint(folder / "float32", config, params)
    for to in ("bfloat16", "float8"):
        convert_checkpoint(folder / "float32", folder / to, to)


def prompts(batch: int, length: int) -> np.ndarray:
    """Random token ids, int64 [batch, length]."""
    return np.random.default_rng(0).integers(2, CONFIG["vocab_size"], (batch, length))


def time_transformers(folder: Path, experts: str):
    """Seconds of (prefill, decode) of `transformers` in float32, as a function of a workload."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.float32).eval()
    model.set_experts_implementation(experts)

    def run(batch: int, length: int, new_tokens: int) -> tuple[float, float]:
        ids = torch.from_numpy(prompts(batch, length))
        with torch.inference_mode():
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            prefilled = time.perf_counter()
            for _ in range(new_tokens - 1):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return prefilled - start, time.perf_counter() - prefilled

    return run


def time_ours(folder: Path, weights: str):
    """Seconds of (prefill, decode) of this project with the weights as stored, as a function of a workload."""
    import dsv3_jax
    from dsv3_jax.generate.loop import Engine
    from dsv3_jax.generate.sampling import SamplingParams

    model = dsv3_jax.load(folder / weights, dtype="float32")

    def run(batch: int, length: int, new_tokens: int) -> tuple[float, float]:
        engine = Engine(model.params, model.config, model.precision)
        sampling = SamplingParams(max_new_tokens=max(new_tokens, 2), ignore_eos=True)
        engine.generate(prompts(batch, length).tolist(), sampling)
        return engine.stats["prefill_seconds"], engine.stats["decode_seconds"]

    return run


def serve(folder: Path, contender: str) -> None:
    """Child process: one line of JSON for every workload named on standard input."""
    kind, _, experts = contender.partition(" ")
    run = time_transformers(folder, experts) if kind == "transformers" else time_ours(folder, contender)
    for workload in WORKLOADS.values():
        run(*workload)  # compiles, and fills caches
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        batch, length, new_tokens = WORKLOADS[line.strip()]
        prefill_seconds, decode_seconds = run(batch, length, new_tokens)
        is_prefill = new_tokens == 1
        tokens = batch * length if is_prefill else batch * (new_tokens - 1)
        print(json.dumps(tokens / (prefill_seconds if is_prefill else decode_seconds)), flush=True)


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Best tokens a second: workload -> contender -> figure."""
    command = [sys.executable, __file__, "--folder", str(folder), "--serve"]
    children: dict[str, subprocess.Popen] = {}
    try:
        for name in CONTENDERS:
            # One after the other: warming up side by side, they would fight for the cores.
            children[name] = subprocess.Popen(
                [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            if _answer(name, children[name]) != "ready":
                raise RuntimeError(f"{name}: unexpected answer")
        best = {workload: dict.fromkeys(CONTENDERS, 0.0) for workload in WORKLOADS}
        for _ in range(rounds):
            for workload in WORKLOADS:
                for name, child in children.items():
                    print(workload, file=child.stdin, flush=True)
                    best[workload][name] = max(best[workload][name], _answer(name, child))
        return best
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def _answer(name: str, child: subprocess.Popen):
    line = child.stdout.readline() if child.stdout else ""
    if not line:
        raise RuntimeError(f"{name}: ended with code {child.wait()}")
    return json.loads(line)


def report(best: dict[str, dict[str, float]]) -> str:
    """Table of tokens a second, and ratios to the fastest `transformers`."""
    lines = [
        "| tokens/s (ratio to transformers) | transformers float32 | ours, float32 | BF16 weights | FP8 weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    for workload, figures in best.items():
        experts = max(EXPERTS, key=lambda name: figures[f"transformers {name}"])
        baseline = figures[f"transformers {experts}"]
        ours = (f"{figures[w]:.0f} ({figures[w] / baseline:.2f}x)" for w in ("float32", "bfloat16", "float8"))
        lines.append(f"| {workload} | {baseline:.0f} ({experts}) | {' | '.join(ours)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description="Tokens a second on this CPU, against transformers.")
    parser.add_argument(
        "--folder", type=Path, help="keep the checkpoints there (3.3 GB; default: a temporary one)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.folder, args.serve)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "float8").exists():
            # In a process of its own: torch and JAX share no memory with it.
            code = f"import benchmarks.cpu as c, pathlib; c.make_checkpoints(pathlib.Path({str(folder)!r}))"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
        print(report(measure(folder, args.rounds)))


if __name__ == "__main__":
    main()
