"""safetensors files: headers, byte ranges into given memory, and a writer that streams tensors one at a time.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header that gives
every tensor's dtype, shape and byte range, then the data without gaps. The `safetensors` package's numpy
reader knows no float8 and copies every tensor once more, hence this one.
"""

import dataclasses
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from dsv3_jax.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
SCRATCH_SUFFIX = ".partial"

DTYPES: dict[str, np.dtype] = {  # in the order in which the safetensors package sorts them
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}
# Types that no model of the family holds, known so that a file with one is read and the tensor itself named.
_OTHER_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2}
_OTHER_ITEM_BYTES |= {"U32": 4, "I32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _OTHER_ITEM_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name in the file, Hugging Face's.
        dtype: safetensors' name of its type, such as "F8_E4M3".
        shape: its dimensions; row-major.
        path: the file.
        offset: first byte, counted from the start of the file.
        nbytes: bytes of data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def dtype_name(dtype: np.dtype | type) -> str:
    """safetensors' name of a numpy or ml_dtypes type. Raises InputError for one that no checkpoint holds."""
    for name, known in DTYPES.items():
        if known == np.dtype(dtype):
            return name
    raise InputError(f"dtype {np.dtype(dtype)}: expected one of {', '.join(map(str, DTYPES.values()))}")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of one file; no tensor data is read.

    Returns:
        name -> TensorInfo, in the order of the header.

    Raises:
        InputError: the file cannot be read, is truncated, or its header is not that of a safetensors file.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise InputError(f"{path}: truncated: {file_bytes} bytes; expected a safetensors file")
            if header_bytes > MAX_HEADER_BYTES:
                raise InputError(
                    f"{path}: corrupt: header of {header_bytes} bytes; expected at most {MAX_HEADER_BYTES}"
                )
            if 8 + header_bytes > file_bytes:
                raise InputError(
                    f"{path}: truncated: {file_bytes} bytes; expected {8 + header_bytes} for the header alone"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: corrupt: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: corrupt: the header is not a JSON object")
    data_start = 8 + header_bytes
    infos = {
        name: _tensor_info(path, name, entry, data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_coverage(path, infos, data_start, file_bytes)
    return infos


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{path}: corrupt: tensor {name} lacks shape or data_offsets: {entry!r}")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise InputError(
            f"{path}: tensor {name} has dtype {dtype!r}; expected one of {' '.join(_ITEM_BYTES)}"
        )
    start, end = offsets
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - start != nbytes:
        raise InputError(
            f"{path}: corrupt: tensor {name} spans {end - start} bytes; {dtype} {shape} expected {nbytes}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_coverage(path: Path, infos: Mapping[str, TensorInfo], data_start: int, file_bytes: int) -> None:
    """The data must be covered without gap or overlap, and end where the file ends."""
    position = data_start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            problem = "overlaps the tensor before it" if info.offset < position else "leaves a gap before it"
            raise InputError(f"{path}: corrupt: tensor {info.name} {problem}")
        position += info.nbytes
    if position > file_bytes:
        raise InputError(f"{path}: truncated: {file_bytes} bytes; expected {position} by its header")
    if position < file_bytes:
        raise InputError(f"{path}: corrupt: {file_bytes} bytes; expected {position} by its header")


def read_into(fd: int, offset: int, memory: np.ndarray, info: TensorInfo) -> None:
    """Fills `memory` (uint8, contiguous) from `offset` of an open file.

    Args:
        info: the tensor that the bytes belong to; errors name it and its file.

    Raises:
        InputError: the file ends too early or cannot be read.
    """
    view, done = memoryview(memory), 0  # pyright: ignore[reportArgumentType]
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise InputError(f"{info.path}: tensor {info.name} cannot be read ({error.strerror})") from error
        if count == 0:
            end = os.fstat(fd).st_size
            raise InputError(
                f"{info.path}: truncated: ends at byte {end}; tensor {info.name} goes on to "
                f"{offset + len(view)}"
            )
        done += count


class OpenFiles:
    """Descriptors of the files that are being read, opened when first asked for. A context manager."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def fd(self, path: Path) -> int:
        """The descriptor of `path`. Not for use by several threads at once. Raises InputError."""
        if path not in self._fds:
            try:
                self._fds[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        return self._fds[path]


class SafetensorsWriter:
    """Writes one safetensors file: the header first, then each tensor's bytes as they come, in any order.

    The file grows under a scratch name and appears under its own when the `with` block ends without an
    exception; until then, and after a kill, there is no file of that name.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]):
        """Creates the file and writes its header.

        Args:
            path: the file; replaced if it exists.
            shapes: name -> (safetensors dtype, shape) of every tensor that will be written.

        Raises:
            InputError: the file cannot be created.
        """
        self.path = path
        self._scratch = path.with_name(path.name + SCRATCH_SUFFIX)
        self._ranges: dict[str, tuple[int, int]] = {}
        header = self._layout(shapes)
        try:
            self._fd = os.open(self._scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        self._missing = sum(nbytes for _, nbytes in self._ranges.values())
        self._lock = threading.Lock()
        self._pwrite(header, 0)

    def _layout(self, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
        # Wide types first, as the safetensors package lays them out: then every tensor is aligned to its
        # type.
        rank = {dtype: -place for place, dtype in enumerate(DTYPES)}
        order = sorted(shapes, key=lambda name: (rank[shapes[name][0]], name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in order:
            dtype, shape = shapes[name]
            end = position + math.prod(shape) * _ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            self._ranges[name] = (position, end - position)
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._ranges = {name: (start + begin, nbytes) for name, (begin, nbytes) in self._ranges.items()}
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, data: np.ndarray, offset: int = 0) -> None:
        """Writes a tensor, or the part of it that starts `offset` bytes into it; every byte exactly once.

        Threads may write at the same time.

        Raises:
            InputError: the file system refuses (full, for instance).
            ValueError: the part lies outside the tensor.
        """
        start, nbytes = self._ranges[name]
        if offset + data.nbytes > nbytes:
            raise ValueError(f"{name}: {data.nbytes} bytes at {offset}; expected at most {nbytes} in all")
        self._pwrite(np.ascontiguousarray(data).reshape(-1).view(np.uint8), start + offset)
        with self._lock:
            self._missing -= data.nbytes

    def _pwrite(self, data: bytes | np.ndarray, offset: int) -> None:
        view, done = memoryview(data), 0  # pyright: ignore[reportArgumentType]
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._missing == 0:
                os.fsync(self._fd)
                self._scratch.replace(self.path)
        except OSError as failure:
            raise InputError(f"{self.path}: cannot be written ({failure.strerror})") from failure
        finally:
            os.close(self._fd)
            self._scratch.unlink(missing_ok=True)
        if kind is None and self._missing:
            raise ValueError(f"{self.path}: {self._missing} bytes of its tensors were not written")
