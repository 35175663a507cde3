"""CSV files: the types of their columns, batches of their rows, and quotes that nobody closed."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from embedkit.errors import InputError, first_line
from embedkit.serving.sources import READ_ERRORS, Source, SourceFile

_HEADER = 1 << 16  # bytes in which the names of columns are looked for


def csv_schema(source: Source, file: SourceFile, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """Columns of a CSV file, with the given types or those that its beginning suggests."""
    try:
        with _open_csv(source.system, file.path, None, types) as reader:
            schema, batches = reader.schema, list(islice(reader, 1))
        table = pa.Table.from_batches(batches, schema)
        ids = dict.fromkeys(_ids(source.system, file.path, table, types, 1), pa.string())
        return pa.schema([field.with_type(ids.get(field.name, field.type)) for field in schema])
    except READ_ERRORS as error:
        raise InputError(
            f"{file.path} is not a readable CSV file ({_reason(source.system, file.path, error)}): repair it"
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
            f"{file.path}, after block {number}, cannot be read "
            f"({_reason(source.system, file.path, error)}): repair the file and resume; or leave the column "
            "out with columns, if it is one that is only copied: its first block decides on its type"
        ) from error


def read_whole_csv(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    """All of a local CSV file; columns with the given types, the others as they look.

    Raises
    ------
    InputError
        If it ends inside a quoted cell.
    pyarrow.ArrowException
        If it cannot be read otherwise.
    """
    from pyarrow import csv as arrow_csv

    system = fs.LocalFileSystem()
    stream = _CountsQuotes(_open_text(system, str(path)))
    try:
        table = arrow_csv.read_csv(pa.PythonFile(stream), **_options(system, str(path), None, types))
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(_reason(system, str(path), error)) from error
    if stream.quotes % 2:
        _check_closed(str(path), table.slice(max(table.num_rows - 1, 0)))
    ids = dict.fromkeys(_ids(system, str(path), table, types), pa.string())
    return read_whole_csv(path, {**types, **ids}) if ids else table


def _ids(
    system: fs.FileSystem,
    path: str,
    table: pa.Table,
    types: Mapping[str, pa.DataType],
    blocks: int | None = None,
) -> set[str]:
    """Columns of `table`, not in `types`, whose cells would fall together as numbers.

    These are whole numbers, some of which begin with 0 or some of which need more than 63 bits.
    """
    columns = [pair for pair in zip(table.column_names, table.columns, strict=True) if pair[0] not in types]
    whole = {name for name, column in columns if column.type == pa.int64()}
    wide = {name for name, column in columns if _is_wide(column)}
    if not (found := whole | wide):
        return set()
    padded = set()
    with _open_csv(system, path, list(found), dict.fromkeys(found, pa.string())) as reader:
        for batch in islice(reader, blocks):
            cells = {name: pc.utf8_trim_whitespace(batch[name]) for name in found}
            padded |= {name for name in whole if _any_matches(cells[name], "^-?0[0-9]")}
            wide -= {name for name in wide if _any_matches(cells[name], "^-?[0-9]*[^-0-9]")}
    return padded | wide


def _is_wide(column: pa.ChunkedArray) -> bool:
    """Whether Arrow took a column for floats and found some that no int64 holds."""
    largest = pc.max(pc.abs(column)).as_py() if column.type == pa.float64() else None
    return largest is not None and largest >= 2**63


def _any_matches(cells: pa.Array, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(cells, pattern)).as_py())


def _check_closed(path: str, last: pa.Table | pa.RecordBatch) -> None:
    """Raise InputError where the last row swallowed others, as no quote closes one of its cells.

    For files with an odd number of quotes: a single one inside of a cell is a part of it.
    """
    cells = [cell for cells in last.to_pydict().values() for cell in cells]
    if any(isinstance(cell, str) and "\n" in cell for cell in cells):
        raise InputError(f"{path} ends inside a quoted cell: look for a quote that is not closed")


def _reason(system: fs.FileSystem, path: str, error: BaseException) -> str:
    """What an error of Arrow says, with the name of the column."""

    def name(match: re.Match) -> str:
        return f"In column {_header(system, path)[0][int(match[1])]!r}"

    return re.sub(r"In CSV column #(\d+)", name, first_line(error))


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
