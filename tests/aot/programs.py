"""Programs of known cost: each takes a mesh and returns a function, its arguments and the options of jax.jit."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ModelConfig, named_config
from dsv3_jax.model import abstract_params
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.functional import decode_step
from dsv3_jax.model.layout import row_major_scales
from dsv3_jax.precision import Precision

LAYERS, TOKENS, WIDTH = 4, 16, 12288
"""A layer's FP8 weight, 151 MB, is more than any VMEM holds."""
UNROLLED, OUTER, INNER = 8, 3, 5
V3_OF_TWO_LAYERS = dataclasses.replace(
    named_config("deepseek-v3"), num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0
)
V3_BATCH, V3_CONTEXT = 8, 8192
Program = tuple[Any, tuple, dict[str, Any]]


def array(mesh: Mesh, shape: tuple[int, ...], dtype: str, *spec: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def matmul(mesh: Mesh) -> Program:
    arguments = array(mesh, (256, 7168), "bfloat16"), array(mesh, (7168, 2048), "float8_e4m3fn")
    return lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32), arguments, {}


def _layer(x, w):
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _stack(mesh: Mesh) -> tuple:
    return array(mesh, (TOKENS, WIDTH), "bfloat16"), array(mesh, (LAYERS, WIDTH, WIDTH), "float8_e4m3fn")


def scan_of_dots(mesh: Mesh) -> Program:
    return (
        lambda x, stack: jax.lax.scan(lambda x, w: (_layer(x, w), None), x, stack)[0],
        _stack(mesh),
        {},
    )


def _block_matmul(index, x, stack, bytes_accessed: int | None = None):
    """x[M, K] @ stack[index][K, N] in blocks of [1024, 512], by a kernel that indexes into the whole stack."""
    (m, k), n, depth, columns = x.shape, stack.shape[2], 1024, 512

    def kernel(index_ref, x_ref, w_ref, out_ref, sum_ref):
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

        @pl.when(step == k // depth - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    claim = bytes_accessed and pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=bytes_accessed)
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((m, n), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n // columns, k // depth),
            in_specs=[
                pl.BlockSpec((m, depth), lambda j, i, layer: (0, i)),
                pl.BlockSpec((None, depth, columns), lambda j, i, layer: (layer[0], i, j)),
            ],
            out_specs=pl.BlockSpec((m, columns), lambda j, i, layer: (0, j)),
            scratch_shapes=[pltpu.VMEM((m, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=claim,
        name="matmul",
    )(index, x, stack)


def scan_of_kernels_on_slices(mesh: Mesh) -> Program:
    """The trap: scan hands the kernel a slice, which has to be copied out of the stack before a kernel sees it."""

    def layer(x, w):
        return _block_matmul(jnp.zeros(1, jnp.int32), x, w[None]), None

    return lambda x, stack: jax.lax.scan(layer, x, stack)[0], _stack(mesh), {}


def scan_of_indexing_kernels(mesh: Mesh, bytes_accessed: int | None = None) -> Program:
    def fun(x, stack):
        indices = jnp.arange(LAYERS, dtype=jnp.int32)[:, None]
        return jax.lax.scan(lambda x, i: (_block_matmul(i, x, stack, bytes_accessed), None), x, indices)[0]

    return fun, _stack(mesh), {}


claiming_kernels = functools.partial(scan_of_indexing_kernels, bytes_accessed=1_000_000)


def scan_of_all_reduces(mesh: Mesh) -> Program:
    """A column- and a row-parallel matmul and one all-reduce in each of LAYERS layers."""

    def layer(x, w):
        hidden = _layer(x, w[0])
        return jax.lax.psum(jnp.dot(hidden, w[1], preferred_element_type=jnp.float32), "x").astype(
            x.dtype
        ), None

    specs = P(), (P(None, None, "x"), P(None, "x", None))
    fun = jax.shard_map(lambda x, ws: jax.lax.scan(layer, x, ws)[0], in_specs=specs, out_specs=P())
    weights = (
        array(mesh, (LAYERS, 4096, 2048), "float8_e4m3fn", None, None, "x"),
        array(mesh, (LAYERS, 2048, 4096), "float8_e4m3fn", None, "x", None),
    )
    return fun, (array(mesh, (TOKENS, 4096), "bfloat16"), weights), {}


def _collective(mesh: Mesh, function, out: P) -> Program:
    """A shard is 1024 x 1024 x 2 bytes."""
    fun = jax.shard_map(function, in_specs=P("x"), out_specs=out, check_vma=False)
    return fun, (array(mesh, (8192, 1024), "bfloat16", "x"),), {}


def all_to_all(mesh: Mesh) -> Program:
    return _collective(mesh, lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), P("x"))


def all_gather(mesh: Mesh) -> Program:
    return _collective(mesh, lambda x: jax.lax.all_gather(x, "x", tiled=True), P())


def reduce_scatter(mesh: Mesh) -> Program:
    return _collective(mesh, lambda x: jax.lax.psum_scatter(x, "x", tiled=True), P("x"))


def permute(mesh: Mesh) -> Program:
    n = mesh.shape["x"]
    return _collective(mesh, lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % n) for i in range(n)]), P("x"))


