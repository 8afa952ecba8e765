"""Run by test_load.py in a process with four simulated devices: sharded loads equal plain ones, read once."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv3_jax.checkpoint import load_params, open_checkpoint
from tests.checkpoint.synthetic import same_bits
from tests.checkpoint.test_load import read_calls_bytes

MESH = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))


def axis_sharding(axis: int, names, leaf: jax.Array) -> NamedSharding:
    """Cuts one axis (from the end) over mesh axes where it divides; else replicates."""
    parts = np.prod([MESH.shape[name] for name in names], dtype=int)
    spec: list = [None] * leaf.ndim
    if leaf.ndim >= axis and leaf.shape[-axis] % parts == 0:
        spec[-axis] = names
    return NamedSharding(MESH, PartitionSpec(*spec))


def layouts(plain):
    """Sharding trees: rows, columns, experts, both, replicated, one device, and none at some leaves."""
    yield "rows", jax.tree.map(lambda leaf: axis_sharding(2, ("data", "tensor"), leaf), plain)
    yield "rows over two", jax.tree.map(lambda leaf: axis_sharding(2, ("tensor",), leaf), plain)
    yield "columns", jax.tree.map(lambda leaf: axis_sharding(1, ("tensor",), leaf), plain)
    yield "experts", jax.tree.map(lambda leaf: axis_sharding(3, ("data", "tensor"), leaf), plain)
    yield "replicated", jax.tree.map(lambda leaf: NamedSharding(MESH, PartitionSpec()), plain)
    yield "last device", jax.tree.map(lambda leaf: SingleDeviceSharding(jax.devices()[3]), plain)
    yield "default", jax.tree.map(lambda leaf: None, plain)

    def both(leaf):
        cut = leaf.ndim >= 2 and leaf.shape[-1] % 2 == 0 and leaf.shape[-2] % 2 == 0
        return (
            NamedSharding(MESH, PartitionSpec(*[None] * (leaf.ndim - 2), "data", "tensor")) if cut else None
        )

    yield "rows and columns", jax.tree.map(both, plain)


def check(folder: Path, weights: str) -> None:
    checkpoint = open_checkpoint(folder)
    plain = load_params(checkpoint, weights, mtp=True)
    nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    for name, shardings in layouts(plain):
        before = read_calls_bytes()
        params = load_params(checkpoint, weights, mtp=True, shardings=shardings)
        read = read_calls_bytes() - before
        assert abs(read - nbytes) < 2000, (folder, weights, name, read, nbytes)
        for path, leaf in jax.tree.leaves_with_path(params):
            expected, sharding = plain, shardings
            for key in path:
                expected, sharding = expected[key.key], sharding[key.key]
            assert same_bits(leaf, expected), (folder, weights, name, path)
            assert sharding is None or leaf.sharding == sharding, (folder, weights, name, path)


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    for folder, weights in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        check(Path(folder), weights)
