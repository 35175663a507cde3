"""What an estimator learns from, checked: rows in memory, or in Parquet files that need not fit into it."""

import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from sklearn.utils.validation import _check_feature_names, _check_n_features, check_consistent_length

from embedkit.errors import InputError, did_you_mean, first_line
from embedkit.frames import check_unique, is_index, to_table, type_family, weight_column
from embedkit.roles import choose_roles

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

    from embedkit.base import EntityEmbeddingBase
    from embedkit.learning.learned import Task
    from embedkit.learning.streaming import Stream


def has_names(X: Any) -> bool:
    """Whether X is a frame whose columns have names; as in scikit-learn, numbers are no names."""
    columns = X.schema.names if isinstance(X, (pa.Table, pa.RecordBatch)) else getattr(X, "columns", ())
    return any(isinstance(name, str) for name in columns)


def has_types(X: Any, table: pa.Table) -> bool:
    """Whether the types of the columns say which are categorical.

    They do in a frame, unless its columns have no names and are all numbers: that is as good as an array.
    """
    families = map(type_family, table.schema.types)
    return has_names(X) or (hasattr(X, "columns") and any(family != "number" for family in families))


def is_stream(X: Any) -> bool:
    """Whether X says where rows are, instead of holding them: a path, a URI or a dataset of Arrow."""
    if isinstance(X, (str, os.PathLike)):
        return True
    dataset = sys.modules.get("pyarrow.dataset")
    return dataset is not None and isinstance(X, dataset.Dataset)


def check_repeatable(estimator: "EntityEmbeddingBase") -> None:
    """Raise InputError where a second fit would draw other random numbers: no checkpoint can help it."""
    if not isinstance(estimator.random_state, Integral):
        raise InputError(
            f"a checkpoint needs a random_state that is a number, got {estimator.random_state!r}: a training "
            "that draws other numbers cannot go on from it"
        )


def task_of_rows(estimator: "EntityEmbeddingBase", X: Any, y: Any, sample_weight: Any) -> "Task":
    """What an estimator is to learn from rows in memory."""
    from embedkit.learning.learned import Task
    from embedkit.learning.targets import as_targets, make_heads

    table = estimator._read(X, reset=True)
    targets, names, estimator._single = as_targets(y)
    check_consistent_length(np.empty(table.num_rows), targets)
    if table.num_rows < 2:
        raise InputError(
            f"at least 2 rows are needed to learn from, found {table.num_rows} sample (1 sample)"
        )
    roles = choose_roles(table, estimator.categorical_features, typed=has_types(X, table))
    weights = estimator._weights(sample_weight, table.num_rows)
    heads = make_heads(targets, names, estimator._target_type(), weights)
    return Task(table, roles, heads, targets, weights, estimator._settings())


def task_of_stream(
    estimator: "EntityEmbeddingBase",
    X: Any,
    y: str | Sequence[str],
    sample_weight: str | None,
    cache_dir: str | os.PathLike | None,
) -> "Task":
    """What an estimator is to learn from rows in files.

    Rows that are few enough to be sorted are read at once: what comes of them is what comes of the same rows
    in memory, to the last bit.
    """
    from embedkit.learning.learned import Task
    from embedkit.learning.numeric import MAX_SORTED_ROWS
    from embedkit.learning.streaming import scan_heads, target_column

    stream = make_stream(X, y, sample_weight, cache_dir)
    rows = _read_small(stream, MAX_SORTED_ROWS)
    if rows is not None:
        targets = pa.table({name: target_column(rows, name) for name in stream.targets}).to_pandas()
        weights = None if sample_weight is None else weight_column(rows, sample_weight)
        features = rows.select(stream.empty.column_names)
        return task_of_rows(estimator, features, targets[y] if isinstance(y, str) else targets, weights)
    settings = estimator._settings()
    if settings.pairs_asked_for:
        raise InputError(
            f"crosses are learned from rows in memory, not from files: set it to 0, got {settings.crosses}"
        )
    columns = stream.empty
    _check_feature_names(estimator, columns, reset=True)
    _check_n_features(estimator, columns, reset=True)
    estimator._single = isinstance(y, str)
    roles = choose_roles(columns, estimator.categorical_features, typed=True)
    heads = scan_heads(stream, estimator._target_type())
    return Task(stream, roles, heads, None, None, settings)


