"""Conversion of a checkpoint folder to FP8 or BF16, a band of rows at a time, resumable after a kill.

FP8 -> BF16 is value * scale, the release's `fp8_cast_bf16.py` without a GPU; -> FP8 quantises exactly the
tensors that the release does, by `fp8.quantize`. Shards keep their names; a weight's scale goes into the
weight's file. A shard gets its name only when it is complete, so a rerun keeps those that are there and
redoes the others.
numpy only: no second is lost on importing JAX.
"""

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dsv3_jax.checkpoint import bands
from dsv3_jax.checkpoint.claim import claimed_folder, fingerprint
from dsv3_jax.checkpoint.folder import CONFIG_FILE, INDEX_FILE, Checkpoint, open_checkpoint
from dsv3_jax.checkpoint.fp8 import BLOCK, scale_shape
from dsv3_jax.checkpoint.hf_config import quantization_fields, write_index, write_json
from dsv3_jax.checkpoint.names import SCALE_SUFFIX, is_ignored, is_quantized_linear
from dsv3_jax.checkpoint.safetensors_file import (
    DTYPES,
    OpenFiles,
    SafetensorsWriter,
    TensorInfo,
    read_header,
)
from dsv3_jax.checkpoint.verify import verify
from dsv3_jax.checkpoint.workers import Work, progress_bar, run
from dsv3_jax.config import BlockQuantization, read_json_object
from dsv3_jax.errors import InputError

Spec = tuple[str, tuple[int, ...]]

_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class _Tensor(NamedTuple):
    """One tensor of the source and what becomes of it.

    Attributes:
        info: the tensor in the source.
        scale: its scales in the source, where it is FP8 there.
        dtype: its type in the target.
        ue8m0: its new scales are powers of two.
    """

    info: TensorInfo
    scale: TensorInfo | None
    dtype: str
    ue8m0: bool

    def specs(self) -> dict[str, Spec]:
        """What it becomes, by name: itself, and its scales where it is FP8."""
        specs: dict[str, Spec] = {self.info.name: (self.dtype, self.info.shape)}
        if self.dtype == "F8_E4M3":
            specs[self.info.name + SCALE_SUFFIX] = ("F32", scale_shape(self.info.shape))
        return specs


Shards = dict[str, list[_Tensor]]


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: Literal["bfloat16", "float8"],
    *,
    ue8m0: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a complete Hugging Face folder of the same model in another format.

    Linears become BF16, or FP8 with float32 scales for 128x128 blocks; all other tensors BF16, but
    `e_score_correction_bias` float32. `config.json` says so; tokenizer, generation config, templates and
    other small files are copied; the index comes last. Peak memory: a few megabytes a thread.

    Args:
        source: checkpoint folder in FP8, BF16, F16 or F32.
        target: a folder that is empty or does not exist (its parent must), or one in which the same
            conversion was interrupted, which then goes on; the result is the same to the byte.
        to: "bfloat16" or "float8".
        ue8m0: with "float8", scales rounded up to powers of two. An FP8 source is quantised anew.
        progress: called with the number of source bytes just read. None: a bar on stderr, if that is a
            terminal.

    Raises:
        InputError: `source` is no valid checkpoint or has that format already; `target` cannot be written, is
            not empty or too small; a value is not finite. If no shard was complete yet, nothing is left
            behind.
    """
    checkpoint = open_checkpoint(source)
    verify(checkpoint)
    shards = _shards(checkpoint, to, ue8m0)
    _refuse_needless(checkpoint, shards, to, ue8m0)
    quantization = BlockQuantization(scale_fmt="ue8m0" if ue8m0 else None) if to == "float8" else None
    request = {"to": to, "ue8m0": ue8m0, "source": fingerprint(checkpoint)}
    total = sum(tensor.info.nbytes for tensors in shards.values() for tensor in tensors)
    shown = progress_bar("converting", total) if progress is None else contextlib.nullcontext(progress)
    with claimed_folder(Path(target), request, list(shards)) as folder, OpenFiles() as files, shown as report:
        _check_space(folder, shards)
        for name, tensors in shards.items():
            if _is_complete(folder / name, _specs(tensors)):
                report(sum(tensor.info.nbytes for tensor in tensors))
                continue
            with SafetensorsWriter(folder / name, _specs(tensors)) as writer:
                run(_works(tensors, files, writer), report)
        _copy_small_files(checkpoint.folder, folder)
        write_json(folder / CONFIG_FILE, _converted_config(checkpoint.folder, quantization))
        if (checkpoint.folder / INDEX_FILE).exists():
            write_index(folder / INDEX_FILE, _sizes(shards))


def _refuse_needless(checkpoint: Checkpoint, shards: Shards, to: str, ue8m0: bool) -> None:
    quantization = checkpoint.config.quantization_config
    if ue8m0 and to != "float8":
        raise InputError("--ue8m0 is about FP8 scales; expected it with --to float8")
    if to == "float8" and quantization is not None and (not ue8m0 or quantization.scale_fmt == "ue8m0"):
        kind = "FP8 with ue8m0 scales" if quantization.scale_fmt else "FP8"
        raise InputError(f"{checkpoint.folder}: is {kind} already; nothing to convert")
    tensors = [tensor for shard in shards.values() for tensor in shard]
    if to == "bfloat16" and all(tensor.info.dtype == "BF16" for tensor in tensors if tensor.dtype == "BF16"):
        raise InputError(f"{checkpoint.folder}: is BF16 already; nothing to convert")


def _shards(checkpoint: Checkpoint, to: str, ue8m0: bool) -> Shards:
    """The tensors of every target file, by the file's name."""
    shards: Shards = {}
    for name, info in checkpoint.tensors.items():
        if is_ignored(name) or name.endswith(SCALE_SUFFIX):
            continue
        scale = checkpoint.tensors.get(name + SCALE_SUFFIX)
        dtype = "F8_E4M3" if to == "float8" and is_quantized_linear(name) else "BF16"
        if name.endswith("e_score_correction_bias"):
            dtype = "F32"
        shards.setdefault(info.path.name, []).append(_Tensor(info, scale, dtype, ue8m0))
    for tensors in shards.values():
        tensors.sort(key=lambda tensor: tensor.info.offset)
    return dict(sorted(shards.items()))


