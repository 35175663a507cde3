"""Any dataframe to Arrow columns, and the roles of columns."""

import datetime
import decimal
import random

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from embedkit.errors import InputError
from embedkit.frames import as_numpy, is_array, numeric_block, to_column, to_table, type_family
from embedkit.roles import Roles, column_roles

CELLS = {
    "text": ["a", None, "b"],
    "whole": [1, 2, None],
    "real": [0.5, None, 2.0],
    "flag": [True, None, False],
    "day": [datetime.date(2024, 1, 31), None, datetime.date(2024, 2, 1)],
}


@pytest.mark.parametrize(
    "make",
    [
        pa.table,
        lambda cells: pa.table(cells).to_batches()[0],
        lambda cells: pl.DataFrame(cells),
        lambda cells: pa.table(cells).to_pandas(types_mapper=pd.ArrowDtype),
        lambda cells: pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in cells.items()}),
    ],
    ids=["arrow", "batch", "polars", "pandas-arrow", "pandas-object"],
)
def test_every_frame_gives_the_same_columns(make):
    table = to_table(make(CELLS))
    assert table.to_pydict() == CELLS
    families = [type_family(field.type) for field in table.schema]
    assert families == ["string", "number", "number", "bool", "time"]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, float("nan")])
@pytest.mark.parametrize("present", ["a", 1.5, datetime.datetime(2024, 1, 1, 5)])
def test_missing_cells_become_null(missing, present):
    column = to_table(pd.DataFrame({"c": pd.Series([present, missing], dtype=object)}))["c"]
    assert column.is_null().to_pylist() == [False, True]


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (pd.Series(["a", None]), ["a", None]),
        (pd.Series(["a", None], dtype="string"), ["a", None]),
        (pd.Series([1, None], dtype="Int64"), [1, None]),
        (pd.Series([True, None], dtype="boolean"), [True, None]),
        (pd.Series([1.5, np.nan]), [1.5, None]),
        (pd.Series(pd.period_range("2024-01", periods=2, freq="M")), ["2024-01", "2024-02"]),
        (pd.Series([0, 3], dtype="Sparse[int]"), [0, 3]),
        (pd.Series([b"a", "b"]), ["a", "b"]),
        (pd.Series([1, "a", None]), ["1", "a", None]),
        (pd.Series([b"a", 1]), ["a", "1"]),
        (pd.Series([0.5, True]), ["0.5", "True"]),
        (pd.Series([datetime.date(2024, 1, 1), 0]), ["2024-01-01", "0"]),
        (pd.Series([{"a": 1}, 2.5]), ["{'a': 1}", "2.5"]),
        (
            pd.Series([datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 5)]),
            ["2024-01-01", "2024-01-01 05:00:00"],
        ),
    ],
)
def test_pandas_types(series, expected):
    assert to_table(pd.DataFrame({"c": series.array}))["c"].to_pylist() == expected


@pytest.mark.parametrize(
    ("categories", "expected"),
    [(["u", "v"], ["v", None, "u"]), ([1, 2], [2, None, 1]), ([1, "v"], ["v", None, "1"])],
)
def test_pandas_category_stays_a_dictionary(categories, expected):
    values = pd.Categorical.from_codes([1, -1, 0], categories=categories)
    column = to_table(pd.DataFrame({"c": values}))["c"]
    assert pa.types.is_dictionary(column.type)
    assert column.to_pylist() == expected


def test_intervals_become_text():
    column = to_table(pd.DataFrame({"c": pd.cut([1, 9], [0, 5, 10])}))["c"]
    assert column.to_pylist() == ["(0, 5]", "(5, 10]"]


def test_polars_categories_and_objects():
    frame = pl.DataFrame(
        {
            "category": pl.Series(["a", None], dtype=pl.Categorical),
            "enum": pl.Series(["a", None], dtype=pl.Enum(["b", "a"])),
            "object": pl.Series([1, "x"], dtype=pl.Object),
        }
    )
    table = to_table(frame)
    assert table.to_pydict() == {"category": ["a", None], "enum": ["a", None], "object": ["1", "x"]}
    assert pa.types.is_dictionary(table["category"].type)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[1, 2], [3, 4]]), {"x0": [1, 3], "x1": [2, 4]}),
        (np.array([[1.0, np.nan]]), {"x0": [1.0], "x1": [None]}),
        (np.array([["a", "b"]]), {"x0": ["a"], "x1": ["b"]}),
        (np.array([["a", 1], [None, 2.5]], dtype=object), {"x0": ["a", None], "x1": [1.0, 2.5]}),
        ([["a", 1], ["b", True]], {"x0": ["a", "b"], "x1": ["1", "True"]}),
        (np.array([["2024-01-01"]], dtype="datetime64[D]"), {"x0": [datetime.date(2024, 1, 1)]}),
    ],
)
def test_arrays(array, expected):
    assert is_array(array)
    assert to_table(array).to_pydict() == expected


