"""AMD's GPUs take plain XLA: no compiler for them is at hand, so their program is exported and looked at."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from dsv3_jax.config import named_config
from dsv3_jax.model import abstract_params
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import decode_step, prefill
from dsv3_jax.precision import Precision

MI300X = AbstractMesh(
    (),
    (),
    (),
    abstract_device=AbstractDevice(device_kind="AMD Instinct MI300X", num_cores=304, platform="gpu"),
)


@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_steps_export_without_a_kernel(step: str) -> None:
    config, precision = named_config("tiny"), Precision(weights="float8")
    params = abstract_params(config, "float8")
    cache = jax.eval_shape(lambda: init_cache(config, 2, 128, "bfloat16"))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((2, 40), jnp.int32)
    function, arguments = {
        "decode": (decode_step, (params, tokens, cache)),
        "prefill": (prefill, (params, prompts, tokens, cache)),
    }[step]
    with use_abstract_mesh(MI300X):
        fixed = functools.partial(function, config=config, precision=precision)
        exported = export.export(jax.jit(fixed), platforms=["rocm"])(*arguments)
    module = exported.mlir_module()
    assert "mosaic" not in module
    assert "tpu_custom_call" not in module
    assert "f8E4M3FN" in module
