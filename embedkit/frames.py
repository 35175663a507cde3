"""Any dataframe becomes Arrow columns."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedkit.errors import InputError, did_you_mean, first_line, repeated

# What pa.array raises on cells that no single Arrow type holds.
_CONVERSION_ERRORS = (pa.ArrowException, TypeError, ValueError, OverflowError)


def is_index(name: str) -> bool:
    """Whether a column of a file is an unnamed pandas index: ``__index_level_0__``, in CSV without a name."""
    return name == "" or re.fullmatch(r"__index_level_\d+__", name) is not None


def is_array(X: Any) -> bool:
    """Whether ``X`` is an array or a list of rows, whose columns have no names."""
    return isinstance(X, (list, tuple)) or (hasattr(X, "__array__") and not hasattr(X, "columns"))


def to_table(
    X: Any,
    *,
    columns: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    as_strings: Iterable[str] = (),
) -> pa.Table:
    """Turn any tabular data into an Arrow table.

    None, NaN, NaT and ``pandas.NA`` all become null. A column of Python objects takes the Arrow type that
    holds all its cells; where no type does (mixed types), every cell becomes ``str(cell)`` and missing cells
    stay missing. A pandas or polars category stays dictionary-encoded, the fast path of lookups.

    Parameters
    ----------
    X : any eager frame that narwhals knows (pandas, polars, Arrow), or array of shape (n_rows, n_columns)
        The data. Columns of an array, or of a list of rows, are named by `feature_names`.
    columns : sequence of str, optional
        The columns to convert, in this order; others are not looked at. All by default.
    feature_names : sequence of str, optional
        Names of the columns of an array; ``x0, x1, ...`` by default. Frames have names of their own.
    as_strings : iterable of str
        Columns of Python objects to turn into strings cell by cell even if one type would hold all of them:
        a mixed column must not change its meaning when one batch of it happens to hold integers only.

    Returns
    -------
    pa.Table of n_rows rows

    Raises
    ------
    InputError
        If ``X`` is not two-dimensional, has no columns, lacks one of `columns`, or has column names that
        repeat or are not strings.
    """
    if hasattr(X, "tocsr"):
        raise InputError("sparse input is not supported: pass a dense array, X.toarray()")
    names, read = _source(X, feature_names)
    if not names:
        raise InputError(f"0 feature(s) (shape=({len(X)}, 0)) while a minimum of 1 is required.")
    wanted = names if columns is None else columns
    missing = [name for name in wanted if name not in names]
    if missing:
        hint = did_you_mean(missing, [name for name in names if isinstance(name, str)])
        raise InputError(f"the data lacks column(s) {missing}{hint}: expected {list(wanted)}")
    _check_names([name for name in names if name in frozenset(wanted)])
    as_strings = frozenset(as_strings)
    arrays = []
    for name in wanted:
        try:
            arrays.append(_text(read(names.index(name), name in as_strings), name))
        except (pa.ArrowException, TypeError) as error:
            reason = first_line(error)
            raise InputError(
                f"column {name!r} cannot be read ({reason}): cast it to numbers or text"
            ) from error
    return without_null_keys(pa.table(arrays, names=list(wanted)))


def check_unique(where: str | os.PathLike, names: Iterable[str]) -> None:
    """Raise InputError where a file or dataset has columns of one name."""
    if twice := repeated(names):
        raise InputError(f"{where} has more than one column named {twice}: rename or drop all but one")


def check_valid(table: pa.Table) -> None:
    """Raise InputError where Arrow data that comes from outside contradicts itself."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"the Arrow data is not valid: {error}") from error


