"""`mla_decode` on Blackwell (sm_100a, tcgen05)."""

from jax import Array


def mla_decode(
    q_latent: Array,
    q_rope: Array,
    cache: Array,
    lengths: Array,
    scale: float,
    layer: Array | int,
    cache_scales: Array | None,
    page_table: Array | None,
) -> tuple[Array, Array]:
    """Arguments as of the public function; bfloat16 queries, a bfloat16 or float8_e4m3fn cache."""
    raise NotImplementedError