def test_array_columns_take_the_given_names():
    assert to_table(np.zeros((1, 2)), feature_names=["a", "b"]).column_names == ["a", "b"]
    with pytest.raises(InputError, match="X has 2 features, but 1 features are expected"):
        to_table(np.zeros((1, 2)), feature_names=["a"])


def test_objects_can_be_read_as_strings_cell_by_cell():
    frame = pd.DataFrame({"c": pd.Series([1, 2.5, None, b"x"][:3], dtype=object)})
    assert to_table(frame)["c"].to_pylist() == [1.0, 2.5, None]
    assert to_table(frame, as_strings=["c"])["c"].to_pylist() == ["1", "2.5", None]
    assert to_column([1, None], "c", as_strings=True).to_pylist() == ["1", None]


cells = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=3).filter(str.isascii),
    st.binary(max_size=2).filter(bytes.isascii),
    st.dates(datetime.date(2000, 1, 1), datetime.date(2001, 1, 1)),
    st.datetimes(datetime.datetime(2000, 1, 1), datetime.datetime(2001, 1, 1)),
    st.decimals(-10, 10, places=2),
)


@given(st.lists(cells, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_change_a_column(values: list, shuffler: random.Random):
    order = list(range(len(values)))
    shuffler.shuffle(order)
    straight = to_column(values, "c")
    shuffled = to_column([values[i] for i in order], "c")
    assert straight.type == shuffled.type
    assert repr(straight.take(pa.array(order)).to_pylist()) == repr(shuffled.to_pylist())  # NaN too


@given(st.lists(cells, max_size=6))
def test_any_list_of_cells_makes_a_column(values):
    column = to_column(values, "c")
    missing = [value is None or (isinstance(value, float) and np.isnan(value)) for value in values]
    assert column.is_null().to_pylist() == missing
    assert type_family(column.type) != "other"


@pytest.mark.parametrize("make", [pd.Series, pl.Series, pa.array, list, np.array])
def test_one_column(make):
    assert to_column(make(["a", "b"]), "c").to_pylist() == ["a", "b"]


def test_columns_selects_and_orders():
    frame = pd.DataFrame({"a": [1], "b": [2], 3: [None], "d": [[1]]})
    assert to_table(frame, columns=["b", "a"]).to_pydict() == {"b": [2], "a": [1]}


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (
            pd.DataFrame([[1, 2]], columns=["a", "a"]),
            r"must be unique, found more than once: \['a'\]; rename",
        ),
        (pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), "must be unique"),
        (pd.DataFrame([[1, 2]]), r"must be strings, found 0 \(int\): rename"),
        (pd.DataFrame(index=[1, 2]), r"0 feature\(s\) \(shape=\(2, 0\)\) while a minimum of 1 is required"),
        (np.zeros((2, 0)), r"0 feature\(s\) \(shape=\(2, 0\)\)"),
        (np.zeros(3), "Expected 2D array, got 1D array instead: Reshape your data"),
        (pd.Series([1], name="a"), "Expected 2D array, got 1D"),
        (np.zeros((1, 1), dtype=complex), "Complex data not supported"),
        (
            scipy.sparse.csr_matrix(np.eye(2)),
            r"sparse input is not supported: pass a dense array, X.toarray\(\)",
        ),
        (pl.DataFrame({"a": [1]}).lazy(), "got LazyFrame: collect a lazy frame first"),
        ("text", "expected a dataframe, an Arrow table or a 2D array, got str"),
        (None, "got NoneType"),
        (pa.table({"a": [b"\xff"]}), "column 'a' holds bytes that are not UTF-8 text: decode or drop it"),
        (pd.DataFrame({"a": ["\ud800"]}, dtype=object), "column 'a' holds text that is not valid Unicode"),
    ],
)
def test_what_is_no_table_is_refused(X, message):
    with pytest.raises(InputError, match=message):
        to_table(X)


def test_a_missing_column_is_named_with_its_neighbours():
    with pytest.raises(InputError, match=r"lacks column\(s\) \['Store'\] \(did you mean 'store'\?\)"):
        to_table(pd.DataFrame({"store": [1]}), columns=["Store"])


