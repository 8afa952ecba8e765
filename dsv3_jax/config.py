"""`ModelConfig`: the architecture of one checkpoint, read from the `config.json` that Hugging Face publishes with it.

Field names are Hugging Face's own. Two spellings of the file are read: the release's (`rope_scaling`,
`rope_theta`, `scoring_func`, `topk_method`) and transformers 5's (`rope_parameters`; the router's fields absent,
their value following from `model_type`).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.errors import InputError

V2_MODEL_TYPES = ("deepseek_v2",)
V3_MODEL_TYPES = ("deepseek_v3", "kimi_k2")
ROUTERS = (("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"))


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071), fields as in the `rope_scaling` object of `config.json`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclasses.dataclass(frozen=True)
class BlockQuantization:
    """FP8 e4m3 weights with one float32 scale a block (`quantization_config` of the release).

    Attributes:
        weight_block_size: rows and columns of a block.
        scale_fmt: "ue8m0" where scales are powers of two (V3.1), else None.
    """

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: Literal["ue8m0"] | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model of the DeepSeek-V3 family; every field has the name it has in `config.json`.

    Attributes:
        rope_scaling: None means plain RoPE; YaRN is applied at every length whenever it is present.
        quantization_config: None for a checkpoint stored in BF16, F16 or F32.
        eos_token_id: all ids that end a text, in the order of the file.
        num_nextn_predict_layers: MTP modules, stored as layers `num_hidden_layers`, ...
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    scoring_func: str
    topk_method: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    rope_scaling: YarnScaling | None = None
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    quantization_config: BlockQuantization | None = None
    torch_dtype: str = "bfloat16"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without position, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model whose feed-forward part is a mixture of experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @classmethod
    def from_dict(cls, hf: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Reads a decoded `config.json`.

        Args:
            hf: the JSON object, in either spelling.
            source: what error messages call it.

        Raises:
            InputError: a field is missing, malformed, or asks for something that is not supported; it is named.
        """
        return _Reader(hf, source).read()

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads a `config.json`. Raises InputError when the file is absent, is not JSON, or is not supported."""
        return cls.from_dict(read_json_object(Path(path)), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that must hold one JSON object. Raises InputError, naming the file, where it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class _Reader:
    """One pass over one `config.json`; every method names the field it refuses."""

    def __init__(self, hf: dict[str, Any], source: str):
        self.hf = hf
        self.source = source

    def refuse(self, field: str, expected: str) -> InputError:
        return InputError(f"{self.source}: {field} is {self.hf.get(field)!r}; expected {expected}")

    def integer(self, field: str, default: int | None = None, least: int = 1) -> int:
        value = self.hf.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(field, f"an integer of at least {least}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.hf.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.refuse(field, "a positive number")
        return float(value)

    def choice(self, field: str, default: Any, choices: tuple[Any, ...]) -> Any:
        value = self.hf.get(field)
        value = default if value is None else value
        if value not in choices:
            raise self.refuse(field, " or ".join(map(repr, choices)))
        return value

    def read(self) -> ModelConfig:
        model_type = self.choice("model_type", None, V2_MODEL_TYPES + V3_MODEL_TYPES)
        is_v3 = model_type in V3_MODEL_TYPES
        self.choice("hidden_act", "silu", ("silu",))
        self.choice("attention_bias", False, (False,))
        self.choice("moe_layer_freq", 1, (1,))
        self.choice("rope_interleave", True, (True,))
        num_hidden_layers = self.integer("num_hidden_layers")
        first_k_dense_replace = self.integer("first_k_dense_replace", 0, least=0)
        if first_k_dense_replace > num_hidden_layers:
            raise self.refuse("first_k_dense_replace", f"at most num_hidden_layers = {num_hidden_layers}")
        q_lora_rank = None if self.hf.get("q_lora_rank") is None else self.integer("q_lora_rank")
        qk_rope_head_dim = self.integer("qk_rope_head_dim")
        if qk_rope_head_dim % 2:
            raise self.refuse("qk_rope_head_dim", "an even number")
        rope_theta, rope_scaling = self.rope()
        return ModelConfig(
            model_type=model_type,
            vocab_size=self.integer("vocab_size"),
            hidden_size=self.integer("hidden_size"),
            intermediate_size=self.integer("intermediate_size"),
            moe_intermediate_size=self.integer("moe_intermediate_size"),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=self.integer("num_attention_heads"),
            n_routed_experts=self.integer("n_routed_experts"),
            n_shared_experts=self.integer("n_shared_experts", 1),
            num_experts_per_tok=self.integer("num_experts_per_tok"),
            first_k_dense_replace=first_k_dense_replace,
            **self.router(is_v3),
            q_lora_rank=q_lora_rank,
            kv_lora_rank=self.integer("kv_lora_rank"),
            qk_nope_head_dim=self.integer("qk_nope_head_dim"),
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=self.integer("v_head_dim"),
            max_position_embeddings=self.integer("max_position_embeddings"),
            rope_theta=rope_theta,
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope_scaling=rope_scaling,
            num_nextn_predict_layers=self.mtp_layers(is_v3),
            tie_word_embeddings=self.choice("tie_word_embeddings", False, (False, True)),
            initializer_range=self.number("initializer_range", 0.02),
            bos_token_id=None
            if self.hf.get("bos_token_id") is None
            else self.integer("bos_token_id", least=0),
            eos_token_id=token_ids(self.hf.get("eos_token_id"), f"{self.source}: eos_token_id"),
            quantization_config=self.quantization(),
            torch_dtype=self.dtype(),
        )

    def mtp_layers(self, is_v3: bool) -> int:
        # transformers 5 keeps the number under either name, and V2 has no MTP at all.
        field = "num_mtp_layers" if "num_mtp_layers" in self.hf else "num_nextn_predict_layers"
        return self.integer(field, 0, least=0) if is_v3 else 0

    def dtype(self) -> str:
        field = "dtype" if "torch_dtype" not in self.hf and "dtype" in self.hf else "torch_dtype"
        return self.choice(field, "bfloat16", ("bfloat16", "float16", "float32"))

    def router(self, is_v3: bool) -> dict[str, Any]:
        scoring_func = self.choice("scoring_func", "sigmoid" if is_v3 else "softmax", ("sigmoid", "softmax"))
        default_method = "noaux_tc" if scoring_func == "sigmoid" else "greedy"
        topk_method = self.choice("topk_method", default_method, tuple(method for _, method in ROUTERS))
        if (scoring_func, topk_method) not in ROUTERS:
            raise self.refuse("topk_method", f"one that goes with scoring_func {scoring_func!r}")
        norm_topk_prob = self.choice("norm_topk_prob", is_v3, (False, True))
        if scoring_func == "softmax" and norm_topk_prob:
            # The references disagree about what it would mean with softmax scores, and no release sets it.
            raise self.refuse("norm_topk_prob", "false where scoring_func is 'softmax'")
        n_routed_experts = self.integer("n_routed_experts")
        grouped = topk_method != "greedy"
        n_group = self.integer("n_group", 1) if grouped else 1
        topk_group = self.integer("topk_group", 1) if grouped else 1
        if n_routed_experts % n_group:
            raise self.refuse("n_group", f"a divisor of n_routed_experts = {n_routed_experts}")
        if topk_group > n_group:
            raise self.refuse("topk_group", f"at most n_group = {n_group}")
        if topk_method == "noaux_tc" and n_group > 1 and n_routed_experts // n_group < 2:
            raise self.refuse("n_group", "groups of at least two experts")
        if self.integer("num_experts_per_tok") > topk_group * (n_routed_experts // n_group):
            raise self.refuse("num_experts_per_tok", "at most the experts of topk_group groups")
        return {
            "scoring_func": scoring_func,
            "topk_method": topk_method,
            "n_group": n_group,
            "topk_group": topk_group,
            "norm_topk_prob": norm_topk_prob,
            "routed_scaling_factor": self.number("routed_scaling_factor", 1.0),
        }

    def rope(self) -> tuple[float, YarnScaling | None]:
        field = "rope_parameters" if self.hf.get("rope_parameters") else "rope_scaling"
        fields = self.hf.get(field)
        theta = self.number("rope_theta", 10000.0)
        if fields is None:
            return theta, None
        if not isinstance(fields, dict):
            raise self.refuse(field, "an object or null")
        inner = _Reader(fields, f"{self.source}: {field}")
        theta = inner.number("rope_theta", theta)
        name = "rope_type" if "rope_type" in fields else "type"
        if inner.choice(name, "default", ("default", "yarn")) == "default":
            return theta, None
        inner.choice("attention_factor", None, (None,))
        inner.choice("truncate", True, (True,))
        return theta, YarnScaling(
            factor=inner.number("factor"),
            original_max_position_embeddings=inner.integer("original_max_position_embeddings"),
            beta_fast=inner.number("beta_fast", 32.0),
            beta_slow=inner.number("beta_slow", 1.0),
            mscale=inner.number("mscale") if fields.get("mscale") else 0.0,
            mscale_all_dim=inner.number("mscale_all_dim") if fields.get("mscale_all_dim") else 0.0,
        )

    def quantization(self) -> BlockQuantization | None:
        fields = self.hf.get("quantization_config")
        if fields is None:
            return None
        if not isinstance(fields, dict):
            raise self.refuse("quantization_config", "an object or null")
        inner = _Reader(fields, f"{self.source}: quantization_config")
        inner.choice("quant_method", None, ("fp8",))
        inner.choice("fmt", "e4m3", ("e4m3",))
        inner.choice("activation_scheme", "dynamic", ("dynamic",))
        inner.choice("weight_block_size", None, ([128, 128], (128, 128)))
        scale_fmt = inner.choice("scale_fmt", None, (None, "float", "ue8m0"))
        return BlockQuantization((128, 128), "ue8m0" if scale_fmt == "ue8m0" else None)


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """Reads a token id field that may be null, one id, or a list of ids. Raises InputError, naming the field."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise InputError(f"{name} is {value!r}; expected a token id or a list of them")
    return tuple(ids)


def configs_folder() -> Path:
    """The folder of the bundled configs: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> tuple[str, ...]:
    """Names of the bundled configs, as `dsv3 inspect` takes them."""
    return tuple(sorted(path.stem for path in configs_folder().glob("*.json")))


def named_config(name: str) -> ModelConfig:
    """Reads a bundled config by name. Raises InputError, listing the names, where there is none such."""
    if name not in config_names():
        raise InputError(f"{name}: no such config; expected a folder or one of {', '.join(config_names())}")
    return ModelConfig.from_file(configs_folder() / f"{name}.json")
