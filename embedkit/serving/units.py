"""The unit of work of a batch job: some row groups of one file become files of features.

No engine is known here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedkit import store
from embedkit.columns import EmbeddingTable
from embedkit.errors import InputError, first_line
from embedkit.frames import from_numpy, numeric_block
from embedkit.serving.csv_files import read_csv
from embedkit.serving.output import JobFolder, PartFile, writing
from embedkit.serving.sources import NULL_KEY, Source, SourceFile, checksum, read_parquet
from embedkit.tables import EmbeddingSet
from embedkit.vocabulary import MISSING, UNKNOWN

#: Rows of a row group of the output: with 64 features 32 MB, what engines read at a time.
ROW_GROUP_ROWS = 131_072

_MAX_PARTITIONS = 1_024
# A block of rows stays in the processor's second-level cache while its columns are filled.
_BLOCK_ROWS = 8_192


@dataclass(frozen=True)
class Unit:
    """Some row groups of one file.

    Attributes
    ----------
    index : int
        Number among all units; it names the files that come out.
    file : SourceFile
    row_groups : tuple of two ints
        First row group, and the one after the last. (0, 0) for a CSV file: all of it.
    rows : int or None
        Rows in them; None if not known before reading (CSV).
    fingerprint : dict
        What the file is known by, so that another file in its place is noticed.
    """

    index: int
    file: SourceFile
    row_groups: tuple[int, int]
    rows: int | None
    fingerprint: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a finished unit the same unit in a later run."""
        return {
            "file": self.file.name,
            "row_groups": list(self.row_groups),
            "expected_rows": self.rows,
            "input": dict(self.fingerprint),
        }


@dataclass(frozen=True)
class Job:
    """What every unit of a job has in common. Small, so that it can be sent with each of them.

    Attributes
    ----------
    source : Source
        Without its files, which are many: every unit has its own.
    output : str
        Where the result is to appear.
    digest : str
        Digest of the embeddings, which workers in other processes find in the folder of the job.
    layout : "wide" or "vector"
    compression : str
        Codec of the Parquet files; "none" also leaves the vectors plain.
    kept : pa.Schema
        Columns of the input that are written too.
    key_types : mapping of str to pa.DataType
        Columns that come from the names of directories.
    csv_types : mapping of str to pa.DataType
        How to read the columns of CSV files.
    partition_by : tuple of str, or None
        Columns that name the directories of the output; None keeps the directories of the input.
    unit_rows : int
        How many rows of input columns may be in memory at once to be partitioned.
    """

    source: Source
    output: str
    digest: str
    layout: str
    compression: str
    kept: pa.Schema
    key_types: Mapping[str, pa.DataType]
    csv_types: Mapping[str, pa.DataType]
    partition_by: tuple[str, ...] | None
    unit_rows: int


def transform_unit(job: Job, unit: Unit, embedding_set: EmbeddingSet | None = None) -> dict[str, Any]:
    """Do one unit of work; doing it again, anywhere, gives the same bytes.

    Parameters
    ----------
    job : Job
    unit : Unit
    embedding_set : EmbeddingSet, optional
        What to look up in; by default what is stored in the folder of the job.

    Returns
    -------
    dict
        The record that is kept of it: identity, rows, files, missing and unknown rows per feature.

    Raises
    ------
    InputError
        If the input cannot be read or looked up; the message names file and row group.
    OutputError
        If the output cannot be written.
    """
    folder = JobFolder(job.output)
    if embedding_set is None:
        embedding_set = _embeddings(str(folder.embeddings), job.digest)
    schema = output_schema(embedding_set, job.kept, job.layout)
    options = _writer_options(job)
    parts: dict[str, PartFile] = {}
    # Used again for every row group: flat memory, and no new pages to ask the system for.
    space = np.empty(
        (sum(table.embedding_dim for table in embedding_set.values()), ROW_GROUP_ROWS), np.float32
    )
    counts = {feature: np.zeros(2, dtype=np.int64) for feature in embedding_set}
    rows = 0
    try:
        with writing(folder):
            for directory, place, table in _tables(job, unit, embedding_set):
                if directory not in parts:
                    name = f"{directory}/part-{unit.index:06d}.parquet".lstrip("/")
                    parts[directory] = PartFile(folder.data, name, schema, options)
                columns = [_kept_column(table, field, place) for field in job.kept]
                columns += _lookup(embedding_set, table, job.layout, counts, place, space)
                parts[directory].append(pa.Table.from_arrays(columns, schema=schema))
                rows += table.num_rows
            files = [parts[directory].close() for directory in sorted(parts)]
            by_feature = {feature: [int(number) for number in pair] for feature, pair in counts.items()}
            record = unit.identity | {"rows": rows, "files": files, "missing_and_unknown": by_feature}
            record |= {"crc32": read_checksum(job, unit, embedding_set)}
            folder.record(unit.index, record)
    finally:
        for part in parts.values():
            part.discard()
    return record


