"""Rows that need not fit into memory: coded into files, read in blocks, shuffled within buffers.

The files have no names: they are gone when the rows are, also after a kill.

An epoch cuts the rows into blocks from a place on that is drawn anew each time, takes the blocks in random
order, and shuffles the rows of many blocks, a buffer, among each other. What is read at a time is contiguous.
"""

import contextlib
import math
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from embedkit.errors import OutputError
from embedkit.learning.data import Rows
from embedkit.vocabulary import UNKNOWN

BLOCK_ROWS = 4_096
BUFFER_BYTES = 64 << 20
MIN_BLOCKS = 16  # of a buffer, however wide the rows are
# Pages that were read count as memory of the process until it gives them back.
RELEASE_BYTES = 64 << 20
RELEASE_BLOCKS = 32


@dataclass(frozen=True)
class StoredRows(Rows):
    """Rows in files mapped into memory; what is taken of them is a copy on a device.

    Attributes
    ----------
    maps : tuple of mmap
        Behind the tensors.
    target : torch.device
        Where batches go.
    """

    maps: tuple[mmap.mmap, ...]
    target: torch.device

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.target

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return 4 * (self.codes.shape[1] + self.numeric.shape[1] + self.targets.shape[1] + 1)

    def take(self, index: torch.Tensor | slice) -> Rows:
        """Some of the rows, in memory."""
        parts = (self.codes, self.numeric, self.targets, self.weights)
        return Rows(*(part[index].clone().to(self.target) for part in parts))

    def batches(self, batch_size: int) -> Iterator[Rows]:
        """All rows in order, in batches."""
        read = 0
        for batch in super().batches(batch_size):
            yield batch
            read += len(batch) * self.row_bytes
            if read > RELEASE_BYTES:
                self.release()
                read = 0
        self.release()

    def shuffled(
        self, generator: torch.Generator, unknown_fraction: float, batch_size: int
    ) -> "ShuffledBlocks":
        """The rows of an epoch; see the module for their order and `Rows.shuffled` for the parameters."""
        return ShuffledBlocks(self, generator, unknown_fraction, batch_size)

    def release(self) -> None:
        """Let go of the pages that were read; they are read again where they are needed again."""
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)


