"""Tensors in bands of rows: read, brought to float32, and stored in another format, a few megabytes at a
time.

Shared by import and conversion; numpy only. A one-dimensional tensor is taken as a column.
"""

from collections.abc import Iterator

import numpy as np

from dsv3_jax.checkpoint import fp8
from dsv3_jax.checkpoint.safetensors_file import DTYPES, TensorInfo, read_into
from dsv3_jax.errors import InputError

# A read of 1 MiB keeps the kernel's readahead going and the bytes in the cache for what is done to them next;
# larger blocks measured half as fast from a cold disk.
BAND_BYTES = 1 << 20


def matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """(rows, columns) of a tensor of one or two dimensions."""
    rows, *columns = info.shape
    return rows, columns[0] if columns else 1


def band_bounds(start: int, stop: int, row_bytes: int, align: int) -> Iterator[tuple[int, int]]:
    """Cuts rows [start, stop) into bands of about BAND_BYTES, each but the last a multiple of `align` rows."""
    rows = max(align, BAND_BYTES // row_bytes // align * align)
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)


def read_rows(fd: int, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a tensor in its own dtype, [stop - start, columns].

    Raises:
        InputError: the file is truncated or cannot be read; FP8 data that holds a NaN; scales that are not
            finite.
    """
    columns, dtype = matrix_shape(info)[1], DTYPES[info.dtype]
    memory = np.empty((stop - start) * columns * dtype.itemsize, np.uint8)
    read_into(fd, info.offset + start * columns * dtype.itemsize, memory, info)
    check_values(memory, info)
    return memory.view(dtype).reshape(stop - start, columns)


def check_values(memory: np.ndarray, info: TensorInfo) -> None:
    """Refuses FP8 values that are NaN, in bytes just read. Raises InputError, naming the tensor.

    No release has any; one would spread over a whole block, and decoders that work by shifts turn it into
    480.
    """
    if info.dtype == "F8_E4M3" and fp8.has_nan(memory):
        raise InputError(f"{info.path}: corrupt: tensor {info.name} holds NaN; expected finite FP8 values")


def read_scale_rows(fd: int, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """The scales of weight rows [start, stop), float32 [row blocks, column blocks]; 128 divides `start`."""
    return read_rows(fd, info, start // fp8.BLOCK, -(-stop // fp8.BLOCK))


def to_float32(values: np.ndarray, scale_inv: np.ndarray | None) -> np.ndarray:
    """A band in any format, with its rows of scales where it is FP8, as float32 of the same shape."""
    if scale_inv is not None:
        return fp8.dequantize(values.view(np.uint8), scale_inv)
    return values.astype(np.float32, copy=False)


def to_float8(values: np.ndarray, info: TensorInfo, *, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`fp8.quantize` of a float32 band. Raises InputError, naming the tensor, where a value is not finite."""
    quantized, scale_inv = fp8.quantize(values, ue8m0=ue8m0)
    if not np.isfinite(scale_inv).all():
        raise InputError(f"{info.path}: tensor {info.name} holds NaN or infinity; FP8 needs finite values")
    return quantized, scale_inv
