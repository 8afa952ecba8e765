"""`Precision`: in which number formats, and by which kernels, a model is held and computed."""

import dataclasses
from typing import Literal

WeightFormat = Literal["float8", "bfloat16", "float16", "float32"]
ActivationFormat = Literal["none", "float8"]
ComputeType = Literal["float32", "bfloat16"]
Implementation = Literal["reference", "pallas"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats of a model in memory, and what computes with them; static, so it can be an argument of `jax.jit`.

    Attributes:
        weights: "float8" keeps e4m3 values and 128x128 scales for the linears that the release quantises.
        activations: "float8" quantises what enters those linears in blocks of 1x128 (W8A8).
        dtype: type of the activations between the linears; norms, router and softmax are float32 always.
        implementation: of the operations in `pallas_kernels`: None takes the platform's own, "reference" plain XLA,
            "pallas" the kernels for TPUs or for Hopper and Blackwell GPUs; on a CPU the TPU's, interpreted.
    """

    weights: WeightFormat = "bfloat16"
    activations: ActivationFormat = "none"
    dtype: ComputeType = "bfloat16"
    implementation: Implementation | None = None
