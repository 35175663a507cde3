"""Files of rows, CSV or Parquet: which columns to learn from, and what they are to predict."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedkit.errors import InputError, did_you_mean, first_line, require
from embedkit.frames import check_unique, is_index, type_family, weight_column, without_null_keys

if TYPE_CHECKING:
    import pandas as pd
    from pyarrow.dataset import Dataset

    from embedkit.base import EntityEmbeddingBase

CSV_SUFFIXES = (".csv", ".csv.gz")
# Parquet files of more rows than this are learned from without reading all of them into memory.
STREAM_ROWS = 5_000_000


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Rows to learn from.

    Attributes
    ----------
    X : pa.Table of n_rows rows, or pyarrow.dataset.Dataset
        The columns to learn from; of a dataset, which is not read yet, all columns.
    y : Series or DataFrame of n_rows rows, or str or list of str
        One target, or several; their names in a dataset.
    sample_weight : ndarray of shape (n_rows,), str or None
        How many rows each row stands for; the name of a column of a dataset.
    groups : Series of n_rows rows, or None
        Which rows belong together.
    table : pa.Table of n_rows rows, or None
        All columns of rows in memory.
    """

    X: "pa.Table | Dataset"
    y: "pd.Series | pd.DataFrame | str | list[str]"
    sample_weight: np.ndarray | str | None
    groups: "pd.Series | None" = None
    table: pa.Table | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.X.num_rows if isinstance(self.X, pa.Table) else self.X.count_rows()

    def estimator(self, task: str = "auto", **parameters: Any) -> "EntityEmbeddingBase":
        """Choose the estimator that can also predict the target; it is not fitted yet.

        Parameters
        ----------
        task : {"auto", "continuous", "binary", "multiclass"}
            What the targets are; see `EntityEmbeddingEncoder`.
        **parameters
            Of the estimator.

        Returns
        -------
        EntityEmbeddingRegressor, EntityEmbeddingClassifier or EntityEmbeddingEncoder
            The last where some targets are numbers and some classes: it transforms and does not predict.

        Raises
        ------
        InputError
            If a target cannot be learned, or does not fit `task`.
        MissingExtraError
            If what it takes to learn and to store is not installed.
        """
        require("torch", "train")
        require("safetensors", "train")
        from embedkit.encoder import EntityEmbeddingEncoder
        from embedkit.inputs import make_stream
        from embedkit.learning.streaming import scan_heads
        from embedkit.learning.targets import as_targets, make_heads
        from embedkit.predictors import EntityEmbeddingClassifier, EntityEmbeddingRegressor

        if isinstance(self.X, pa.Table):
            targets, names, _ = as_targets(self.y)
            heads = make_heads(targets, names, task, self.sample_weight)
        else:
            heads = scan_heads(make_stream(self.X, self.y, self.sample_weight), task)
        kinds = {head.kind for head in heads}
        if kinds == {"continuous"}:
            return EntityEmbeddingRegressor(target_type=task, **parameters)
        if "continuous" not in kinds:
            return EntityEmbeddingClassifier(target_type=task, **parameters)
        return EntityEmbeddingEncoder(target_type=task, **parameters)

    def learn(
        self,
        estimator: "EntityEmbeddingBase",
        out: str | os.PathLike,
        train_features: str | os.PathLike | None = None,
        **saving: Any,
    ) -> str:
        """Fit an estimator, and store it.

        Parameters
        ----------
        estimator : EntityEmbeddingBase
        out : path or URI
            Root of the stored set.
        train_features : path, optional
            Parquet file for these rows as `fit_transform` encodes them; for rows in memory.
        **saving
            ``cache_dir``, ``checkpoint`` and ``checkpoint_seconds`` of `fit`.

        Returns
        -------
        str
            The stored version.

        Raises
        ------
        InputError
            As `fit` does, and where two columns of `train_features` would have one name; the set is stored
            then.
        OutputError
            If something cannot be written.
        """
        from embedkit.archive import is_writer
        from embedkit.serving.training_rows import write_training_rows

        rows = self.X, self.y, self.sample_weight
        if train_features is None:
            return estimator.fit(*rows, **saving).save(out)
        saving.pop("cache_dir", None)
        vectors = estimator.fit_transform(*rows, self.groups, **saving)
        version = estimator.save(out)
        if is_writer():
            write_training_rows(train_features, self.table, estimator.embeddings_, vectors)
        return version