def _specs(tensors: list[_Tensor]) -> dict[str, Spec]:
    return {name: spec for tensor in tensors for name, spec in tensor.specs().items()}


def _sizes(shards: Shards) -> dict[str, tuple[str, int]]:
    """Tensor -> (file, bytes), of the target."""
    return {
        name: (file, math.prod(shape) * DTYPES[dtype].itemsize)
        for file, tensors in shards.items()
        for name, (dtype, shape) in _specs(tensors).items()
    }


def _is_complete(path: Path, specs: dict[str, Spec]) -> bool:
    if not path.exists():
        return False
    return {name: (info.dtype, info.shape) for name, info in read_header(path).items()} == specs


def _check_space(folder: Path, shards: Shards) -> None:
    """Better refused now than after hours."""
    needed = sum(nbytes for file, nbytes in _sizes(shards).values() if not (folder / file).exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free; expected at least {needed / 1e9:.1f} GB")


def _works(tensors: list[_Tensor], files: OpenFiles, writer: SafetensorsWriter) -> Iterator[Work]:
    for tensor in tensors:
        rows, columns = bands.matrix_shape(tensor.info)
        row_bytes = columns * DTYPES[tensor.info.dtype].itemsize
        fd = files.fd(tensor.info.path)
        scale_fd = files.fd(tensor.scale.path) if tensor.scale else -1
        for band in bands.band_bounds(0, rows, row_bytes, BLOCK):
            yield functools.partial(_convert_band, tensor, fd, scale_fd, band, writer)


def _convert_band(
    tensor: _Tensor, fd: int, scale_fd: int, band: tuple[int, int], writer: SafetensorsWriter
) -> int:
    info, dtype = tensor.info, DTYPES[tensor.dtype]
    stored = bands.read_rows(fd, info, *band)
    columns = stored.shape[1]
    if stored.dtype == dtype and tensor.scale is None:
        values = stored
    else:
        scale = bands.read_scale_rows(scale_fd, tensor.scale, *band) if tensor.scale else None
        values = bands.to_float32(stored, scale)
    if tensor.dtype == "F8_E4M3":
        values, scales = bands.to_float8(values, info, ue8m0=tensor.ue8m0)
        block_row_bytes = scales.shape[1] * scales.itemsize
        writer.write(info.name + SCALE_SUFFIX, scales, band[0] // BLOCK * block_row_bytes)
    writer.write(info.name, values.astype(dtype, copy=False), band[0] * columns * dtype.itemsize)
    return stored.nbytes


def _copy_small_files(source: Path, target: Path) -> None:
    """Copies tokenizer, generation config, templates, licence, remote code: all but weights and config."""
    for path in sorted(source.iterdir()):
        if path.name.endswith(_WEIGHT_SUFFIXES) or path.name.startswith(".") or path.name == CONFIG_FILE:
            continue
        if path.is_file():
            try:
                shutil.copyfile(path, target / path.name)
            except OSError as error:
                raise InputError(f"{target / path.name}: cannot be copied ({error.strerror})") from error


def _converted_config(source: Path, quantization: BlockQuantization | None) -> dict[str, Any]:
    """The source's config.json with what it says of number formats put right; everything else stays."""
    fields = read_json_object(source / CONFIG_FILE)
    fields.pop("quantization_config", None)
    if quantization is not None:
        fields["quantization_config"] = quantization_fields(quantization)
    fields["dtype" if "dtype" in fields and "torch_dtype" not in fields else "torch_dtype"] = "bfloat16"
    return fields
