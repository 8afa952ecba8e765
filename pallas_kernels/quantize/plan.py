"""What the kernels of `quantize` take, and how they cut it."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chip import chip

CHUNK = 32
"""Rows that are worked on together: the sublane tile of FP8."""

BLOCK_BYTES = 1 << 19


def unsupported(x: Array) -> str | None:
    """Why a kernel cannot quantise x; None if it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{x.dtype} (expected bfloat16 or float32)"
    return "an empty array" if x.size == 0 else None


def block_rows(num_rows: int, bytes_a_row: int) -> int:
    """Rows of a grid step: half a MB, so that the transfer of the first block is short and a step's cost is not."""
    share = -(-num_rows // chip().cores)
    rows = min(max(BLOCK_BYTES // bytes_a_row, CHUNK), share)
    return min(-(-rows // CHUNK) * CHUNK, num_rows)
