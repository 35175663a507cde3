"""CSV files: the types of their columns, batches of their rows, and quotes that nobody closed."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from embedkit.errors import InputError, first_line
from embedkit.serving.sources import READ_ERRORS, Source, SourceFile

_HEADER = 1 << 16  # bytes in which the names of columns are looked for


def csv_schema(source: Source, file: SourceFile, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """Columns of a CSV file, with the given types or those that its beginning suggests."""
    try:
        with _open_csv(source.system, file.path, None, types) as reader:
            return reader.schema
    except READ_ERRORS as error:
        raise InputError(
            f"{file.path} is not a readable CSV file ({first_line(error)}): repair it"
        ) from error


def read_csv(
    source: Source, file: SourceFile, columns: Sequence[str], types: Mapping[str, pa.DataType]
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Read some columns of a CSV file as a stream of batches, and say where each is from.

    Empty cells and the usual marks (NA, NULL, nan) are missing, also where they are text.

    Raises
    ------
    InputError
        If a cell does not fit its type, a line has too many cells, or text is not UTF-8.
    """
    number = 0
    try:
        stream = _CountsQuotes(_open_text(source.system, file.path))
        with _open_csv(source.system, file.path, columns, types, pa.PythonFile(stream)) as reader:
            for number, batch in enumerate(reader):
                yield f"{file.path}, block {number}", batch
        if stream.quotes % 2:
            _check_closed(file.path, _last_row(source, file))
    except READ_ERRORS as error:
        raise InputError(
            f"{file.path}, after block {number}, cannot be read ({first_line(error)}): repair the file and "
            "resume; or leave the column out with columns, if it is one that is only copied: its first block "
            "decides on its type"
        ) from error


def read_whole_csv(path: Path, text: Iterable[str]) -> pa.Table:
    """All of a local CSV file; columns that are named in `text` as text, the others as they look.

    Raises
    ------
    InputError
        If it ends inside a quoted cell.
    pyarrow.ArrowException
        If it cannot be read otherwise.
    """
    from pyarrow import csv as arrow_csv

    system, types = fs.LocalFileSystem(), dict.fromkeys(text, pa.string())
    stream = _CountsQuotes(_open_text(system, str(path)))
    table = arrow_csv.read_csv(pa.PythonFile(stream), **_options(system, str(path), None, types))
    if stream.quotes % 2:
        _check_closed(str(path), table.slice(max(table.num_rows - 1, 0)))
    return table


def _check_closed(path: str, last: pa.Table | pa.RecordBatch) -> None:
    """Raise InputError where the last row swallowed others, as no quote closes one of its cells.

    For files with an odd number of quotes: a single one inside of a cell is a part of it.
    """
    cells = [cell for cells in last.to_pydict().values() for cell in cells]
    if any(isinstance(cell, str) and "\n" in cell for cell in cells):
        raise InputError(f"{path} ends inside a quoted cell: look for a quote that is not closed")


def _last_row(source: Source, file: SourceFile) -> pa.RecordBatch:
    """All cells of the last row of a CSV file, as text."""
    with _open_csv(source.system, file.path, None, {}) as reader:
        types = dict.fromkeys(reader.schema.names, pa.string())
    with _open_csv(source.system, file.path, None, types) as reader:
        rows = pa.RecordBatch.from_pylist([], schema=reader.schema)
        for batch in reader:
            rows = batch if batch.num_rows else rows
    return rows.slice(max(rows.num_rows - 1, 0))


class _CountsQuotes(io.RawIOBase):
    """A stream that counts the quotes that are read from it."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream, self.quotes = stream, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(None if size < 0 else size)
        self.quotes += data.count(b'"')
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.stream.close()
        super().close()


def _open_text(system: fs.FileSystem, path: str) -> pa.NativeFile:
    """A CSV file, decompressed; Arrow looks for small letters in its name."""
    return system.open_input_stream(path, compression="gzip" if path.lower().endswith(".gz") else None)


def _open_csv(
    system: fs.FileSystem,
    path: str,
    columns: Sequence[str] | None,
    types: Mapping[str, pa.DataType],
    stream: pa.NativeFile | None = None,
) -> "pa.csv.CSVStreamingReader":
    from pyarrow import csv as arrow_csv

    options = _options(system, path, columns, types)
    return arrow_csv.open_csv(_open_text(system, path) if stream is None else stream, **options)


def _options(
    system: fs.FileSystem, path: str, columns: Sequence[str] | None, types: Mapping[str, pa.DataType]
) -> dict[str, Any]:
    """How all CSV files are read; an empty line of one with a single column is a missing value."""
    from pyarrow import csv as arrow_csv

    names, empty_lines = _header(system, path)
    is_single = len(names) == 1
    return {
        "read_options": arrow_csv.ReadOptions(skip_rows=empty_lines if is_single else 0),
        "parse_options": arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=not is_single),
        "convert_options": arrow_csv.ConvertOptions(
            column_types=dict(types), include_columns=columns, strings_can_be_null=True, check_utf8=True
        ),
    }


def _header(system: fs.FileSystem, path: str) -> tuple[list[str], int]:
    """Names of the columns of a CSV file, and the number of empty lines before them."""
    with _open_text(system, path) as stream:
        data = stream.read(_HEADER)
    header = data.lstrip(b"\r\n")
    lines = io.StringIO(header.decode("utf-8-sig", "replace"), newline="")
    return next(csv.reader(lines), []), len(data[: len(data) - len(header)].splitlines())
