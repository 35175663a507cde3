"""The rows that were learned from, as other models are to learn from them, in one Parquet file."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedkit.errors import InputError, OutputError
from embedkit.frames import from_numpy, repeated
from embedkit.serving.output import PartFile
from embedkit.serving.units import ROW_GROUP_ROWS, output_schema
from embedkit.tables import EmbeddingSet


def write_training_rows(
    path: str | os.PathLike, rows: pa.Table, embedding_set: EmbeddingSet, vectors: np.ndarray
) -> None:
    """Write rows with the vectors that `fit_transform` has made of them, in columns like `transform_dataset`.

    Parameters
    ----------
    path : path
        Parquet file that appears whole, in a directory that is made if need be.
    rows : pa.Table of n_rows rows
        Columns to put before the vectors; a number that is scaled takes the place of the raw one.
    embedding_set : EmbeddingSet
        What was learned; it names the columns.
    vectors : float32 array of shape (n_rows, n_features_out)

    Raises
    ------
    InputError
        If two columns would have one name.
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    scaled = {column.feature for column in embedding_set.numerics}
    rows = rows.select([name for name in rows.column_names if name not in scaled])
    plain = [  # as `transform_dataset` writes categories
        pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in rows.schema
    ]
    rows = rows.cast(pa.schema(plain, rows.schema.metadata))
    schema = output_schema(embedding_set, rows.schema, "wide")
    if twice := repeated(schema.names):
        raise InputError(f"{path} would have two columns of the name(s) {twice}: rename those of the data")
    # Statistics of vectors help no reader to skip anything.
    options = {"compression": "zstd", "write_statistics": rows.column_names}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = PartFile(path.parent, path.name, schema, options)
        try:
            for start in range(0, rows.num_rows, ROW_GROUP_ROWS):
                slab = rows.slice(start, ROW_GROUP_ROWS)
                numbers = np.ascontiguousarray(vectors[start : start + ROW_GROUP_ROWS].T)
                columns = [*slab.columns, *map(from_numpy, numbers)]
                part.append(pa.Table.from_arrays(columns, schema=schema))
            part.close()
        finally:
            part.discard()
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
