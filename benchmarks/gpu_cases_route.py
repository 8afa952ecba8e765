"""Cases of `route` on GPUs: what stands behind the logits of V3's 256 and Kimi-K2's 384 experts."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.gpu_case import GpuCase, Tile
from pallas_kernels.route import gpu
from pallas_kernels.route.rule import Rule

V3 = Rule(8, 8, 4, "top2", "sigmoid", True, 2.5)
KIMI_K2 = Rule(8, 1, 1, "top2", "sigmoid", True, 2.827)
LAYERS = 4


def route_cases() -> list[GpuCase]:
    """A decode step's tokens."""
    return [_case("V3", 8, 256, V3), _case("V3", 128, 256, V3), _case("Kimi-K2", 8, 384, KIMI_K2)]


def _case(model: str, tokens: int, experts: int, rule: Rule) -> GpuCase:
    return GpuCase(
        kernel="dsv3_route",
        label=f"{model}, {experts} experts, {tokens} tokens",
        function=functools.partial(gpu.choose, num_experts=experts, rule=rule),
        arguments=(
            jax.ShapeDtypeStruct((tokens, experts), jnp.float32),
            jax.ShapeDtypeStruct((LAYERS, experts), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ),
        instructions={"h100": "", "h200": "", "b200": ""},
        ideal_bytes=2 * tokens * experts * 4,
        flops=0,
        tile=Tile(bytes=2 * experts * 4, flops=0, stages=1, blocks=tokens),
        integers=(0,),
    )
