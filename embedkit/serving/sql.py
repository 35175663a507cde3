"""The lookup as a join: tables of vectors, and a query that gives what `EmbeddingSet.transform` gives."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.columns import EmbeddingTable, NumericColumn
from embedkit.errors import InputError, OutputError
from embedkit.layout import plain_name
from embedkit.serving.output import write_atomic
from embedkit.tables import EmbeddingSet


@dataclass(frozen=True)
class Dialect:
    """How a database writes names and types.

    Attributes
    ----------
    quote : str
        Character around a name.
    real, double, text, timestamp, zoned : str
        Types: 32 and 64 bit floating point, text, time without and with a zone.
    extension : str
        Files that it loads tables from: "parquet" or "csv".
    load : str
        Statement that makes a table; has ``{table}``, ``{columns}`` and ``{file}``.
    max_name : int
        Bytes of a name; what is beyond them would be cut off without a word.
    folds_case : bool
        Whether names that differ in case only are the same.
    """

    quote: str
    real: str
    double: str
    text: str
    timestamp: str
    zoned: str
    extension: str
    load: str
    max_name: int
    folds_case: bool


MAX_DIGITS = 38  # of a decimal, in all of them but PostgreSQL
DIALECTS = {
    "duckdb": Dialect(
        quote='"',
        real="FLOAT",
        double="DOUBLE",
        text="VARCHAR",
        timestamp="TIMESTAMP",
        zoned="TIMESTAMPTZ",
        extension="parquet",
        load="DROP TABLE IF EXISTS {table};\nCREATE TABLE {table} AS SELECT * FROM read_parquet({file});\n",
        max_name=200,
        folds_case=True,
    ),
    "postgres": Dialect(
        quote='"',
        real="REAL",
        double="DOUBLE PRECISION",
        text="TEXT",
        timestamp="TIMESTAMP",
        zoned="TIMESTAMPTZ",
        extension="csv",
        load=(
            "DROP TABLE IF EXISTS {table};\nCREATE TABLE {table} ({columns});\n"
            "\\copy {table} FROM {file} WITH (FORMAT csv, HEADER)\nANALYZE {table};\n"
        ),
        max_name=63,
        folds_case=False,
    ),
    "spark": Dialect(
        quote="`",
        real="FLOAT",
        double="DOUBLE",
        text="STRING",
        timestamp="TIMESTAMP_NTZ",
        zoned="TIMESTAMP",
        extension="parquet",
        load="CREATE OR REPLACE TEMPORARY VIEW {table} USING parquet OPTIONS (path {file});\n",
        max_name=200,
        folds_case=True,
    ),
}


def export_sql(
    embedding_set: EmbeddingSet,
    directory: str | os.PathLike,
    *,
    dialect: str,
    source: str = "rows",
    keep: Sequence[str] = (),
    prefix: str = "embedkit_",
    location: str | None = None,
) -> list[Path]:
    """Write the tables of vectors, a script that loads them, and the query that joins them.

    Parameters
    ----------
    embedding_set : EmbeddingSet
    directory : path
        Gets ``tables.sql`` (for PostgreSQL: a script of psql), ``join.sql``, and one file per feature, and
        per cross.
    dialect : "duckdb", "postgres" or "spark"
    source, keep, prefix
        See `join_query`.
    location : str, optional
        Where the database will find the files: a path or URI in front of their names. By default the
        directory in which the script is run.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    InputError
        If a name or a value does not fit the database.
    OutputError
        If it cannot be written.
    """
    syntax, directory = _dialect(dialect), Path(directory)
    query = join_query(embedding_set, dialect=dialect, source=source, keep=keep, prefix=prefix)
    script, contents = "", {}
    tables = {name: _storable(table, dialect) for name, table in embedding_set.items()}
    for name in {name for cross in embedding_set.crosses for name in cross.features}:
        codes = pa.array(np.arange(tables[name].num_rows), pa.int64())
        tables[name] = tables[name].append_column("code", codes)
    for cross in embedding_set.crosses:
        pairs = cross.to_arrow()
        tables[cross.name] = pairs.cast(pa.schema([*map(_as_bigint, pairs.schema)]))
    for name, arrow in tables.items():
        file = f"{plain_name(prefix + name)}.{syntax.extension}"
        columns = ", ".join(
            f"{_name(syntax, field.name)} {_type(syntax, field.type)}" for field in arrow.schema
        )
        literal = _text_literal(file if location is None else f"{location}/{file}")
        script += syntax.load.format(table=_name(syntax, prefix + name), columns=columns, file=literal)
        contents[file] = _parquet(arrow) if syntax.extension == "parquet" else _csv(arrow)
    contents |= {"tables.sql": script.encode(), "join.sql": f"{query};\n".encode()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, data in contents.items():
            write_atomic(directory / file, data)
    except OSError as error:
        raise OutputError(f"cannot write to {directory}: {error.strerror or error}") from error
    return [directory / file for file in contents]


def join_query(
    embedding_set: EmbeddingSet,
    *,
    dialect: str,
    source: str = "rows",
    keep: Sequence[str] = (),
    prefix: str = "embedkit_",
) -> str:
    """Write the query that looks every row of a table up, to the same bits as `EmbeddingSet.transform`.

    A null (and NaN, in columns that were learned as floating point) is missing; a value that is not in the
    table of its feature is unknown. The query neither adds nor drops rows, and promises no order.

    Parameters
    ----------
    embedding_set : EmbeddingSet
    dialect : "duckdb", "postgres" or "spark"
    source : str
        Table or view with the columns `features_in`; before a dot its schema. Quoted as the database
        does, it is left as it is.
    keep : sequence of str
        Columns of it to put before the features.
    prefix : str
        What the tables of vectors are called: this, then the feature; those of crosses, this and their name.

    Raises
    ------
    InputError
        If a name does not fit the database, or would come out twice.
    """
    syntax = _dialect(dialect)
    _check_names(syntax, dialect, [*keep, *embedding_set.feature_names_out])
    crosses = embedding_set.crosses
    _check_names(syntax, dialect, [prefix + name for name in (*embedding_set, *(c.name for c in crosses))])
    selected = [f"s.{_name(syntax, name)}" for name in keep]
    joins, codes = [], {}
    for number, (feature, table) in enumerate(embedding_set.items()):
        key = _nullable(syntax, f"s.{_name(syntax, feature)}", table.categories.type)
        vectors = _name(syntax, prefix + feature)
        joins.append(
            f"LEFT JOIN {vectors} AS e{number} ON e{number}.category = {key}\n"
            f"LEFT JOIN {vectors} AS u{number} ON u{number}.category IS NULL\n"
            f"  AND u{number}.kind = CASE WHEN {key} IS NULL THEN 'missing' ELSE 'unknown' END"
        )
        codes[feature] = f"COALESCE(e{number}.code, u{number}.code)"
        for name in map(_namer(syntax), table.feature_names_out):
            selected.append(f"COALESCE(e{number}.{name}, u{number}.{name}) AS {name}")
    for column in embedding_set.numerics:
        selected += _numeric(syntax, column)
    for number, cross in enumerate(crosses):
        sides = zip(("first", "second"), cross.features, strict=True)
        same = [f"x{number}.{_name(syntax, side)} = {codes[feature]}" for side, feature in sides]
        joins.append(
            f"LEFT JOIN {_name(syntax, prefix + cross.name)} AS x{number}\n  ON {' AND '.join(same)}"
        )
        for name in map(_namer(syntax), cross.feature_names_out):
            selected.append(f"COALESCE(x{number}.{name}, CAST(0 AS {syntax.real})) AS {name}")
    columns = ",\n  ".join(selected)
    return "\n".join([f"SELECT\n  {columns}", f"FROM {_qualified(syntax, source)} AS s", *joins])


def _dialect(name: str) -> Dialect:
    if name not in DIALECTS:
        raise InputError(f"dialect must be one of {sorted(DIALECTS)}, got {name!r}")
    return DIALECTS[name]


def _name(syntax: Dialect, name: str) -> str:
    return f"{syntax.quote}{name.replace(syntax.quote, syntax.quote * 2)}{syntax.quote}"


def _qualified(syntax: Dialect, name: str) -> str:
    if name.startswith(syntax.quote):
        return name
    return ".".join(_name(syntax, part) for part in name.split("."))


def _text_literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _namer(syntax: Dialect) -> Callable[[str], str]:
    return lambda name: _name(syntax, name)


def _check_names(syntax: Dialect, dialect: str, names: Sequence[str]) -> None:
    folded = [name.lower() if syntax.folds_case else name for name in names]
    repeated = sorted({name for name, same in zip(names, folded, strict=True) if folded.count(same) > 1})
    if repeated:
        raise InputError(f"names {repeated} are the same in {dialect}: rename the columns")
    for name in names:
        if len(name.encode()) > syntax.max_name or "\0" in name:
            raise InputError(
                f"name {name!r} does not fit {dialect}, which takes {syntax.max_name} bytes: rename it, or "
                "the columns that it combines"
            )


def _type(syntax: Dialect, dtype: pa.DataType) -> str:
    types = pa.types
    if types.is_timestamp(dtype):
        return syntax.timestamp if dtype.tz is None else syntax.zoned
    if types.is_decimal(dtype):
        return f"DECIMAL({dtype.precision}, {dtype.scale})"
    names = {
        pa.string(): syntax.text,
        pa.int64(): "BIGINT",
        pa.float64(): syntax.double,
        pa.float32(): syntax.real,
        pa.bool_(): "BOOLEAN",
        pa.date32(): "DATE",
    }
    return names[dtype]


def _storable(table: EmbeddingTable, dialect: str) -> pa.Table:
    """The table in types that the database has."""
    arrow = table.to_arrow().replace_schema_metadata(None)
    dtype = table.categories.type
    if pa.types.is_time(dtype) or pa.types.is_duration(dtype) or pa.types.is_unsigned_integer(dtype):
        raise InputError(f"column {table.feature!r} is {dtype}, which is not exported: turn it into text")
    if pa.types.is_decimal(dtype) and dtype.precision > MAX_DIGITS and dialect != "postgres":
        raise InputError(
            f"column {table.feature!r} is {dtype}, and {dialect} has {MAX_DIGITS} digits: turn it into text"
        )
    if pa.types.is_timestamp(dtype):
        try:
            micro = arrow["category"].cast(pa.timestamp("us", dtype.tz))
        except pa.ArrowException as error:
            raise InputError(
                f"column {table.feature!r} is finer than a microsecond, the unit of {dialect}: round it"
            ) from error
        arrow = arrow.set_column(1, "category", micro)
    if dialect == "postgres" and pa.types.is_string(dtype):
        zero = [value for value in table.categories.to_pylist() if "\0" in value]
        if zero:
            raise InputError(
                f"column {table.feature!r} has a category {zero[0]!r}, which PostgreSQL lacks: replace it"
            )
    return arrow


def _as_bigint(field: pa.Field) -> pa.Field:
    """Codes as the databases have whole numbers."""
    return field.with_type(pa.int64()) if pa.types.is_integer(field.type) else field


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none")
    return sink.getvalue()


def _csv(table: pa.Table) -> bytes:
    from pyarrow import csv

    sink = io.BytesIO()
    # Everything but null in quotes: an empty text is a category, and no null.
    csv.write_csv(table, sink, csv.WriteOptions(quoting_style="all_valid"))
    return sink.getvalue()


def _number(syntax: Dialect, value: float, dtype: str | None = None) -> str:
    # 17 digits name a double; the exponent keeps databases from reading a decimal.
    return f"CAST({value:.16e} AS {dtype or syntax.double})"


def _nullable(syntax: Dialect, column: str, dtype: pa.DataType) -> str:
    if not pa.types.is_floating(dtype):
        return column
    return f"NULLIF({column}, CAST('NaN' AS {syntax.double}))"


def _numeric(syntax: Dialect, column: NumericColumn) -> list[str]:
    value = _nullable(syntax, f"CAST(s.{_name(syntax, column.feature)} AS {syntax.double})", pa.float64())
    filled = value if column.fill is None else f"COALESCE({value}, {_number(syntax, column.fill)})"
    scaled = f"({filled} - {_number(syntax, column.center)}) * {_number(syntax, column.scale)}"
    limit = float(np.finfo(np.float32).max)
    clipped = f"LEAST(GREATEST({scaled}, {_number(syntax, -limit)}), {_number(syntax, limit)})"
    if column.fill is None:
        # LEAST and GREATEST pass over null, and NaN is their largest number.
        clipped = f"CASE WHEN {value} IS NULL THEN CAST('NaN' AS {syntax.double}) ELSE {clipped} END"
    expressions = [f"CAST({clipped} AS {syntax.real})"]
    if column.missing_scale is not None:
        marks = (_number(syntax, column.missing_scale, syntax.real), _number(syntax, 0.0, syntax.real))
        expressions.append(f"CASE WHEN {value} IS NULL THEN {marks[0]} ELSE {marks[1]} END")
    names = map(_namer(syntax), column.feature_names_out)
    return [f"{expression} AS {name}" for expression, name in zip(expressions, names, strict=True)]