def read_table(path: str | os.PathLike, types: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """Read a CSV or Parquet file.

    Parameters
    ----------
    path : path
        A file whose name ends in ``.parquet``, ``.csv`` or ``.csv.gz``, or a directory of Parquet files.
        Empty cells of a CSV file, and the usual marks (NA, NULL, nan), are missing values.
    types : mapping of str to pa.DataType, optional
        Types of columns of a CSV file, where they are known. Others are what their cells look like; whole
        numbers are text if some begin with 0 or have more than 63 bits.

    Returns
    -------
    pa.Table

    Raises
    ------
    InputError
        If the file is not there, is of another kind, cannot be read, has no rows, or repeats a column name.
    """
    from embedkit.serving.csv_files import read_whole_csv
    from embedkit.serving.sources import check_name

    path = Path(check_name(os.fspath(path)))
    is_csv = path.name.lower().endswith(CSV_SUFFIXES)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .csv or .parquet file")
    if not (is_csv or path.is_dir() or path.suffix.lower() == ".parquet"):
        raise InputError(f"{path} is of an unknown kind: give a file named .csv, .csv.gz or .parquet")
    try:
        table = read_whole_csv(path, types or {}) if is_csv else _read_parquet(path)
    except (pa.ArrowException, OSError, EOFError) as error:
        kind = "CSV" if is_csv else "Parquet"
        reason = first_line(error)
        raise InputError(f"{path} cannot be read as {kind} ({reason}): repair or convert it") from error
    check_unique(path, table.column_names)
    if table.num_rows == 0:
        raise InputError(f"{path} has 0 rows: give a file with at least 1 row below its column names")
    for i, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):  # Arrow cannot filter views
            table = table.set_column(i, field.name, table[field.name].cast(pa.string()))
    return table


def read_training(
    path: str | os.PathLike,
    target: Sequence[str],
    *,
    columns: Sequence[str] = (),
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
    weight: str | None = None,
    group: str | None = None,
    skip_missing_target: bool = False,
    types: Mapping[str, pa.DataType] | None = None,
) -> TrainingData:
    """Read rows to learn from.

    Parameters
    ----------
    path, types
        See `read_table`.
    target : sequence of str
        What is to be predicted: one column or several.
    columns : sequence of str
        What to learn from; by default all columns but the targets, `weight`, `group` and an unnamed pandas
        index.
    categorical : sequence of str
        Columns that must be among those to learn from.
    drop : sequence of str
        Columns to leave out.
    weight : str, optional
        Column that holds how many rows each row stands for.
    group : str, optional
        Column that says which rows belong together.
    skip_missing_target : bool
        Leave out rows that lack a target.

    Returns
    -------
    TrainingData

    Raises
    ------
    InputError
        If the file cannot be read, lacks a column, or has weights that are no weights.
    """
    table = read_table(path, types)
    used = _used_columns(path, table, target, columns, categorical, drop, weight, group)
    table = _with_target(path, table, target, skip_missing_target)
    return TrainingData(
        table.select(used),
        _targets(table, target),
        None if weight is None else weight_column(table, weight),
        None if group is None else table[group].to_pandas(),
        table,
    )


def open_training(
    path: str, target: Sequence[str], *, stream: bool | None = None, **roles: Any
) -> TrainingData:
    """Rows to learn from: read, or as a dataset that is read while it is learned from.

    Parameters
    ----------
    path : path or URI
        See `read_table`; a dataset may also be a pattern or a URI of Parquet files.
    target : sequence of str
        See `read_training`.
    stream : bool, optional
        Whether not to read the rows at once. By default this depends on their number.
    **roles
        As of `read_training`, which says also what is raised.

    Returns
    -------
    TrainingData
    """
    if stream or (stream is None and _is_large(path)):
        return _stream_training(path, target, **roles)
    return read_training(path, target, **roles)


def _is_large(path: str) -> bool:
    from embedkit.inputs import open_dataset

    if not os.path.exists(path):
        return "://" in path or has_magic(path)
    try:
        return not path.lower().endswith(CSV_SUFFIXES) and open_dataset(path).count_rows() > STREAM_ROWS
    except (InputError, pa.ArrowException, OSError):
        return False  # what is wrong with it is said where it is read