def read_checksum(job: Job, unit: Unit, embedding_set: EmbeddingSet) -> int | None:
    """CRC-32 of what a unit reads of a Parquet file; None for CSV, where its identity has a digest of all."""
    if job.source.format == "csv":
        return None
    columns = read_columns(embedding_set, job.kept, job.partition_by)
    return checksum(job.source, unit.file, range(*unit.row_groups), columns)


def output_schema(embedding_set: EmbeddingSet, kept: pa.Schema, layout: str) -> pa.Schema:
    """Columns that come out: those kept, then the features."""
    if layout == "wide":
        fields = [pa.field(name, pa.float32()) for name in embedding_set.feature_names_out]
    else:
        fields = [
            pa.field(f"{feature}_embedding", pa.list_(pa.float32(), table.embedding_dim))
            for feature, table in embedding_set.items()
        ]
        fields += [
            pa.field(name, pa.float32())
            for part in (*embedding_set.numerics, *embedding_set.crosses)
            for name in part.feature_names_out
        ]
    return pa.schema([*kept, *fields])


def embeddings_digest(embedding_set: EmbeddingSet) -> str:
    """A digest of everything in a set that has an influence on what comes out."""
    from embedkit.layout import contents, sha256

    _, manifest = contents(embedding_set, {})
    sums = sorted((name, entry["sha256"]) for name, entry in manifest["files"].items())
    return sha256(repr((sums, manifest["numerics"], list(embedding_set))).encode())


@lru_cache(maxsize=2)
def _embeddings(root: str, digest: str) -> EmbeddingSet:
    """The set of a job, loaded once in every process; the digest tells jobs in the same place apart."""
    return store.load(root)


def _tables(job: Job, unit: Unit, embedding_set: EmbeddingSet) -> Iterator[tuple[str, str, pa.Table]]:
    """Rows of a unit in tables, each a row group of the output, with their directory and their place."""
    if job.partition_by is None:
        directory, empty = unit.file.directory, True
        for place, table in _slabs(job, unit, embedding_set, ROW_GROUP_ROWS):
            empty = False
            yield directory, place, table
        if empty:
            yield directory, unit.file.path, _empty(job, embedding_set)
        return
    slab = None
    for place, slab in _slabs(job, unit, embedding_set, job.unit_rows):
        for directory, table in _partition(slab, job.partition_by, place):
            for start in range(0, table.num_rows, ROW_GROUP_ROWS):
                yield directory, place, table.slice(start, ROW_GROUP_ROWS)
    if slab is None and not job.partition_by:  # else there is no directory to put it in
        yield "", unit.file.path, _empty(job, embedding_set)


def _slabs(job: Job, unit: Unit, embedding_set: EmbeddingSet, size: int) -> Iterator[tuple[str, pa.Table]]:
    """Input columns of a unit in tables of `size` rows (the last may be smaller), and where they are from."""
    pending: list[pa.Table] = []
    places: list[str] = []
    waiting = 0
    for place, batch in _batches(job, unit, embedding_set, size):
        table = pa.Table.from_batches([batch])
        while table.num_rows:
            taken = table.slice(0, size - waiting)
            table = table.slice(size - waiting)
            pending.append(taken)
            places.append(place)
            waiting += taken.num_rows
            if waiting == size:
                yield _join_places(places), pa.concat_tables(pending)
                pending, places, waiting = [], [], 0
    if waiting:
        yield _join_places(places), pa.concat_tables(pending)


def _batches(
    job: Job, unit: Unit, embedding_set: EmbeddingSet, rows: int
) -> Iterator[tuple[str, pa.RecordBatch]]:
    keys = {name: value for name, value in unit.file.keys.items() if name in job.key_types}
    columns = [name for name in read_columns(embedding_set, job.kept, job.partition_by) if name not in keys]
    if job.source.format == "csv":
        batches = read_csv(job.source, unit.file, columns, job.csv_types)
    else:
        text = [name for name in embedding_set if name in columns]
        batches = read_parquet(job.source, unit.file, range(*unit.row_groups), columns, text, rows)
    for place, batch in batches:
        for name, value in keys.items():
            column = pa.repeat(_key_scalar(name, value, job.key_types[name], unit.file), batch.num_rows)
            batch = batch.append_column(name, column)
        yield place, batch


def read_columns(
    embedding_set: EmbeddingSet, kept: pa.Schema, partition_by: tuple[str, ...] | None
) -> list[str]:
    """Columns of the input that a job needs."""
    return list(dict.fromkeys([*embedding_set.features_in, *kept.names, *(partition_by or ())]))