def cache_update(mesh: Mesh) -> Program:
    """One token of 640 written into each of 16 rows of a donated cache."""
    arguments = (
        array(mesh, (16, 4096, 640), "bfloat16"),
        array(mesh, (16, 1, 640), "bfloat16"),
        array(mesh, (), "int32"),
    )
    update = jax.lax.dynamic_update_slice
    return lambda cache, new, i: update(cache, new, (0, i, 0)), arguments, {"donate_argnums": 0}


def copied_cache_update(mesh: Mesh) -> Program:
    """The same without donation: the cache has to be copied first."""
    fun, arguments, _ = cache_update(mesh)
    return fun, arguments, {}


def gather_rows(mesh: Mesh) -> Program:
    arguments = array(mesh, (65536, 2048), "bfloat16"), array(mesh, (64,), "int32")
    return lambda table, rows: table[rows], arguments, {}


def padded_increment(mesh: Mesh) -> Program:
    """No dimension fills whole tiles of [8, 128]: 400,000 bytes occupy 409,600."""
    return lambda x: x + 1, (array(mesh, (1000, 200), "bfloat16"),), {}


def nested_loops(mesh: Mesh) -> Program:
    """2 x 3 trips around a layer."""
    loop = jax.lax.fori_loop
    arguments = array(mesh, (TOKENS, WIDTH), "bfloat16"), array(mesh, (WIDTH, WIDTH), "float8_e4m3fn")
    return (
        lambda x, w: loop(0, 2, lambda _, x: loop(1, 4, lambda _, x: _layer(x, w), x), x),
        arguments,
        {},
    )


def open_loop(mesh: Mesh) -> Program:
    arguments = array(mesh, (TOKENS, WIDTH), "bfloat16"), array(mesh, (WIDTH, WIDTH), "float8_e4m3fn")
    return (
        lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: _layer(x, w), x),
        (*arguments, array(mesh, (), "int32")),
        {},
    )


def _scores(mesh: Mesh, key_head) -> Program:
    """Scores of 32 query heads on 4 key heads; `key_head` says which key head the query head h uses."""

    def kernel(q, k, out):
        out[0] = jnp.dot(q[0], k[0].T, preferred_element_type=jnp.float32)

    def fun(q, k):
        return pl.pallas_call(
            kernel,
            jax.ShapeDtypeStruct((32, 128, 1024), jnp.float32),
            grid=(32,),
            in_specs=[
                pl.BlockSpec((1, 128, 128), lambda h: (h, 0, 0)),
                pl.BlockSpec((1, 1024, 128), lambda h: (key_head(h), 0, 0)),
            ],
            out_specs=pl.BlockSpec((1, 128, 1024), lambda h: (h, 0, 0)),
            name="scores",
        )(q, k)

    return fun, (array(mesh, (32, 128, 128), "bfloat16"), array(mesh, (4, 1024, 128), "bfloat16")), {}


