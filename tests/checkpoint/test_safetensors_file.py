import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv3_jax.checkpoint.safetensors_file import SafetensorsWriter, dtype_name, read_header, read_into
from dsv3_jax.errors import InputError
from tests.checkpoint.synthetic import NUMPY_TYPES, same_bits


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"b.odd": (3, 5), "a": (4,), "c": (2, 3), "d.empty": (0, 4)}
    return {
        f"{name}.{kind}": rng.normal(size=shape).astype(dtype)
        for name, shape in shapes.items()
        for kind, dtype in NUMPY_TYPES.items()
    }


def test_reads_what_the_safetensors_package_writes(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert infos.keys() == arrays.keys()
    with path.open("rb") as file:
        for name, info in infos.items():
            memory = np.empty(info.nbytes, np.uint8)
            read_into(file.fileno(), info.offset, memory, info)
            assert same_bits(memory.view(NUMPY_TYPES[info.dtype]).reshape(info.shape), arrays[name])


def test_writes_the_bytes_that_the_safetensors_package_writes(tmp_path, arrays):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_file(arrays, theirs, metadata={"format": "pt"})
    specs = {name: (dtype_name(array.dtype), array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(ours, specs) as writer:
        for name, array in reversed(arrays.items()):
            flat, half = array.reshape(-1), array.size // 2
            writer.write(name, flat[half:], half * array.itemsize)
            writer.write(name, flat[:half])
    assert ours.read_bytes() == theirs.read_bytes()


def test_writer_leaves_no_file_when_interrupted_or_incomplete(tmp_path):
    path = tmp_path / "x.safetensors"
    specs = {"a": ("F32", (2, 2)), "b": ("F32", (1,))}
    for interrupted, error in ((True, KeyboardInterrupt), (False, ValueError)):
        with pytest.raises(error):
            write_first_only(path, specs, interrupted)
        assert list(tmp_path.iterdir()) == []


def write_first_only(path: Path, specs: dict, interrupted: bool) -> None:
    with SafetensorsWriter(path, specs) as writer:
        writer.write("a", np.zeros((2, 2), np.float32))
        if interrupted:
            raise KeyboardInterrupt


def test_writer_refuses_more_than_the_tensor(tmp_path):
    with SafetensorsWriter(tmp_path / "x.safetensors", {"a": ("F32", (2, 2))}) as writer:
        with pytest.raises(ValueError, match="a: 16 bytes at 4"):
            writer.write("a", np.zeros((2, 2), np.float32), 4)
        writer.write("a", np.zeros((2, 2), np.float32))


def test_writer_names_a_file_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/x\.safetensors: cannot be written"):
        SafetensorsWriter(tmp_path / "file" / "x.safetensors", {"a": ("F32", (1,))})


def write_raw(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": entry(0, 8, [2])}, b"1234", "truncated"),
        ({"a": entry(0, 4, [1])}, b"12345678", "corrupt: .* expected"),
        ({"a": entry(0, 8, [3])}, b"12345678", "tensor a spans 8 bytes"),
        ({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, b"123456", "tensor b overlaps"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"123456789012", "tensor b leaves a gap"),
        ({"a": entry(4, 8, [1])}, b"12345678", "tensor a leaves a gap"),
        ({"a": entry(0, 4, [-1])}, b"1234", "tensor a lacks shape"),
        ({"a": entry(0, 4, [1], "F5")}, b"1234", "tensor a has dtype 'F5'"),
        ({"a": entry(0, 4, [True])}, b"1234", "tensor a lacks shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "tensor a lacks shape or data_offsets"),
        ({"a": []}, b"", "tensor a lacks"),
        ([1], b"", "not a JSON object"),
        (b"{nonsense", b"", "not JSON"),
    ],
)
def test_bad_headers_are_refused_by_file(tmp_path, header, data, message):
    path = tmp_path / "bad.safetensors"
    write_raw(path, header, data)
    with pytest.raises(InputError, match=rf"bad\.safetensors: .*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "truncated"),
        (b"\x08\x00", "truncated"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 1 << 40), "header of 1099511627776 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "header of"),
    ],
)
def test_files_that_are_cut_or_no_safetensors_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_header(path)


def test_file_cut_after_its_header_was_read_is_named_with_its_tensor(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    save_file(arrays, path)
    info = max(read_header(path).values(), key=lambda info: info.offset + info.nbytes)
    with path.open("rb+") as file:
        file.truncate(info.offset + info.nbytes - 1)
        with pytest.raises(InputError, match=rf"x\.safetensors: truncated.*{info.name}"):
            read_into(file.fileno(), info.offset, np.empty(info.nbytes, np.uint8), info)
