"""The learned tables as plain files that any tool reads."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.columns import EmbeddingTable
from embedkit.errors import InputError, OutputError
from embedkit.layout import plain_name
from embedkit.serving.output import write_atomic
from embedkit.tables import EmbeddingSet

FORMATS = ("parquet", "csv", "vector")


def export_tables(
    embedding_set: EmbeddingSet, directory: str | os.PathLike, *, format: str = "parquet"
) -> list[Path]:
    """Write one file per feature: kind (missing, unknown, category), category, count, and the vector.

    Combinations have a file per pair of features, with the categories as text.

    Parameters
    ----------
    embedding_set : EmbeddingSet
    directory : path
        Made if need be. Files of the same names are replaced.
    format : {"parquet", "csv", "vector"}
        "parquet" and "csv" have a column per number; "vector" is Parquet that has the vector in one column
        ``embedding``, a fixed-size list of float32, as vector databases take it.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    InputError
        If the format is unknown, or two features differ in the case of letters only.
    OutputError
        If it cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not embedding_set:
        numbers = list(embedding_set.features_in)
        raise InputError(f"there is no table to export: {numbers} are numbers, name a categorical feature")
    directory = Path(directory)
    suffix = "csv" if format == "csv" else "parquet"
    contents: dict[Path, bytes] = {}
    for feature, table in embedding_set.items():
        contents[_path(directory, feature, suffix, contents)] = _content(table, format)
    for cross in embedding_set.crosses:
        pairs = cross.to_arrow()
        for i, feature in enumerate(cross.features):
            labels = pa.array(embedding_set[feature].vocabulary.labels())
            pairs = pairs.set_column(i, pairs.column_names[i], labels.take(pairs.column(i)))
        contents[_path(directory, cross.name, suffix, contents)] = _written(pairs, format)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, data in contents.items():
            write_atomic(path, data)
    except OSError as error:
        raise OutputError(f"cannot write to {directory}: {error.strerror or error}") from error
    return list(contents)


def _path(directory: Path, name: str, suffix: str, taken: Mapping[Path, bytes]) -> Path:
    path = directory / f"{plain_name(name)}.{suffix}"
    if str(path).lower() in map(str.lower, map(str, taken)):
        raise InputError(f"two features are called {name!r} up to case: export them one by one")
    return path


def _content(table: EmbeddingTable, format: str) -> bytes:
    arrow = table.to_arrow()
    if format == "vector":
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(table.vectors.ravel()), table.embedding_dim)
        arrow = arrow.select(["kind", "category", "count"]).append_column("embedding", vectors)
    return _written(arrow, format)


def _written(arrow: pa.Table, format: str) -> bytes:
    sink = io.BytesIO()
    if format == "csv":
        from pyarrow import csv

        # Everything but null in quotes: an empty text is a category, and no null.
        csv.write_csv(arrow, sink, csv.WriteOptions(quoting_style="all_valid"))
        return sink.getvalue()
    pq.write_table(arrow, sink, compression="none")
    return sink.getvalue()