def _stream_training(
    path: str,
    target: Sequence[str],
    *,
    columns: Sequence[str] = (),
    categorical: Sequence[str] = (),
    drop: Sequence[str] = (),
    weight: str | None = None,
    group: str | None = None,
    skip_missing_target: bool = False,
) -> TrainingData:
    from embedkit.inputs import open_dataset

    dataset = open_dataset(path)
    schema = dataset.schema
    check_unique(path, schema.names)
    used = _used_columns(path, schema.empty_table(), target, columns, categorical, drop, weight, group)
    wanted = [*used, *target, *([] if weight is None else [weight])]
    dataset = dataset.replace_schema(pa.schema([schema.field(name) for name in dict.fromkeys(wanted)]))
    for name in target if skip_missing_target else ():
        dataset = dataset.filter(~pc.field(name).is_null(nan_is_null=True))
    return TrainingData(dataset, target[0] if len(target) == 1 else list(target), weight)


def _used_columns(
    path: str | os.PathLike,
    table: pa.Table,
    target: Sequence[str],
    columns: Sequence[str],
    categorical: Sequence[str],
    drop: Sequence[str],
    weight: str | None,
    group: str | None,
) -> list[str]:
    """The columns to learn from; the parameters are those of `read_training`."""
    weights, groups = ([] if name is None else [name] for name in (weight, group))
    named = {"target": target, "columns": columns, "categorical": categorical, "drop": drop}
    _check_named(path, table, named | {"weight": weights, "group": groups})
    if not target:
        raise InputError(f"no target given: name the column of {path} that is to be predicted")
    left_out = {*target, *weights, *groups, *drop}
    data = [name for name in table.column_names if not is_index(name)]
    used = [name for name in (columns or data) if name not in left_out]
    if not used:
        raise InputError(f"{path} has no column to learn from beside {sorted(left_out)}: drop fewer")
    contradictory = [name for name in categorical if name not in used]
    if contradictory:
        raise InputError(
            f"categorical names {contradictory}, which is target, weight, group or left out: name it once"
        )
    return used


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    from embedkit.inputs import open_dataset

    if path.is_file():
        check_unique(path, pq.read_schema(path).names)  # a dataset fails on these, and does not say why
    return without_null_keys(open_dataset(path).to_table())


def _check_named(path: str | os.PathLike, table: pa.Table, named: Mapping[str, Iterable[str]]) -> None:
    for option, names in named.items():
        missing = [name for name in names if name not in table.column_names]
        if missing:
            hint = did_you_mean(missing, table.column_names)
            raise InputError(
                f"{path} has no column {', '.join(map(repr, missing))}{hint}, which {option} names: "
                f"it has {', '.join(table.column_names)}"
            )


def _with_target(path: str | os.PathLike, table: pa.Table, target: Sequence[str], skip: bool) -> pa.Table:
    """The rows that have all targets: what is missing cannot be learned from."""
    missing = pa.chunked_array([np.zeros(table.num_rows, dtype=bool)])
    for name in target:
        lacking = pc.is_null(table[name], nan_is_null=True)
        count = pc.sum(lacking).as_py() or 0
        if count == table.num_rows:
            raise InputError(f"target {name!r} is missing in all rows of {path}: name another target")
        if count and not skip:
            raise InputError(
                f"target {name!r} is missing in {count:,} of {table.num_rows:,} rows of {path}: "
                "fill them, or leave them out with --skip-missing-target"
            )
        missing = pc.or_(missing, lacking)
    table = table.filter(pc.invert(missing))
    if table.num_rows == 0:
        raise InputError(f"no row of {path} has all of {list(target)}: learn them one by one")
    return table


def _targets(table: pa.Table, target: Sequence[str]) -> "pd.Series | pd.DataFrame":
    columns = table.select(target)
    for i, field in enumerate(columns.schema):
        if type_family(field.type) not in ("number", "bool", "string", "null"):
            raise InputError(
                f"target {field.name!r} is {field.type}: turn it into numbers (such as days), or into text"
            )
        if pa.types.is_decimal(field.type):
            columns = columns.set_column(i, field.name, columns[field.name].cast(pa.float64()))
    return columns.to_pandas() if len(target) > 1 else columns.to_pandas()[target[0]]
