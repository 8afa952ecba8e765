"""What one process of several reads: parts of tensors, given as regions."""

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import fp8, open_checkpoint
from dsv3_jax.checkpoint.reading import Job, in_file_order
from dsv3_jax.checkpoint.regions import Region, Slot
from dsv3_jax.checkpoint.safetensors_file import OpenFiles
from dsv3_jax.checkpoint.workers import run
from tests.checkpoint.synthetic import dequantized, fields_of, random_tensors, write_folder

NAME = "model.layers.0.mlp.gate_proj.weight"  # (264, 160): 3 x 2 blocks
SCALE = NAME + "_scale_inv"
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    parent = tmp_path_factory.mktemp("reading")
    return {
        stored: open_checkpoint(write_folder(parent / stored, random_tensors(stored), fields_of(stored)))
        for stored in ("F8_E4M3", "F32")
    }


def slot(rows: tuple[int, int], columns: tuple[int, int], dtype: np.dtype) -> Slot:
    region = Region((rows, columns), dtype, [None])
    region.allocate()
    return Slot(region, (), rows, columns)


def read(job: Job) -> int:
    """Does the job; returns the bytes of the weight that it read."""
    reported: list[int] = []
    with OpenFiles() as files:
        run(in_file_order([job], files), reported.append)
    assert sum(reported) == job.nbytes()
    return job.nbytes()


def check(filled: Slot, expected: np.ndarray) -> None:
    part = expected[slice(*filled.rows), slice(*filled.columns)]
    np.testing.assert_array_equal(filled.region.memory.astype(np.float32), part.astype(np.float32))


@pytest.mark.parametrize(
    "places, rows_read",
    [
        ([((37, 100), (0, 160))], 63),
        ([((37, 100), (5, 9))], 63),
        ([((200, 264), (0, 160)), ((3, 4), (0, 160))], 65),
        ([((0, 132), (0, 80)), ((0, 132), (80, 160))], 132),
        ([((0, 10), (0, 80)), ((5, 20), (80, 160))], 20),
    ],
)
def test_only_the_rows_that_are_needed_are_read(checkpoints, places, rows_read):
    slots = [slot(rows, columns, FLOAT8) for rows, columns in places]
    assert read(Job(checkpoints["F8_E4M3"].tensors[NAME], slots)) == rows_read * 160
    for filled in slots:
        check(filled, random_tensors("F8_E4M3")[NAME])


def test_rows_between_blocks_are_multiplied_by_the_scales_of_their_blocks(checkpoints):
    tensors = checkpoints["F8_E4M3"].tensors
    slots = [slot((100, 140), (0, 160), FLOAT32), slot((257, 264), (150, 160), FLOAT32)]
    assert read(Job(tensors[NAME], slots, scale=tensors[SCALE])) == 264 * 160
    for filled in slots:
        check(filled, dequantized(random_tensors("F8_E4M3"), NAME))


def test_part_of_a_block_is_quantized_with_the_scale_of_the_whole(checkpoints):
    quantized, scale_inv = fp8.quantize(random_tensors("F32")[NAME])
    weights = [slot((130, 140), (0, 20), FLOAT8)]
    scales = [slot((2, 3), (0, 2), FLOAT32)]
    assert read(Job(checkpoints["F32"].tensors[NAME], weights, scale_slots=scales)) == (264 - 128) * 160 * 4
    check(weights[0], quantized)
    check(scales[0], scale_inv)


def test_scales_may_be_all_that_is_needed(checkpoints):
    scales = [slot((0, 1), (1, 2), FLOAT32)]
    assert read(Job(checkpoints["F32"].tensors[NAME], [], scale_slots=scales)) == 128 * 160 * 4
    check(scales[0], fp8.quantize(random_tensors("F32")[NAME])[1])


def test_tensor_that_nobody_here_holds_is_not_read(checkpoints):
    assert read(Job(checkpoints["F32"].tensors[NAME], [])) == 0
