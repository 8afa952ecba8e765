"""Hugging Face's tensor names and the places of the params pytree that they fill, as data derived from a
ModelConfig.

`params["moe_layers"]["mlp"]["experts"]["gate_proj"]["weight"][l, e]` is HF's
`model.layers.{l + first_k_dense_replace}.mlp.experts.{e}.gate_proj.weight`: layers of one kind are stacked.
transformers 5 computes with fused experts, but `save_pretrained` writes these same names.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dsv3_jax.checkpoint.fp8 import scale_shape
from dsv3_jax.config import ModelConfig

SCALE_SUFFIX = "_scale_inv"
_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


class ExpectedTensor(NamedTuple):
    """One tensor of the checkpoint as the model expects it.

    Attributes:
        name: Hugging Face's name.
        path: keys of its leaf in params.
        index: its place in the leaf's leading (stack) dimensions: (), (layer,) or (layer, expert).
        shape: shape in the file, (out, in) for a linear; the leaf's trailing dimensions.
        linear: one of the linears that the release stores as FP8 with scales: all attention and MLP
            projections. Never embeddings, norms, the router, lm_head, eh_proj.
    """

    name: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    linear: bool

    def scale(self) -> "ExpectedTensor":
        """The float32 block scales beside this linear's FP8 weight."""
        path = (*self.path[:-1], self.path[-1] + SCALE_SUFFIX)
        return ExpectedTensor(self.name + SCALE_SUFFIX, path, self.index, scale_shape(self.shape), False)


def expected_tensors(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """All tensors of a checkpoint by name, but for the scales, which `ExpectedTensor.scale` gives."""
    return {tensor.name: tensor for tensor in _tensors(config)}


def copied_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that may be in the files but repeat others, and are not read: name -> shape.

    The MTP module is stored with its own copies of embedding and head (README_WEIGHTS.md of the release).
    """
    table = (config.vocab_size, config.hidden_size)
    names = ["lm_head.weight"] if config.tie_word_embeddings else []
    for layer in mtp_layer_numbers(config):
        names += [
            f"model.layers.{layer}.embed_tokens.weight",
            f"model.layers.{layer}.shared_head.head.weight",
        ]
    return dict.fromkeys(names, table)


def is_ignored(name: str) -> bool:
    """Whether a tensor follows from the config, and loaders of every kind pass it over."""
    return name.endswith("rotary_emb.inv_freq")


def is_quantized_linear(name: str) -> bool:
    """Whether the release stores the tensor of this name in FP8 (see `ExpectedTensor.linear`)."""
    return name.endswith(tuple(f".{module}.weight" for module in (*_MLP, *_ATTENTION)))


def mtp_layer_numbers(config: ModelConfig) -> range:
    """Numbers under which the MTP modules are stored, after the layers of the main model."""
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def _tensors(config: ModelConfig) -> Iterator[ExpectedTensor]:
    hidden, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    yield ExpectedTensor("model.embed_tokens.weight", ("embed_tokens", "weight"), (), table, False)
    for number in range(config.num_hidden_layers):
        if number < config.first_k_dense_replace:
            yield from _block(config, number, "dense_layers", number, moe=False)
        else:
            yield from _block(config, number, "moe_layers", number - config.first_k_dense_replace, moe=True)
    for index, number in enumerate(mtp_layer_numbers(config)):
        yield from _block(config, number, "mtp_layers", index, moe=True)
        for module, shape in _mtp_modules(hidden).items():
            name = f"model.layers.{number}.{module}.weight"
            path = ("mtp_layers", *module.split("."), "weight")
            yield ExpectedTensor(name, path, (index,), shape, False)
    yield ExpectedTensor("model.norm.weight", ("norm", "weight"), (), (hidden,), False)
    if not config.tie_word_embeddings:
        yield ExpectedTensor("lm_head.weight", ("lm_head", "weight"), (), table, False)


def _block(
    config: ModelConfig, number: int, group: str, index: int, *, moe: bool
) -> Iterator[ExpectedTensor]:
    """The tensors of decoder layer `number`, which is entry `index` of the stack `group`."""
    modules = {
        "input_layernorm.weight": (config.hidden_size,),
        "post_attention_layernorm.weight": (config.hidden_size,),
        **_attention(config),
        **(_moe(config) if moe else _mlp(config, "mlp", config.intermediate_size)),
    }
    for module, shape in modules.items():
        name, path = f"model.layers.{number}.{module}", (group, *module.split("."))
        yield ExpectedTensor(name, path, (index,), shape, is_quantized_linear(name))
    if moe:
        for expert in range(config.n_routed_experts):
            for module, shape in _mlp(config, "mlp.experts", config.moe_intermediate_size).items():
                inner = module.removeprefix("mlp.experts.")
                name, path = (
                    f"model.layers.{number}.mlp.experts.{expert}.{inner}",
                    (group, *module.split(".")),
                )
                yield ExpectedTensor(name, path, (index, expert), shape, True)


def _attention(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    heads, hidden, q_rank, kv_rank = (
        config.num_attention_heads,
        config.hidden_size,
        config.q_lora_rank,
        config.kv_lora_rank,
    )
    query = heads * config.qk_head_dim
    if q_rank is None:
        q_modules = {"q_proj": (query, hidden)}
    else:
        q_modules = {"q_a_proj": (q_rank, hidden), "q_a_layernorm": (q_rank,), "q_b_proj": (query, q_rank)}
    modules = {
        **q_modules,
        "kv_a_proj_with_mqa": (kv_rank + config.qk_rope_head_dim, hidden),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), kv_rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    return {f"self_attn.{module}.weight": shape for module, shape in modules.items()}


def _mlp(config: ModelConfig, prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = ((width, config.hidden_size), (width, config.hidden_size), (config.hidden_size, width))
    return {f"{prefix}.{module}.weight": shape for module, shape in zip(_MLP, shapes, strict=True)}


def _moe(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parts of a mixture of experts other than the routed experts."""
    experts, hidden = config.n_routed_experts, config.hidden_size
    modules: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts, hidden)}
    if config.topk_method == "noaux_tc":
        modules["mlp.gate.e_score_correction_bias"] = (experts,)
    width = config.n_shared_experts * config.moe_intermediate_size
    return modules | _mlp(config, "mlp.shared_experts", width)


def _mtp_modules(hidden: int) -> dict[str, tuple[int, ...]]:
    """What an MTP module has besides its decoder layer."""
    return {
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "shared_head.norm": (hidden,),
    }