def without_null_keys(table: pa.Table) -> pa.Table:
    """A table no dictionary of which has a null: keys of directories have, and pandas knows none."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type) and any(c.dictionary.null_count for c in table[i].chunks):
            plain = pa.chunked_array([chunk.dictionary_decode() for chunk in table[i].chunks])
            table = table.set_column(i, field.name, plain.dictionary_encode())
    return table


def to_column(values: Any, name: str, *, as_strings: bool = False) -> pa.Array | pa.ChunkedArray:
    """Turn one column, a pandas, polars or Arrow one or any sequence of n_rows cells, into an Arrow array.

    The rules are those of `to_table`; `name` is for its errors.
    """
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        column = values
    elif _is_pandas(values, "Series"):
        column = _pandas_column(values, name, as_strings)
    elif hasattr(values, "to_arrow"):
        column = values.to_arrow()
    else:
        cells = np.empty(len(values), dtype=object)
        cells[:] = list(values)
        column = _python_column(cells, name, as_strings)
    return _text(column, name)


def type_family(dtype: pa.DataType) -> str:
    """Group an Arrow type: ``"string"``, ``"bool"``, ``"number"``, ``"time"``, ``"null"`` or ``"other"``.

    A dictionary type belongs to the family of its values.
    """
    types = pa.types
    if types.is_dictionary(dtype):
        return type_family(dtype.value_type)
    if types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype):
        return "string"
    if types.is_boolean(dtype):
        return "bool"
    if types.is_integer(dtype) or types.is_floating(dtype) or types.is_decimal(dtype):
        return "number"
    if types.is_date(dtype) or types.is_timestamp(dtype) or types.is_time(dtype) or types.is_duration(dtype):
        return "time"
    return "null" if types.is_null(dtype) else "other"


def numeric_block(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Collect numeric columns into one array.

    Parameters
    ----------
    table : pa.Table
        The data, from `to_table`.
    names : sequence of str, k names
        Columns of integers, floats, decimals or booleans; a column of nulls only is accepted.

    Returns
    -------
    float64 array of shape (n_rows, k)
        NaN where a value is missing.

    Raises
    ------
    InputError
        If a column holds no numbers, or infinite ones.
    """
    block = np.empty((table.num_rows, len(names)), dtype=np.float64, order="F")
    for position, name in enumerate(names):
        column = table.column(name)
        if type_family(column.type) not in ("number", "bool", "null"):
            raise InputError(f"column {name!r} must hold numbers, found {column.type}: cast it to float64")
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        block[:, position] = as_numpy(_one_chunk(column.cast(pa.float64(), safe=False)), null=np.nan)
        infinite = np.flatnonzero(np.isinf(block[:, position]))
        if len(infinite):
            raise InputError(
                f"column {name!r} holds {len(infinite)} infinite value(s), the first in row {infinite[0]}: "
                "replace them by NaN or a finite number"
            )
    return block


def weight_column(table: pa.Table, name: str) -> np.ndarray:
    """A column of weights, float64 of shape (n_rows,), none of them missing or negative."""
    weights = numeric_block(table, [name])[:, 0]
    bad = np.flatnonzero(~(weights >= 0))
    if len(bad):
        raise InputError(
            f"weight column {name!r} is missing or negative in {len(bad)} row(s), the first is row {bad[0]}: "
            "a weight is a number of at least 0"
        )
    check_weights(weights)
    return weights


def check_weights(weights: np.ndarray) -> None:
    """Raise InputError where float32, in which rows are learned from, cannot hold weights or their sum."""
    largest = float(weights.max(initial=0.0))
    if 0 < largest < 1e-37 or largest * len(weights) > 1e37:
        raise InputError(
            f"sample_weight is {largest:.3g} at most, too little or too much: rescale it to a mean of 1"
        )