class ShuffledBlocks:
    """The rows of an epoch in random order, of which one buffer is in memory.

    Parameters
    ----------
    rows : StoredRows
    generator : torch.Generator
        Draws a seed from which all else follows.
    unknown_fraction : float
        Fraction of values to replace by unknown.
    batch_size : int
        No slice of this many rows, counted from the first, lies in two buffers.
    """

    def __init__(
        self, rows: StoredRows, generator: torch.Generator, unknown_fraction: float, batch_size: int
    ) -> None:
        self.rows, self.unknown_fraction = rows, unknown_fraction
        self.seed = int(torch.randint(2**62, (), generator=generator))
        draws = torch.Generator().manual_seed(self.seed)
        self.block_rows = batch_size * math.ceil(BLOCK_ROWS / batch_size)
        self.shift = int(torch.randint(len(rows), (), generator=draws))
        order = torch.randperm(len(rows) // self.block_rows, generator=draws)
        in_buffer = max(BUFFER_BYTES // (rows.row_bytes * self.block_rows), MIN_BLOCKS)
        self.buffers = list(order.tensor_split(max(1, math.ceil(len(order) / in_buffer))))
        sizes = torch.tensor([len(blocks) for blocks in self.buffers]) * self.block_rows
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[:-1]])
        # What is left over, less than a block and from another place in every epoch, joins the last buffer.
        self.buffers[-1] = torch.cat([self.buffers[-1], torch.tensor([len(order)])])
        self.number, self.buffer = -1, None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: slice) -> Rows:
        """Rows of the epoch, up to the end of the buffer that the first of them is in."""
        number = int(torch.searchsorted(self.starts, index.start, right=True)) - 1
        if number != self.number:
            self.buffer = None  # so that there are never two
            self.number, self.buffer = number, self._read(number)
        start = int(self.starts[number])
        return self.buffer.take(slice(index.start - start, index.stop - start))

    def _read(self, number: int) -> Rows:
        draws = torch.Generator().manual_seed(self.seed + 1 + number)
        pieces = [piece for block in self.buffers[number].tolist() for piece in self._pieces(block)]
        order = torch.randperm(sum(stop - start for start, stop in pieces), generator=draws)
        parts = (self.rows.codes, self.rows.numeric, self.rows.targets, self.rows.weights)
        codes, numeric, targets, weights = (self._gather(part, pieces)[order] for part in parts)
        codes.masked_fill_(torch.rand(codes.shape, generator=draws) < self.unknown_fraction, UNKNOWN)
        return Rows(codes, numeric, targets, weights).to(self.rows.device)

    def _gather(self, part: torch.Tensor, pieces: list[tuple[int, int]]) -> torch.Tensor:
        """Pieces of a column of the rows, one after the other."""
        gathered = part.new_empty((sum(stop - start for start, stop in pieces), *part.shape[1:]))
        place = 0
        for number, (start, stop) in enumerate(pieces):
            gathered[place : place + stop - start] = part[start:stop]
            place += stop - start
            if number % RELEASE_BLOCKS == 0:  # the system maps far more than what is read
                self.rows.release()
        self.rows.release()
        return gathered

    def _pieces(self, block: int) -> list[tuple[int, int]]:
        """Where the rows of a block are: in two places where it goes over the end."""
        total = len(self.rows)
        first, last = block * self.block_rows, min((block + 1) * self.block_rows, total)
        start, size = (first + self.shift) % total, last - first
        if start + size <= total:
            return [(start, start + size)]
        return [(start, total), (0, start + size - total)]


class RowWriter:
    """Collects coded rows in files without a name.

    Parameters
    ----------
    directory : str or None
        Where the files are; the system's directory for temporary files by default.
    n_features, n_numeric, n_heads : int
        Widths of codes, numbers and targets.
    """

    def __init__(self, directory: str | None, n_features: int, n_numeric: int, n_heads: int) -> None:
        self.directory = directory or tempfile.gettempdir()
        self.widths = (n_features, n_numeric, n_heads, 1)
        self.num_rows = 0
        try:
            self.files = [tempfile.TemporaryFile(dir=self.directory) for _ in self.widths]  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from error

    def add(self, codes: np.ndarray, numeric: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        """Add rows; the arrays are those of `Rows`.

        Raises
        ------
        OutputError
            If there is no room for them.
        """
        self.num_rows += len(codes)
        parts = (codes.astype(np.int32), *(part.astype(np.float32) for part in (numeric, targets, weights)))
        try:
            for file, part in zip(self.files, parts, strict=True):
                file.write(np.ascontiguousarray(part).data)
        except OSError as error:
            raise self._failed(error) from error

    def rows(self, device: torch.device) -> StoredRows:
        """All rows that were added, at least one; batches of them go to a device."""
        tensors, maps = [], []
        for file, width, dtype in zip(
            self.files, self.widths, [torch.int32, *[torch.float32] * 3], strict=True
        ):
            with file:
                file.flush()
                if not width:
                    tensors.append(torch.empty((self.num_rows, 0), dtype=dtype))
                    continue
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tensors.append(torch.frombuffer(mapped, dtype=dtype).view(self.num_rows, width))
            maps.append(mapped)
        codes, numeric, targets, weights = tensors
        return StoredRows(codes, numeric, targets, weights[:, 0], tuple(maps), device)

    def close(self) -> None:
        """Give up the files; rows that were mapped stay."""
        for file in self.files:
            with contextlib.suppress(OSError):  # a full disk has no room for what is left to write, either
                file.close()

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write coded rows to {self.directory} ({error.strerror}): "
            "name a directory with more room as cache_dir"
        )
