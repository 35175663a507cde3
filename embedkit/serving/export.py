"""The learned tables as plain files that any tool reads."""

import io
import os
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.columns import EmbeddingTable
from embedkit.errors import InputError, OutputError
from embedkit.serving.output import write_atomic
from embedkit.tables import EmbeddingSet

FORMATS = ("parquet", "csv", "vector")


def export_tables(
    embedding_set: EmbeddingSet, directory: str | os.PathLike, *, format: str = "parquet"
) -> list[Path]:
    """Write one file per feature: kind (missing, unknown, category), category, count, and the vector.

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
        path = directory / f"{quote(feature, safe=' ')}.{suffix}"
        if str(path).lower() in map(str.lower, map(str, contents)):
            raise InputError(f"two features are called {feature!r} up to case: export them one by one")
        contents[path] = _content(table, format)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, data in contents.items():
            write_atomic(path, data)
    except OSError as error:
        raise OutputError(f"cannot write to {directory}: {error.strerror or error}") from error
    return list(contents)


def _content(table: EmbeddingTable, format: str) -> bytes:
    arrow, sink = table.to_arrow(), io.BytesIO()
    if format == "csv":
        from pyarrow import csv

        # Everything but null in quotes: an empty text is a category, and no null.
        csv.write_csv(arrow, sink, csv.WriteOptions(quoting_style="all_valid"))
        return sink.getvalue()
    if format == "vector":
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(table.vectors.ravel()), table.embedding_dim)
        arrow = arrow.select(["kind", "category", "count"]).append_column("embedding", vectors)
    pq.write_table(arrow, sink, compression="none")
    return sink.getvalue()