def open_dataset(location: str | os.PathLike) -> "Dataset":
    """Open Parquet files as one dataset.

    Parameters
    ----------
    location : path or URI
        A file, a directory (searched in all depths) or a pattern. Names of directories such as ``year=2020``
        are columns. Columns take the type that holds what is in all files.

    Returns
    -------
    pyarrow.dataset.Dataset

    Raises
    ------
    InputError
        If there are no such files, or they cannot be read together.
    """
    from pyarrow import dataset as ds

    from embedkit.serving.sources import open_source

    source = open_source(location)
    if source.format != "parquet":
        raise InputError(
            f"{os.fspath(location)} is no Parquet: convert it; or give embedkit fit one .csv file, "
            "without --stream"
        )
    first = source.files[0]
    options = ds.FileSystemFactoryOptions(
        partition_base_dir=first.path.removesuffix(first.name),
        partitioning=ds.HivePartitioning.discover(infer_dictionary=True),
    )
    # What is read ahead at once is a file as a whole by default.
    reading = ds.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
    layout = ds.ParquetFileFormat(default_fragment_scan_options=reading)
    try:
        factory = ds.FileSystemDatasetFactory(
            source.system, [file.path for file in source.files], layout, options
        )
        dataset = factory.finish(factory.inspect(promote_options="permissive", fragments=None))
    except (pa.ArrowException, OSError, TypeError) as error:
        reason = first_line(error)
        raise InputError(f"{os.fspath(location)} cannot be read as Parquet ({reason}): repair it") from error
    _warn_of_gaps(dataset)
    return dataset


def _warn_of_gaps(dataset: "Dataset") -> None:
    """Warn of files that lack columns which others have: what is missing there may have been renamed."""
    from embedkit.serving.sources import FOOTER_THREADS

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        fragments = list(dataset.get_fragments())
        schemas = pool.map(lambda fragment: fragment.physical_schema, fragments)
        names = [frozenset(name for name in schema.names if not is_index(name)) for schema in schemas]
    every = frozenset().union(*names)
    for fragment, found in zip(fragments, names, strict=True):
        if found != every:
            lacking = sorted(every - found)
            warnings.warn(
                f"{fragment.path} lacks column(s) {lacking} that other files have: "
                "its rows count as missing there",
                UserWarning,
                stacklevel=4,
            )
            return


def make_stream(
    X: Any,
    y: str | Sequence[str],
    sample_weight: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> "Stream":
    """The rows of a path, URI or dataset, where targets and weights are columns of it.

    Raises
    ------
    InputError
        If X cannot be read or lacks a column.
    """
    from embedkit.learning.streaming import Stream

    where = f"{os.fspath(X)}" if isinstance(X, (str, os.PathLike)) else "the dataset"
    dataset = X
    if isinstance(X, (str, os.PathLike)):
        dataset = open_dataset(X)
    fields = [field for field in dataset.schema if not is_index(field.name)]
    dataset = dataset.replace_schema(pa.schema(fields))
    named = [y] if isinstance(y, str) else list(y) if isinstance(y, (list, tuple)) else [None]
    if not all(isinstance(name, str) for name in named) or not named:
        raise InputError(f"y must name the column(s) of {where} to predict, got {type(y).__name__}")
    if not isinstance(sample_weight, (str, type(None))):
        raise InputError(f"sample_weight must name a column of {where}, got {type(sample_weight).__name__}")
    check_unique("y", named)
    names = dataset.schema.names
    check_unique(where, names)
    wanted = named if sample_weight is None else [*named, sample_weight]
    missing = [name for name in wanted if name not in names]
    if missing:
        hint = did_you_mean(missing, names)
        raise InputError(f"{where} has no column {missing}{hint}: it has {', '.join(names)}")
    if len(names) <= len(wanted):
        raise InputError(f"{where} has no column to learn from beside {wanted}")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    return Stream(dataset, tuple(named), sample_weight, cache)


def _read_small(stream: "Stream", max_rows: int) -> pa.Table | None:
    """All columns of all rows, if these are not too many."""
    try:
        if stream.dataset.count_rows() > max_rows:
            return None
        return to_table(stream.dataset.to_table())
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise InputError(f"the rows cannot be read ({reason}): repair or convert the files") from error
