"""What a job will do, known before it begins: which columns, and which units of work."""

import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any

import pyarrow as pa

from embedkit.errors import InputError, did_you_mean, first_line, repeated
from embedkit.frames import check_unique
from embedkit.serving.csv_files import csv_schema
from embedkit.serving.sources import (
    FOOTER_THREADS,
    Source,
    SourceFile,
    fingerprint,
    read_footer,
    require_columns,
)
from embedkit.serving.units import Job, Unit, embeddings_digest, output_schema, read_columns
from embedkit.tables import EmbeddingSet

_WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}")


@dataclass(frozen=True)
class _FileInfo:
    """What planning has to know of a file; `group_rows` is None for CSV."""

    file: SourceFile
    schema: pa.Schema
    group_rows: tuple[int, ...] | None
    fingerprint: dict[str, Any]


def make_plan(
    source: Source,
    embedding_set: EmbeddingSet,
    *,
    output: str,
    columns: Sequence[str] | None,
    replace: bool,
    layout: str,
    partition_by: Sequence[str] | None,
    compression: str,
    unit_rows: int,
) -> tuple[Job, list[Unit]]:
    """Decide on columns and units; see `embedkit.serving.batch.transform_dataset` for the parameters.

    Raises
    ------
    InputError
        If a file cannot be read, lacks a column, or has it in a type that does not go with the first file's.
    """
    types = embedding_set.types_in
    infos = _inspect(source, types)
    partition_by = None if partition_by is None else tuple(partition_by)
    kept_names = _kept_names(infos[0], embedding_set, columns, replace, partition_by)
    wanted = [*dict.fromkeys([*embedding_set.features_in, *kept_names, *(partition_by or ())])]
    for info in infos:
        check_unique(info.file.path, [name for name in info.schema.names if name in wanted])
        require_columns(info.file, wanted, [*info.schema.names, *info.file.keys])
    key_types = {
        name: types.get(name) or _key_type(info.file.keys[name] for info in infos if name in info.file.keys)
        for name in infos[0].file.keys
        if name in wanted
    }
    _check_partition_types(infos, partition_by or (), key_types)
    if columns is None:
        _warn_of_more(infos, infos[0].schema.names)
    kept = _common_schema(infos, kept_names, key_types)
    csv_types = {}
    if source.format == "csv":
        read = [name for name in read_columns(embedding_set, kept, partition_by) if name not in key_types]
        csv_types = {field.name: field.type for field in _common_schema(infos, read, key_types)}
    common, digest = replace_fields(source, files=()), embeddings_digest(embedding_set)
    job = Job(
        common, output, digest, layout, compression, kept, key_types, csv_types, partition_by, unit_rows
    )
    folders = infos[0].file.keys if partition_by is None else partition_by
    _check_names(output_schema(embedding_set, kept, layout).names, folders)
    return job, _units(infos, unit_rows)


def _inspect(source: Source, types: dict[str, pa.DataType]) -> list[_FileInfo]:
    """Look at the beginning or the end of every file."""
    if source.format == "csv":
        first = csv_schema(source, source.files[0], types)

        def look(file: SourceFile) -> _FileInfo:
            schema = first if file == source.files[0] else csv_schema(source, file, types)
            return _FileInfo(file, schema, None, fingerprint(source, file))
    else:

        def look(file: SourceFile) -> _FileInfo:
            footer, schema = read_footer(source, file)
            groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            return _FileInfo(file, schema, groups, fingerprint(source, file, footer.serialized_size))

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        infos = list(pool.map(look, source.files))
    return _alike(infos) if source.format == "csv" else infos


def _alike(infos: Sequence[_FileInfo]) -> list[_FileInfo]:
    """What is text in one CSV file is text in all: nothing but its cells says so."""
    text = {field.name: field.type for info in infos for field in info.schema if field.type == pa.string()}
    schemas = [pa.schema([f.with_type(text.get(f.name, f.type)) for f in info.schema]) for info in infos]
    return [replace_fields(info, schema=schema) for info, schema in zip(infos, schemas, strict=True)]


