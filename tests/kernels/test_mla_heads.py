import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_heads import HeadDims, absorb_queries, head_values
from pallas_kernels.quantize import quantize_weight
from pallas_kernels.rotary import rotate
from tests.kernels.definitions import dequantise

RANDOM = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def close(got: object, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Sums of some hundred float32 products: 1e-5 of the largest is a few roundings."""
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
@pytest.mark.parametrize(("rows", "heads", "rank"), [(1, 1, 128), (3, 2, 256), (130, 16, 128), (9, 24, 128)])
def test_products_of_every_head(implementation: str, rows: int, heads: int, rank: int) -> None:
    dims, layer = HeadDims(128, 64, 128), 1
    stack = quantize_weight(jnp.asarray(random(2, heads * 256, rank)))
    matrices = dequantise(np.asarray(stack.values[layer]), np.asarray(stack.scales[layer]), 128)
    keys, values = np.split(matrices.reshape(heads, 256, rank), 2, axis=1)
    q, rope, context = random(rows, heads, 192), random(rows, 64), random(rows, heads, rank)
    q_latent, q_rope = absorb_queries(
        jnp.asarray(q.reshape(rows, -1)),
        jnp.asarray(rope),
        stack,
        dims,
        layer=layer,
        implementation=implementation,
    )
    close(q_latent, np.einsum("mhd,hdr->mhr", q[:, :, :128], keys))
    even, odd = q[:, :, 128::2], q[:, :, 129::2]
    cos, sin = rope[:, None, :32], rope[:, None, 32:]
    close(q_rope, np.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1))
    got = head_values(jnp.asarray(context), stack, dims, layer=layer, implementation=implementation)
    close(got, np.einsum("mhr,hdr->mhd", context, values).reshape(rows, -1))


@pytest.mark.parametrize(
    ("heads", "nope", "value", "rank"),
    [(4, 40, 24, 96), (1, 12, 8, 30), (6, 64, 64, 8192), (3, 40, 1, 130)],
    ids=["one tile", "one head", "tiles of two heads", "edge blocks"],
)
def test_reference_takes_heads_of_any_size(heads: int, nope: int, value: int, rank: int) -> None:
    dims = HeadDims(nope, 8, value)
    weight = quantize_weight(jnp.asarray(random(heads * (nope + value), rank)))
    matrices = dequantise(np.asarray(weight.values), np.asarray(weight.scales), 128)
    matrices = matrices.reshape(heads, nope + value, rank)
    q, rope, context = random(2, heads, nope + 8), random(2, 8), random(2, heads, rank)
    q_latent, q_rope = absorb_queries(jnp.asarray(q.reshape(2, -1)), jnp.asarray(rope), weight, dims)
    close(q_latent, np.einsum("mhd,hdr->mhr", q[:, :, :nope], matrices[:, :nope]))
    close(q_rope, np.asarray(rotate(jnp.asarray(q[:, :, nope:]), jnp.asarray(rope[:, None]))))
    got = head_values(jnp.asarray(context), weight, dims)
    close(got, np.einsum("mhr,hdr->mhd", context, matrices[:, nope:]).reshape(2, -1))


def test_kernel_says_which_heads_it_does_not_take() -> None:
    weight = quantize_weight(jnp.asarray(random(2 * 64, 128)))
    with pytest.raises(
        ValueError, match="absorb_queries: the Pallas kernel does not take heads of 40 and 24"
    ):
        absorb_queries(
            jnp.ones((1, 96)), jnp.ones((1, 8)), weight, HeadDims(40, 8, 24), implementation="pallas"
        )
