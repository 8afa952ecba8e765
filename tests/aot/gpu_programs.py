"""Programs for absent GPUs: each takes a mesh with the axis `tensor`, returns a function, arguments, jit's options."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig, named_config
from dsv3_jax.model import abstract_params
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import decode_step, prefill
from dsv3_jax.model.tensor_parallel import Step, tensor_parallel, tensor_shardings
from dsv3_jax.precision import Precision
from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.grouped_matmul import grouped_swiglu

V3_OF_FOUR_LAYERS = dataclasses.replace(
    named_config("deepseek-v3"), num_hidden_layers=4, first_k_dense_replace=1, num_nextn_predict_layers=0
)
BATCH, CONTEXT, PROMPT = 8, 8192, 1024
Program = tuple[Any, tuple, dict[str, Any]]


def _step(
    mesh: Mesh, step: Step, config: ModelConfig, precision: Precision, *inputs: tuple[int, ...]
) -> Program:
    """`step` with abstract weights and cache, cut over `tensor` where that is more than one device."""
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = tensor_shardings(mesh, config, precision)
    params = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        abstract_params(config, precision.weights),
        shardings,
    )
    cache = jax.eval_shape(lambda: init_cache(config, BATCH, CONTEXT, "bfloat16"))
    rest = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
        (*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in inputs), cache),
    )
    if mesh.size > 1:
        function = tensor_parallel(step, mesh, config, precision)
    else:
        function = functools.partial(step, config=config, precision=precision)
    # A lambda: donation goes by position, and the step's config and precision are keywords.
    return lambda *arguments: function(*arguments), (params, *rest), {"donate_argnums": len(inputs) + 1}


def v3_decode_step(mesh: Mesh, implementation: Any = None, activations: Any = "none") -> Program:
    """V3's sizes in all but depth: a dense layer, three layers of experts, embedding and head."""
    precision = Precision(weights="float8", activations=activations, implementation=implementation)
    return _step(mesh, decode_step, V3_OF_FOUR_LAYERS, precision, (BATCH,))


v3_decode_step_w8a8 = functools.partial(v3_decode_step, activations="float8")
v3_decode_step_of_references = functools.partial(v3_decode_step, implementation="reference")


def v3_prefill(mesh: Mesh) -> Program:
    """Prompts of 1024 tokens, as many as are read at a time."""
    precision = Precision(weights="float8")
    return _step(mesh, prefill, V3_OF_FOUR_LAYERS, precision, (BATCH, PROMPT), (BATCH,))


def experts_by_name(mesh: Mesh) -> Program:
    """Asks for the kernel by name."""
    whole = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    weight = BlockScaled(array((8, 256, 512), jnp.float8_e4m3fn), array((8, 2, 4), jnp.float32))

    def function(x: jax.Array, gate: BlockScaled, up: BlockScaled, sizes: jax.Array) -> jax.Array:
        return grouped_swiglu(x, gate, up, sizes, implementation="pallas")

    return function, (array((16, 512), jnp.bfloat16), weight, weight, array((8,), jnp.int32)), {}