def _key_scalar(name: str, value: str | None, dtype: pa.DataType, file: SourceFile) -> pa.Scalar:
    try:
        return pa.scalar(value, pa.string()).cast(dtype)
    except pa.ArrowException as error:
        raise InputError(
            f"{file.path}: {name}={value} in its path is not of type {dtype}: rename the directory"
        ) from error


def _empty(job: Job, embedding_set: EmbeddingSet) -> pa.Table:
    names = read_columns(embedding_set, job.kept, None)
    types = [job.kept.field(name).type if name in job.kept.names else pa.null() for name in names]
    return pa.schema(list(zip(names, types, strict=True))).empty_table()


def _join_places(places: list[str]) -> str:
    first, last = places[0], places[-1]
    if first == last:
        return first
    start, number = first.rsplit(" ", 1)
    return f"{start}s {number} to {last.rpartition(' ')[2]}"


def _kept_column(table: pa.Table, field: pa.Field, place: str) -> pa.ChunkedArray:
    try:
        return table.column(field.name).cast(field.type)
    except pa.ArrowException as error:
        raise InputError(
            f"{place}: column {field.name!r} is not {field.type} as in the first file ({first_line(error)}): "
            "leave it out or cast it"
        ) from error


def _lookup(
    embedding_set: EmbeddingSet,
    table: pa.Table,
    layout: str,
    counts: dict[str, np.ndarray],
    place: str,
    space: np.ndarray,
) -> list[pa.Array]:
    """Columns of features of a table; adds its missing and unknown rows to `counts`.

    The vectors lie in `space`, of shape (sum of embedding_dim, ROW_GROUP_ROWS), until the next call.
    """
    columns: list[pa.Array] = []
    found: dict[str, np.ndarray] = {}
    stop = 0
    try:
        for feature, part in embedding_set.items():
            codes = found[feature] = part.encode(table.column(feature))
            counts[feature] += [np.count_nonzero(codes == MISSING), np.count_nonzero(codes == UNKNOWN)]
            first, stop = stop, stop + part.embedding_dim
            out = space[first:stop]
            columns += _wide(part, codes, out) if layout == "wide" else [_vector(part, codes, out)]
        for numeric in embedding_set.numerics:
            columns += map(from_numpy, numeric.transform(numeric_block(table, [numeric.feature])[:, 0]))
        for cross in embedding_set.crosses:
            numbers = cross.transform(*(found[name] for name in cross.features))
            columns += [from_numpy(np.ascontiguousarray(part)) for part in numbers.T]
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    return columns


def _wide(part: EmbeddingTable, codes: np.ndarray, out: np.ndarray) -> list[pa.Array]:
    for start in range(0, len(codes), _BLOCK_ROWS):
        block = codes[start : start + _BLOCK_ROWS]
        # The codes are valid by construction; "clip" spares numpy a buffer and a check.
        out[:, start : start + len(block)] = part.vectors.take(block, axis=0, mode="clip").T
    return [from_numpy(values[: len(codes)]) for values in out]


def _vector(part: EmbeddingTable, codes: np.ndarray, out: np.ndarray) -> pa.Array:
    values = out.reshape(-1, part.embedding_dim)[: len(codes)]
    part.vectors.take(codes, axis=0, out=values, mode="clip")
    return pa.FixedSizeListArray.from_arrays(from_numpy(values.ravel()), part.embedding_dim)


def _partition(table: pa.Table, names: tuple[str, ...], place: str) -> Iterator[tuple[str, pa.Table]]:
    """Split a table by the values of some columns: directory and rows of each, in their first order."""
    if not names:
        yield "", table
        return
    keys = [_key_texts(table.column(name)) for name in names]
    groups = pa.table(keys, names=[str(i) for i in range(len(names))])
    numbered = groups.append_column("row", pa.array(np.arange(table.num_rows)))
    listed = numbered.group_by(groups.column_names, use_threads=False).aggregate([("row", "list")])
    if listed.num_rows > _MAX_PARTITIONS:
        raise InputError(
            f"{place}: columns {list(names)} have {listed.num_rows} values, at most {_MAX_PARTITIONS} "
            "directories can be written at a time: partition by a column with fewer"
        )
    found = listed.to_pydict()
    for values, rows in zip(
        zip(*(found[str(i)] for i in range(len(names))), strict=True), found["row_list"], strict=True
    ):
        pairs = zip(names, values, strict=True)
        directory = "/".join(f"{quote(name, safe=' ')}={_key_name(value)}" for name, value in pairs)
        yield directory, table.take(pa.array(rows))


def _key_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return pc.cast(column, pa.string())


def _key_name(value: str | None) -> str:
    return NULL_KEY if value is None else quote(value, safe=" ")


def _writer_options(job: Job) -> dict[str, Any]:
    # Statistics of vectors help no reader to skip anything.
    kept = job.kept.names
    if job.compression == "none":
        return {"compression": "none", "use_dictionary": kept, "write_statistics": kept}
    return {"compression": job.compression, "write_statistics": kept}
