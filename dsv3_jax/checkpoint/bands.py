"""Tensors in bands of rows of about a megabyte: read, brought to float32, brought to FP8.

Shared by import and conversion; numpy only. A one-dimensional tensor is taken as a column.
"""

from collections.abc import Iterator

import numpy as np

from dsv3_jax.checkpoint import fp8
from dsv3_jax.checkpoint.names import SCALE_SUFFIX
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
    """Cuts rows [start, stop) into bands of about BAND_BYTES, all but the last whole multiples of `align`."""
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
    """Refuses FP8 values that are NaN and scales that are not finite, in bytes just read (uint8).

    No release has any. One NaN spreads over all tokens, and decoders that work by shifts read it as 480.

    Raises:
        InputError: names the tensor.
    """
    if info.dtype == "F8_E4M3":
        finite = not fp8.has_nan(memory)
    elif info.name.endswith(SCALE_SUFFIX):
        finite = bool(np.isfinite(memory.view(np.float32)).all())
    else:
        return
    if not finite:
        raise InputError(f"{info.path}: corrupt: tensor {info.name} holds NaN; expected finite {info.dtype}")


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
