"""What a config or a checkpoint amounts to: parameters by component, bytes by dtype; no data is read."""

import dataclasses
import math
from collections import Counter

import jax

from dsv3_jax.checkpoint.folder import Checkpoint
from dsv3_jax.checkpoint.names import copied_tensors
from dsv3_jax.checkpoint.safetensors_file import dtype_name
from dsv3_jax.config import ModelConfig
from dsv3_jax.model import abstract_params

COMPONENTS = (
    "embedding",
    "attention",
    "dense_mlp",
    "routed_experts",
    "shared_experts",
    "router",
    "norms",
    "lm_head",
)
_GROUPS = ("dense_layers", "moe_layers", "mtp_layers")


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, from the model's abstract parameters; FP8 scales are not counted.

    Attributes:
        components: of the main model, by name of COMPONENTS.
        total: their sum; what releases call the model's size (671B for V3).
        activated: used for one token: the total without the routed experts that are not chosen, and without
            the embedding, of which one row is looked up. Gives the published 37B (V3), 21B (V2), 2.4B
            (V2-Lite) and 32B (Kimi-K2).
        mtp: of the MTP modules alone.
        mtp_stored: with their copies of embedding and head, as in the files (V3: 685B stored less 671B,
            "14B").
    """

    components: dict[str, int]
    total: int
    activated: int
    mtp: int
    mtp_stored: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of a model, its MTP modules apart."""
    components: Counter[str] = Counter(dict.fromkeys(COMPONENTS, 0))
    mtp = 0
    for path, leaf in _leaves(config, "bfloat16"):
        size = math.prod(leaf.shape)
        if path[0] == "mtp_layers":
            mtp += size
        else:
            components[_component(path)] += size
    total = components.total()
    unused = components["routed_experts"] * (config.n_routed_experts - config.num_experts_per_tok)
    activated = total - unused // config.n_routed_experts - components["embedding"]
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    copies = sum(math.prod(shape) for shape in copied_tensors(untied).values())
    return ParameterCounts(dict(components), total, activated, mtp, mtp + copies)


def bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of tensor data in the files by safetensors' dtype name, the largest first."""
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    return dict(sizes.most_common())


def expected_bytes_by_dtype(config: ModelConfig) -> dict[str, int]:
    """The same for a model that is not there, in the format that its config names; without copied tensors."""
    weights = "float8" if config.quantization_config is not None else config.torch_dtype
    sizes: Counter[str] = Counter()
    for _, leaf in _leaves(config, weights):
        sizes[dtype_name(leaf.dtype)] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return dict(sizes.most_common())


def _leaves(config: ModelConfig, weights: str) -> list[tuple[tuple[str, ...], jax.ShapeDtypeStruct]]:
    leaves, _ = jax.tree.flatten_with_path(abstract_params(config, weights))
    return [(tuple(key.key for key in keys), leaf) for keys, leaf in leaves]


def _component(path: tuple[str, ...]) -> str:
    """The component that a leaf of the main model belongs to."""
    module = path[1] if path[0] in _GROUPS else path[0]
    if any("norm" in key for key in path):
        return "norms"
    if module != "mlp":
        return {"embed_tokens": "embedding", "self_attn": "attention"}.get(module, module)
    return {"experts": "routed_experts", "shared_experts": "shared_experts", "gate": "router"}.get(
        path[2], "dense_mlp"
    )