@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        (pa.large_string(), "string"),
        (pa.string_view(), "string"),
        (pa.dictionary(pa.int8(), pa.string()), "string"),
        (pa.bool_(), "bool"),
        (pa.uint8(), "number"),
        (pa.float16(), "number"),
        (pa.decimal128(5, 2), "number"),
        (pa.duration("s"), "time"),
        (pa.time64("ns"), "time"),
        (pa.null(), "null"),
        (pa.list_(pa.int8()), "other"),
        (pa.binary(), "other"),
    ],
)
def test_type_family(dtype, family):
    assert type_family(dtype) == family


def test_roles_from_types():
    table = pa.table(
        {
            "text": ["a"],
            "number": [1.5],
            "category": pa.array([7]).dictionary_encode(),
            "decimal": [decimal.Decimal("1.5")],
            "flag": [True],
            "id": [7],
            "nothing": pa.nulls(1),
        }
    )
    assert column_roles(table) == Roles(("text", "category", "flag", "nothing"), ("number", "decimal", "id"))
    named = column_roles(table.drop_columns("text"), ["id"])
    assert named == Roles(("category", "flag", "id", "nothing"), ("number", "decimal"))


def test_dates_have_a_role_only_by_name():
    table = pa.table({"day": [datetime.date(2024, 1, 1)], "x": [1]})
    with pytest.raises(
        InputError, match=r"column 'day' is date32\[day\].*name it in categorical_features or drop it"
    ):
        column_roles(table)
    assert column_roles(table, ["day"]) == Roles(("day",), ("x",))


@pytest.mark.parametrize(
    ("categorical_features", "message"),
    [
        (["Stroe"], r"names \['Stroe'\], which the data does not have \(did you mean 'Store'\?\)"),
        (
            "Store",
            "categorical_features must be 'from_dtype' or a list of names, got categorical_features='Store'",
        ),
        ([3], r"names \[3\], which the data does not have$"),
    ],
)
def test_wrong_names_are_refused(categorical_features, message):
    with pytest.raises(InputError, match=message):
        column_roles(pa.table({"Store": [1]}), categorical_features)


@pytest.mark.parametrize("cells", [[[1]], [{"a": 1}]])
def test_nested_columns_are_refused(cells):
    with pytest.raises(InputError, match=r"column 'c' holds .*argument must be a string or a number"):
        column_roles(to_table(pd.DataFrame({"c": cells})))


def test_numeric_block():
    table = pa.table(
        {
            "i": pa.array([1, None, 3], pa.int8()),
            "f": pa.array([0.5, float("nan"), None], pa.float32()),
            "d": [decimal.Decimal("1.25"), None, None],
            "b": [True, False, None],
            "n": pa.nulls(3),
            "c": pa.array([4, None, 5]).dictionary_encode(),
            "big": pa.array([2**63 + 1024, 0, 0], pa.uint64()),
        }
    )
    nan = np.nan
    expected = np.array(
        [
            [1, 0.5, 1.25, 1, nan, 4, 2.0**63],
            [nan, nan, nan, 0, nan, nan, 0],
            [3, nan, nan, nan, nan, 5, 0],
        ]
    )
    block = numeric_block(table, table.column_names)
    assert block.dtype == np.float64
    np.testing.assert_array_equal(block, expected)
    assert numeric_block(table, []).shape == (3, 0)


def test_numeric_block_refuses_text_and_infinity():
    with pytest.raises(InputError, match="column 's' must hold numbers, found string: cast it to float64"):
        numeric_block(pa.table({"s": ["1"]}), ["s"])
    with pytest.raises(InputError, match=r"column 'x' holds 2 infinite value\(s\), the first in row 1"):
        numeric_block(pa.table({"x": [0.0, np.inf, -np.inf]}), ["x"])


@pytest.mark.parametrize(
    "dtype", [pa.int8(), pa.int32(), pa.int64(), pa.uint32(), pa.float32(), pa.float64()]
)
def test_as_numpy(dtype):
    array = pa.array([1, 2, None, 4], dtype)
    assert as_numpy(array, null=-1 if pa.types.is_signed_integer(dtype) else 9)[2] in (-1, 9)
    assert as_numpy(array[1:2]).tolist() == [2]
    assert as_numpy(array[1:2]).dtype == dtype.to_pandas_dtype()
    assert as_numpy(array[:0]).tolist() == as_numpy(pa.array([], dtype)).tolist() == []
    assert as_numpy(pa.nulls(2, dtype), null=7).tolist() == [7, 7]