def _kept_names(
    first: _FileInfo,
    embedding_set: EmbeddingSet,
    columns: Sequence[str] | None,
    replace: bool,
    partition_by: tuple[str, ...] | None,
) -> list[str]:
    """Columns of the input that are written too."""
    available = list(dict.fromkeys([*first.schema.names, *first.file.keys]))
    if columns is not None:
        missing = [name for name in columns if name not in available]
        if missing:
            raise InputError(
                f"columns names {missing}, which {first.file.path} lacks{did_you_mean(missing, available)}"
            )
    # What is in the path need not be in the file; a number that is scaled takes the place of the raw one.
    dropped = {*(first.file.keys if partition_by is None else partition_by)}
    dropped |= {column.feature for column in embedding_set.numerics}
    if replace:
        dropped |= {*embedding_set.features_in}
    return [name for name in dict.fromkeys(available if columns is None else columns) if name not in dropped]


def _warn_of_more(infos: Sequence[_FileInfo], names: Sequence[str]) -> None:
    """Warn where files have columns that the first one lacks, which are not written."""
    for info in infos:
        if more := sorted({*info.schema.names} - {*names, *info.file.keys}):
            warnings.warn(
                f"{info.file.path} has column(s) {more}, which {infos[0].file.path} lacks: they are left out",
                UserWarning,
                stacklevel=4,
            )
            return


def _check_partition_types(
    infos: Sequence[_FileInfo], names: Sequence[str], key_types: Mapping[str, pa.DataType]
) -> None:
    """Raise InputError where a column cannot give names to directories."""
    for info, name in itertools.product(infos, names):
        dtype = key_types.get(name) or info.schema.field(name).type
        plain = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
        if pa.types.is_nested(plain) or pa.types.is_binary(plain) or pa.types.is_large_binary(plain):
            raise InputError(
                f"partition_by names column {name!r}, which is {dtype} in {info.file.path}: "
                "take one of texts, numbers or dates"
            )


def _common_schema(
    infos: Sequence[_FileInfo], names: Sequence[str], key_types: dict[str, pa.DataType]
) -> pa.Schema:
    """Types of columns that hold the values of all files."""
    merged = None
    for info in infos:
        fields = []
        for name in names:
            dtype = key_types[name] if name in key_types else info.schema.field(name).type
            plain = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
            fields.append(pa.field(name, plain))
        schema = pa.schema(fields)
        if merged is None or schema == merged:
            merged = schema
            continue
        try:
            merged = pa.unify_schemas([merged, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"{info.file.path} does not go with the files before it ({first_line(error)}): "
                "leave the column out with columns, or cast it"
            ) from error
    return merged


def _key_type(values: Iterable[str | None]) -> pa.DataType:
    whole = all(value is None or _WHOLE_NUMBER.fullmatch(value) for value in values)
    return pa.int64() if whole else pa.string()


def _check_names(names: Sequence[str], folders: Iterable[str]) -> None:
    if twice := repeated(names):
        raise InputError(
            f"the output would have two columns of the name(s) {twice}: "
            "leave those of the input out with columns"
        )
    if both := sorted(set(names) & set(folders)):
        raise InputError(
            f"the output would have {both} in its files and, with other values, in the names of its "
            "directories: make no such directories (partition_by = [], --no-partitions), or others"
        )


def _units(infos: Sequence[_FileInfo], unit_rows: int) -> list[Unit]:
    """Cut the files into units of at most `unit_rows` rows where row groups allow it."""
    units: list[Unit] = []
    for info in infos:
        if not info.group_rows:
            rows = None if info.group_rows is None else 0
            units.append(Unit(len(units), info.file, (0, 0), rows, info.fingerprint))
            continue
        first, rows = 0, 0
        for group, group_rows in enumerate(info.group_rows):
            if group > first and rows + group_rows > unit_rows:
                units.append(Unit(len(units), info.file, (first, group), rows, info.fingerprint))
                first, rows = group, 0
            rows += group_rows
        units.append(Unit(len(units), info.file, (first, len(info.group_rows)), rows, info.fingerprint))
    return units
