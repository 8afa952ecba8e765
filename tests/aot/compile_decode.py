"""Run by test_tpu.py in a process of its own: the jitted decode step of a config, compiled for one absent TPU chip."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import named_config
from dsv3_jax.model import abstract_params
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import decode_step
from dsv3_jax.precision import Precision


def compile_for(topology_name: str, config_name: str) -> None:
    """Prints the bytes of arguments and temporaries that the TPU compiler plans."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    mesh = Mesh(np.array(topology.devices[:1]), ("tensor",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    config = named_config(config_name)
    cache = jax.eval_shape(lambda: init_cache(config, 2, 64, "bfloat16"))
    step = jax.jit(decode_step, static_argnames=("config", "precision"), donate_argnames="cache")
    arguments = place((abstract_params(config, "float8"), jax.ShapeDtypeStruct((2,), jnp.int32), cache))
    compiled = step.lower(*arguments, config=config, precision=Precision(weights="float8")).compile()
    memory = compiled.memory_analysis()
    print(memory.argument_size_in_bytes, memory.temp_size_in_bytes)


if __name__ == "__main__":
    compile_for(*sys.argv[1:])
