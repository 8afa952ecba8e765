"""What import reads: which bytes of which files go where, in parts of about a megabyte."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import numpy as np

from dsv3_jax.checkpoint import bands
from dsv3_jax.checkpoint.fp8 import BLOCK
from dsv3_jax.checkpoint.regions import Bounds, Slot
from dsv3_jax.checkpoint.safetensors_file import DTYPES, OpenFiles, TensorInfo, read_into
from dsv3_jax.checkpoint.workers import Work


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of a file and all places of this process that it fills.

    Attributes:
        info: the tensor.
        slots: where it goes.
        scale: the scales to multiply an FP8 weight by, where the slots are of another format; else None.
        scale_slots: where its scales go if it is quantised on the way; else empty.
    """

    info: TensorInfo
    slots: list[Slot]
    scale: TensorInfo | None = None
    scale_slots: list[Slot] = dataclasses.field(default_factory=list)

    def nbytes(self) -> int:
        """Bytes of the weight that will be read."""
        row_bytes = bands.matrix_shape(self.info)[1] * DTYPES[self.info.dtype].itemsize
        return sum(stop - start for start, stop in self._row_ranges()) * row_bytes

    def works(self, files: OpenFiles) -> Iterator[Work]:
        """The job in parts of about a megabyte."""
        fd = files.fd(self.info.path)
        columns, dtype = bands.matrix_shape(self.info)[1], DTYPES[self.info.dtype]
        whole_rows = all(slot.columns == (0, columns) for slot in self.slots)
        if whole_rows and not self.scale_slots and all(slot.region.dtype == dtype for slot in self.slots):
            for slot in self.slots:
                yield from self._direct_works(fd, slot, columns * dtype.itemsize)
            return
        scale_fd = files.fd(self.scale.path) if self.scale is not None else -1
        for start, stop in self._row_ranges():
            for band in bands.band_bounds(start, stop, columns * dtype.itemsize, self._align()):
                yield functools.partial(self._read_band, fd, scale_fd, band)

    def _align(self) -> int:
        return BLOCK if self.scale is not None or self.scale_slots else 1

    def _row_ranges(self) -> list[Bounds]:
        """The rows that some slot needs, in order, without overlap; whole blocks where there are scales."""
        align, rows = self._align(), bands.matrix_shape(self.info)[0]
        needed = {slot.rows for slot in self.slots} | {slot.blocks().rows for slot in self.scale_slots}
        ranges: list[Bounds] = []
        for start, stop in sorted(needed):
            start, stop = start // align * align, min(-(-stop // align) * align, rows)
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
            else:
                ranges.append((start, stop))
        return ranges

    def _direct_works(self, fd: int, slot: Slot, row_bytes: int) -> Iterator[Work]:
        memory = slot.view().reshape(-1).view(np.uint8)
        offset = self.info.offset + slot.rows[0] * row_bytes
        for start in range(0, memory.size, bands.BAND_BYTES):
            part = memory[start : start + bands.BAND_BYTES]
            yield functools.partial(self._read_direct, fd, offset + start, part)

    def _read_direct(self, fd: int, offset: int, memory: np.ndarray) -> int:
        read_into(fd, offset, memory, self.info)
        bands.check_values(memory, self.info)
        return memory.size

    def _read_band(self, fd: int, scale_fd: int, band: Bounds) -> int:
        # Whole rows, also where only some columns are wanted: the kernel reads ahead over gaps that short anyway.
        stored = bands.read_rows(fd, self.info, *band)
        scale = None if self.scale is None else bands.read_scale_rows(scale_fd, self.scale, *band)
        if self.scale_slots:
            values, scales = bands.to_float8(bands.to_float32(stored, None), self.info)
            for slot in self.scale_slots:
                _fill(slot, scales, band[0] // BLOCK)
            for slot in self.slots:
                _fill(slot, values, band[0])
        else:
            for dtype in {slot.region.dtype for slot in self.slots}:
                values = stored if stored.dtype == dtype else bands.to_float32(stored, scale).astype(dtype)
                for slot in self.slots:
                    _fill(slot, values, band[0])
        return stored.nbytes


def in_file_order(jobs: Iterable[Job], files: OpenFiles) -> Iterator[Work]:
    """The parts of all jobs in the order of the files, which is what disks and readahead like."""
    for job in sorted(jobs, key=lambda job: (job.info.path, job.info.offset)):
        yield from job.works(files)


def _fill(slot: Slot, values: np.ndarray, first_row: int) -> None:
    """Copies what a slot wants of rows [first_row, ...), all columns of the tensor."""
    start, stop = max(slot.rows[0], first_row), min(slot.rows[1], first_row + len(values))
    if start < stop:
        bits = values.view(f"u{values.dtype.itemsize}")[start - first_row : stop - first_row]
        slot.view()[start - slot.rows[0] : stop - slot.rows[0]] = bits[:, slice(*slot.columns)]
