"""Do the files hold the model that `config.json` describes? Answered from headers alone."""

import dataclasses

from dsv3_jax.checkpoint.folder import Checkpoint
from dsv3_jax.checkpoint.names import copied_tensors, expected_tensors, is_ignored, mtp_layer_numbers
from dsv3_jax.checkpoint.safetensors_file import TensorInfo
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError

FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Tensors of the files against tensors of the model.

    Attributes:
        config: the checkpoint's config, with `num_nextn_predict_layers` 0 where the files lack the MTP
            modules.
        expected: number of tensors that the model asks for, with the copies of them that the files hold.
        as_expected: how many of these are there with the right shape and dtype.
        missing, unexpected, wrong_shape, wrong_dtype: one line a tensor, starting with its name.
    """

    config: ModelConfig
    expected: int
    as_expected: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    wrong_dtype: tuple[str, ...]

    def agrees(self) -> bool:
        """Whether nothing is missing, unexpected or wrong."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def problems(self) -> tuple[str, ...]:
        """All lines, each with its kind."""
        return (
            *(f"missing: {line}" for line in self.missing),
            *(f"unexpected: {line}" for line in self.unexpected),
            *(f"wrong shape: {line}" for line in self.wrong_shape),
            *(f"wrong dtype: {line}" for line in self.wrong_dtype),
        )

    def summary(self) -> str:
        """The numbers, as in "2 missing, 1 unexpected"."""
        counts = {
            "missing": len(self.missing),
            "unexpected": len(self.unexpected),
            "of wrong shape": len(self.wrong_shape),
            "of wrong dtype": len(self.wrong_dtype),
        }
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def compare(checkpoint: Checkpoint) -> Comparison:
    """Compares the headers with the model, by Hugging Face's names."""
    config = _config_of_files(checkpoint)
    wanted = _wanted(config, checkpoint.tensors)
    missing, wrong_shape, wrong_dtype, as_expected = [], [], [], 0
    for name, (shape, dtypes) in wanted.items():
        info = checkpoint.tensors.get(name)
        shape_text, dtype_text = str(list(shape)), " or ".join(dtypes)
        if info is None:
            where = f" in {checkpoint.misplaced[name]}" if name in checkpoint.misplaced else ""
            missing.append(f"{name}: expected {dtype_text} {shape_text}{where}")
            continue
        if info.shape != shape:
            wrong_shape.append(f"{name}: {list(info.shape)} in {info.path.name}; expected {shape_text}")
        if info.dtype not in dtypes:
            wrong_dtype.append(f"{name}: {info.dtype} in {info.path.name}; expected {dtype_text}")
        as_expected += info.shape == shape and info.dtype in dtypes
    unexpected = [
        f"{name}: {info.dtype} {list(info.shape)} in {info.path.name}; expected no such tensor"
        for name, info in checkpoint.tensors.items()
        if name not in wanted and not is_ignored(name)
    ]
    unexpected += [
        f"{name}: the index names it in {file}, which does not hold it; expected no such tensor"
        for name, file in checkpoint.misplaced.items()
        if name not in wanted and not is_ignored(name)
    ]
    lists = [tuple(sorted(lines)) for lines in (missing, unexpected, wrong_shape, wrong_dtype)]
    return Comparison(config, len(wanted), as_expected, *lists)


def verify(checkpoint: Checkpoint) -> ModelConfig:
    """Checks that the files hold the model.

    Returns:
        The config, with `num_nextn_predict_layers` 0 where the files lack the MTP modules.

    Raises:
        InputError: its details name every tensor that is missing, unexpected, or of wrong shape or dtype.
    """
    result = compare(checkpoint)
    if not result.agrees():
        raise InputError(
            f"{checkpoint.folder}: the tensors are not those of the model in config.json "
            f"({result.as_expected} of {result.expected} as expected; {result.summary()})",
            result.problems(),
        )
    return result.config


def _config_of_files(checkpoint: Checkpoint) -> ModelConfig:
    config = checkpoint.config
    prefixes = tuple(f"model.layers.{number}." for number in mtp_layer_numbers(config))
    names = (*checkpoint.tensors, *checkpoint.misplaced)
    if prefixes and not any(name.startswith(prefixes) for name in names):
        return dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def _wanted(
    config: ModelConfig, tensors: dict[str, TensorInfo]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """name -> (shape, dtypes that will do)."""
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for tensor in expected_tensors(config).values():
        if tensor.linear and config.quantization_config is not None:
            scale = tensor.scale()
            wanted[tensor.name] = (tensor.shape, ("F8_E4M3",))
            wanted[scale.name] = (scale.shape, ("F32",))
        else:
            wanted[tensor.name] = (tensor.shape, FLOAT_DTYPES)
    for name, shape in copied_tensors(config).items():
        if name in tensors:
            wanted[name] = (shape, FLOAT_DTYPES)
    return wanted