grouped_heads = functools.partial(_scores, key_head=lambda h: h // 8)
strided_heads = functools.partial(_scores, key_head=lambda h: h % 4)


def routed_blocks(mesh: Mesh) -> Program:
    """Blocks of a table chosen by prefetched scalars, as experts are chosen by a router."""

    def kernel(chosen, table, out):
        out[...] = table[...]

    def fun(chosen, table):
        return pl.pallas_call(
            kernel,
            jax.ShapeDtypeStruct((16, 256, 1024), jnp.float32),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(16,),
                in_specs=[pl.BlockSpec((1, 256, 1024), lambda i, chosen: (chosen[i], 0, 0))],
                out_specs=pl.BlockSpec((1, 256, 1024), lambda i, chosen: (i, 0, 0)),
            ),
            name="routed",
        )(chosen, table)

    return fun, (array(mesh, (16,), "int32"), array(mesh, (256, 256, 1024), "float32")), {}


def _row_sums(mesh: Mesh, name: str, blocks_a_trip: int) -> Program:
    """exp of UNROLLED blocks a row block, OUTER x INNER times; in a loop of fewer trips with more blocks a trip."""

    def kernel(x, out):
        def outer(i, _):
            def inner(j, total):
                for k in range(blocks_a_trip):
                    total += jnp.exp(x[i, pl.ds((j * blocks_a_trip + k) * 8, 8), :])
                return total

            out[i] = jax.lax.fori_loop(0, INNER * UNROLLED // blocks_a_trip, inner, jnp.zeros((8, 128)))
            return 0

        jax.lax.fori_loop(0, OUTER, outer, 0)

    def fun(x):
        rows = INNER * UNROLLED * 8
        return pl.pallas_call(
            kernel,
            jax.ShapeDtypeStruct((4 * OUTER, 8, 128), jnp.float32),
            grid=(4,),
            in_specs=[pl.BlockSpec((OUTER, rows, 128), lambda i: (i, 0, 0))],
            out_specs=pl.BlockSpec((OUTER, 8, 128), lambda i: (i, 0, 0)),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            name=name,
        )(x)

    return fun, (array(mesh, (4 * OUTER, INNER * UNROLLED * 8, 128), "float32"),), {}


looped_sums = functools.partial(_row_sums, name="looped_sums", blocks_a_trip=UNROLLED)
rolled_sums = functools.partial(_row_sums, name="rolled_sums", blocks_a_trip=UNROLLED // 2)


def stacked_results(mesh: Mesh) -> Program:
    """A scan that stacks 8 results of 16 MB: each trip writes its own row in place."""

    def step(x, i):
        return x, jnp.sin(x * i)

    arguments = (array(mesh, (2048, 2048), "float32"),)
    return lambda x: jax.lax.scan(step, x, jnp.arange(8.0))[1], arguments, {}


def _decode_step(mesh: Mesh, config: ModelConfig, batch: int, context: int) -> Program:
    """The model's decode step, FP8 weights as they are loaded for a TPU, a BF16 cache."""
    cache = jax.eval_shape(lambda: init_cache(config, batch, context, "bfloat16"))
    params, tokens, cache = jax.tree.map(
        lambda a: array(mesh, a.shape, a.dtype),
        (abstract_params(config, "float8"), jax.ShapeDtypeStruct((batch,), jnp.int32), cache),
    )
    step = functools.partial(decode_step, config=config, precision=Precision(weights="float8"))
    arguments = row_major_scales(params), tokens, cache
    return lambda params, tokens, cache: step(params, tokens, cache), arguments, {"donate_argnums": 2}


def tiny_decode_step(mesh: Mesh) -> Program:
    """At the size of the checkpoint that the package carries."""
    return _decode_step(mesh, named_config("tiny"), 2, 64)


def v3_decode_step(mesh: Mesh) -> Program:
    """V3's sizes in all but depth: a dense layer, a layer of experts, embedding and head fit one chip."""
    return _decode_step(mesh, V3_OF_TWO_LAYERS, V3_BATCH, V3_CONTEXT)