def to_list(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Cells as objects of Python, or as text where these cannot hold them: nanoseconds, the year 10000."""
    exact = column
    try:
        if column.type == pa.time64("ns"):  # of which Python would drop the nanoseconds without a word
            exact = column.cast(pa.time64("us"))
        return exact.to_pylist()
    except (OverflowError, ValueError):
        return column.cast(pa.string()).to_pylist()


def as_numpy(array: pa.Array, null: float = 0) -> np.ndarray:
    """Integers or floats as numpy, with `null` in the place of nulls.

    Arrow's own ways to do this import pandas, which a process that only looks up codes can do without.
    """
    data = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    numbers = np.from_dlpack(data)
    return np.where(is_null(array), null, numbers) if array.null_count else numbers


def from_numpy(values: np.ndarray) -> pa.Array:
    """Numbers as Arrow, in the same memory; ``pa.array`` would import pandas. Values lie side by side."""
    dtype = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(dtype, len(values), [None, pa.py_buffer(values)])


def is_null(array: pa.Array) -> np.ndarray:
    """Where an array is null, as bool of the same length."""
    return np.from_dlpack(array.is_null().cast(pa.uint8())).view(np.bool_)


def _check_names(names: Sequence[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise InputError(
                f"column names must be strings, found {name!r} ({type(name).__name__}): "
                "rename with X.columns = X.columns.astype(str)"
            )
    if twice := repeated(names):
        raise InputError(f"column names must be unique, found more than once: {twice}; rename or drop them")


def _is_pandas(X: Any, kind: str) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(X, getattr(pandas, kind))


def _source(X: Any, feature_names: Sequence[str] | None) -> tuple[list[Any], Callable[[int, bool], Any]]:
    """Name the columns of ``X``, and give a function that reads the one at a position (as strings or not)."""
    if isinstance(X, (pa.Table, pa.RecordBatch)):
        return X.schema.names, lambda i, _: X.column(i)
    if _is_pandas(X, "DataFrame"):
        return list(X.columns), lambda i, as_strings: _pandas_column(X.iloc[:, i], X.columns[i], as_strings)
    if not is_array(X):
        return _narwhals_source(X)
    values = np.array(X, dtype=object) if isinstance(X, (list, tuple)) else np.asarray(X)
    if values.ndim != 2:
        raise InputError(
            f"Expected 2D array, got {values.ndim}D array instead: "
            "Reshape your data with X.reshape(-1, 1) for one column or X.reshape(1, -1) for one row"
        )
    if values.dtype.kind == "c":
        raise InputError("Complex data not supported: pass real numbers or strings")
    names = [f"x{i}" for i in range(values.shape[1])] if feature_names is None else list(feature_names)
    if len(names) != values.shape[1]:
        raise InputError(f"X has {values.shape[1]} features, but {len(names)} features are expected: {names}")
    if values.dtype == object:
        return names, lambda i, as_strings: _python_column(values[:, i], names[i], as_strings)
    return names, lambda i, _: pa.array(values[:, i], from_pandas=True)


def _pandas_column(series: Any, name: str, as_strings: bool) -> pa.Array | pa.ChunkedArray:
    if hasattr(series, "cat"):
        codes, categories = series.cat.codes.to_numpy(), series.cat.categories
        values = _one_chunk(_pandas_column(categories.to_series(), name, as_strings))
        missing = codes.min(initial=0) < 0
        # Without a mask nothing is copied; and pandas sees to it that all codes are those of categories.
        indices = pa.array(codes, mask=codes < 0 if missing else None)
        column = pa.DictionaryArray.from_arrays(indices, values, safe=False)
        # Objects such as 1 and "1" are one text.
        alike = categories.dtype == object and len(values.unique()) < len(values)
        return column.dictionary_decode().dictionary_encode() if alike else column
    # Periods and intervals have no Arrow type: they are objects with a readable str().
    if series.dtype != object and series.dtype.name.partition("[")[0] not in ("period", "interval", "Sparse"):
        return pa.array(series, from_pandas=True)
    return _python_column(series.astype(object).to_numpy(), name, as_strings)


def _narwhals_source(X: Any) -> tuple[list[str], Callable[[int, bool], Any]]:
    import narwhals as nw
    from narwhals.exceptions import DuplicateError

    try:
        frame = nw.from_native(X, eager_only=True)
        schema = frame.schema
    except DuplicateError as error:
        raise InputError(f"column names must be unique: {error}") from error
    except TypeError as error:
        raise InputError(
            f"expected a dataframe, an Arrow table or a 2D array, got {type(X).__name__}: "
            "collect a lazy frame first, give a single column as a frame with one column"
        ) from error
    names = frame.columns

    def read(i: int, as_strings: bool) -> pa.Array:
        column = frame.get_column(names[i])
        if schema[names[i]] == nw.Object:
            return to_column(column.to_list(), names[i], as_strings=as_strings)
        return column.to_arrow()

    return names, read


def _python_column(cells: np.ndarray, name: str, as_strings: bool) -> pa.Array:
    """Convert an array of Python objects, mixed types to strings."""
    try:
        column = pa.array(cells, from_pandas=True)
    except _CONVERSION_ERRORS:
        pass
    else:
        family = type_family(column.type)
        mixed = _takes_one_for_another(family, cells)
        if family == "string" or not (as_strings or mixed):
            return column
    import pandas as pd

    try:
        missing = pd.isna(cells)
        return pa.array(
            [None if gap else _as_text(cell) for cell, gap in zip(cells, missing, strict=True)], pa.string()
        )
    except UnicodeError as error:
        raise InputError(
            f"column {name!r} holds text that is not valid Unicode ({error}): clean it"
        ) from error


def _as_text(cell: Any) -> str:
    return cell.decode() if isinstance(cell, bytes) else str(cell)


def _takes_one_for_another(family: str, cells: np.ndarray) -> bool:
    """Whether Arrow made numbers of booleans, or dates of numbers or datetimes, as in some orders it does."""
    if family == "number":
        return any(isinstance(cell, (bool, np.bool_)) for cell in cells)
    if family != "time":
        return False
    import pandas as pd

    present = cells[~pd.isna(cells)]
    return len({(type(cell), str(getattr(cell, "tzinfo", None))) for cell in present}) > 1


def _one_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _text(column: pa.Array | pa.ChunkedArray, name: str) -> pa.Array | pa.ChunkedArray:
    """Bytes that are UTF-8 are text, and so are views of text."""
    types, text = pa.types, pa.string()
    values = column.type
    if types.is_dictionary(values):
        text, values = pa.dictionary(values.index_type, text), values.value_type
    if types.is_string_view(values):  # Arrow cannot take from views
        return column.cast(text)
    if not (types.is_binary(values) or types.is_large_binary(values)):
        return column
    try:
        return column.cast(text)
    except pa.ArrowInvalid as error:
        raise InputError(f"column {name!r} holds bytes that are not UTF-8 text: decode or drop it") from error
