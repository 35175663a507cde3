"""Lookup, neighbours and the Arrow layout of learned tables."""

import datetime as dt
import pickle
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedkit import tables
from embedkit.errors import InputError
from embedkit.tables import EmbeddingSet, EmbeddingTable, NumericColumn
from embedkit.vocabulary import Vocabulary


def make_table(feature: str, categories: list, dim: int, seed: int = 0) -> EmbeddingTable:
    vocabulary = Vocabulary.fit(pa.array([*categories, None]), feature)
    vectors = np.random.default_rng(seed).normal(size=(vocabulary.num_embeddings, dim))
    return EmbeddingTable(vocabulary, vectors)


@pytest.fixture
def stores() -> EmbeddingTable:
    vectors = [[0, 0], [9, 9], [3, 4], [3, 0], [0, 1]]
    return EmbeddingTable(Vocabulary.fit(pa.array([7, 8, 8, 9, None]), "Store"), vectors)


@pytest.fixture
def learned() -> EmbeddingSet:
    return EmbeddingSet(
        [
            make_table("city", ["Bonn", "Köln", "Ulm"], 3),
            make_table("size", [1, 2, 3], 2),
            make_table("flag", [True], 1),
        ],
        [NumericColumn("age", fill=40.0, center=30.0, scale=0.5, missing_scale=2.0), NumericColumn("income")],
        {"task": "regression"},
        features_in=["age", "city", "flag", "size", "income"],
    )


FRAME = {
    "city": ["Ulm", None, "Rom", "Bonn"],
    "size": [3, 1, None, 7],
    "age": [30.0, None, 32.0, 20.0],
    "income": [1.0, 2.0, None, -4.0],
    "flag": [True, False, None, True],
    "unused": [[1], [2], [3], [4]],
}


def naive_transform(learned: EmbeddingSet, frame: dict[str, list]) -> np.ndarray:
    """One cell after the other."""
    rows = []
    for i in range(len(frame["city"])):
        row = []
        for feature, table in learned.items():
            value, categories = frame[feature][i], table.categories.to_pylist()
            code = 0 if value is None else 2 + categories.index(value) if value in categories else 1
            row += table.vectors[code].tolist()
        age, income = frame["age"][i], frame["income"][i]
        row += [((40.0 if age is None else age) - 30.0) * 0.5, 2.0 if age is None else 0.0]
        row += [np.nan if income is None else income]
        rows.append(row)
    return np.array(rows, dtype=np.float32).reshape(-1, learned.width)


MAKERS: dict[str, Callable[[dict], object]] = {
    "arrow": pa.table,
    "pandas": pd.DataFrame,
    "pandas-object": lambda frame: pd.DataFrame(frame, dtype=object),
    "pandas-category": lambda frame: pd.DataFrame(frame).astype({"city": "category", "size": "category"}),
    "polars": lambda frame: pl.DataFrame(frame),
    "array": lambda frame: pd.DataFrame(frame)[["age", "city", "flag", "size", "income"]].to_numpy(),
    "list": lambda frame: pd.DataFrame(frame)[["age", "city", "flag", "size", "income"]].to_numpy().tolist(),
}


@pytest.mark.parametrize(
    ("make", "num_rows"),
    # A list without rows has no columns.
    [(make, n) for name, make in MAKERS.items() for n in (4, 1, 0) if (name, n) != ("list", 0)],
)
def test_every_input_gives_the_same_numbers(learned, make, num_rows):
    frame = {name: cells[:num_rows] for name, cells in FRAME.items()}
    out = learned.transform(make(frame))
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, naive_transform(learned, frame))
    columns = learned.transform_table(make(frame))
    assert columns.column_names == list(learned.feature_names_out)
    assert all(column.type == pa.float32() for column in columns.columns)
    np.testing.assert_array_equal(np.column_stack(columns.columns), out)


def test_blocks_and_threads_change_nothing(learned, monkeypatch):
    frame = pa.table({name: cells * 25 for name, cells in FRAME.items()})
    alone = learned.transform(frame)
    monkeypatch.setattr(tables, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(tables, "_THREADED_ROWS", 0)
    monkeypatch.setattr(pa, "cpu_count", lambda: 4)
    np.testing.assert_array_equal(learned.transform(frame), alone)
    np.testing.assert_array_equal(np.column_stack(learned.transform_table(frame).columns), alone)


def test_an_error_on_a_thread_is_the_users_error(learned, monkeypatch):
    monkeypatch.setattr(tables, "_THREADED_ROWS", 0)
    monkeypatch.setattr(pa, "cpu_count", lambda: 4)
    with pytest.raises(
        InputError, match="column 'size' was int64 when learned, is string now: cast it to int64"
    ):
        learned.transform(pa.table({**FRAME, "size": ["3", "1", None, "7"]}))


@given(st.lists(st.tuples(st.sampled_from(["x", "y", "z", "w", None]), st.integers(0, 4)), max_size=20))
def test_transform_of_any_rows(rows):
    learned = EmbeddingSet([make_table("a", ["x", "y", "z"], 2), make_table("b", [1, 2, 3], 11)])
    frame = pa.table(
        {"a": pa.array([a for a, _ in rows], pa.string()), "b": pa.array([b for _, b in rows], pa.int32())}
    )
    expected = [np.concatenate([learned["a"].vector(a), learned["b"].vector(b)]) for a, b in rows]
    np.testing.assert_array_equal(learned.transform(frame), np.reshape(expected, (len(rows), 13)))


def test_one_row_of_a_mixed_column_means_what_all_rows_mean():
    frame = pd.DataFrame({"c": [1, "a", 2.5, None]})
    table = EmbeddingTable(Vocabulary.fit(pa.array(["1", "2.5", "a", None]), "c"), np.arange(5)[:, None])
    learned = EmbeddingSet([table])
    assert learned.transform(frame)[:, 0].tolist() == [2, 4, 3, 0]
    for i in range(4):
        assert learned.transform(frame[i : i + 1])[:, 0].tolist() == learned.transform(frame)[i].tolist()
        assert (
            learned.transform(frame[i : i + 1].to_numpy())[:, 0].tolist()
            == learned.transform(frame)[i].tolist()
        )
        assert table.transform(frame["c"][i : i + 1])[:, 0].tolist() == learned.transform(frame)[i].tolist()


def test_constant_and_all_unique_columns():
    unique = [f"id{i}" for i in range(1000)]
    learned = EmbeddingSet([make_table("id", unique, 2), make_table("constant", ["c"], 2)])
    out = learned.transform(pd.DataFrame({"id": unique, "constant": "c"}))
    np.testing.assert_array_equal(out[:, :2], learned["id"].vectors[2:][np.argsort(np.argsort(unique))])
    assert (out[:, 2:] == learned["constant"].vectors[2]).all()


def test_missing_columns_are_all_named(learned):
    frame = pd.DataFrame(FRAME).drop(columns="age").rename(columns={"city": "City"})
    with pytest.raises(
        InputError, match=r"lacks column\(s\) \['age', 'city'\] \(did you mean 'City'\?\): expected"
    ):
        learned.transform(frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"age": ["a", "b", "c", "d"]}, "column 'age' must hold numbers, found string: cast it to float64"),
        ({"age": [0, 0, np.inf, 0]}, r"column 'age' holds 1 infinite value\(s\), the first in row 2"),
        ({"city": [1, 2, 3, 4]}, "column 'city' was string when learned, is int64 now: cast it to string"),
    ],
)
def test_changed_columns_are_refused(learned, change, message):
    with pytest.raises(InputError, match=message):
        learned.transform(pa.table(FRAME | change))


def test_an_array_needs_every_column(learned):
    with pytest.raises(InputError, match="X has 3 features, but 5 features are expected"):
        learned.transform(np.zeros((2, 3)))


def test_names(learned):
    assert learned.feature_names_out == (
        *("city_0", "city_1", "city_2", "size_0", "size_1", "flag_0"),
        *("age", "age_missing", "income"),
    )
    assert make_table("a", ["x"], 11).feature_names_out[:2] == ("a_00", "a_01")
    assert make_table("a", ["x"], 10).feature_names_out[-1] == "a_9"
    assert learned.features_in == ("age", "city", "flag", "size", "income")
    assert EmbeddingSet(learned.values(), learned.numerics).features_in == (
        "city",
        "size",
        "flag",
        "age",
        "income",
    )


def test_a_set_is_a_mapping(learned, stores):
    assert list(learned) == ["city", "size", "flag"]
    assert len(learned) == 3
    assert "age" not in learned
    assert learned["city"].feature == "city"
    assert repr(learned) == "EmbeddingSet(city: 5 x 3, size: 5 x 2, flag: 3 x 1, age, income)"
    assert repr(stores) == "EmbeddingTable('Store', categories=int64, num_embeddings=5, embedding_dim=2)"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([make_table("a", ["x"], 1)] * 2,), r"unique, found more than once: \['a'\]; rename"),
        (([make_table("a", ["x"], 2)], [NumericColumn("a")]), r"more than once: \['a'\]"),
        (([make_table("a", ["x"], 2)], [NumericColumn("a_0")]), r"more than once: \['a_0'\]"),
        (([], [NumericColumn("n", missing_scale=1), NumericColumn("n_missing")]), r"once: \['n_missing'\]"),
        (([], [], {"loss": float("nan")}), "metadata must be JSON without NaN"),
        (([], [], {"model": object()}), "metadata must be JSON without NaN: Object of type object"),
    ],
)
def test_a_set_checks_itself(parts, message):
    with pytest.raises(InputError, match=message):
        EmbeddingSet(*parts)


def test_features_in_must_name_every_column():
    with pytest.raises(InputError, match=r"features_in must name \['a'\], got \['b'\]"):
        EmbeddingSet([make_table("a", ["x"], 1)], features_in=["b"])


def test_subset_keeps_the_order_of_the_set(learned):
    part = learned.subset(["size", "income", "city"])
    assert part.feature_names_out == ("city_0", "city_1", "city_2", "size_0", "size_1", "income")
    assert part.features_in == ("city", "size", "income")
    np.testing.assert_array_equal(
        part.transform(pa.table(FRAME)), learned.transform(pa.table(FRAME))[:, [0, 1, 2, 3, 4, 8]]
    )
    with pytest.raises(InputError, match=r"the set has no feature \['sise'\] \(did you mean 'size'\?\)"):
        learned.subset(["sise"])


def test_equals(learned):
    same = pickle.loads(pickle.dumps(learned))
    assert learned.equals(same)
    assert not learned.equals(learned.subset(["city", "size"]))
    assert not learned.equals(
        EmbeddingSet(learned.values(), learned.numerics, {}, features_in=learned.features_in)
    )
    assert not learned.equals(EmbeddingSet(learned.values(), learned.numerics, learned.metadata))
    other = make_table("city", ["Bonn", "Köln", "Ulm"], 3, seed=1)
    assert not learned["city"].equals(other)
    assert not make_table("a", [1], 1).equals(make_table("a", [1.0], 1))


def test_a_pickle_is_whole():
    learned = EmbeddingSet([make_table("id", ["a", "b"], 2)], metadata={"classes": (1, 2)})
    again = pickle.loads(pickle.dumps(learned))
    assert again.equals(learned)
    assert not again["id"].vectors.flags.writeable
    assert again.metadata == {"classes": [1, 2]}


def test_vectors_belong_to_the_table():
    vectors = np.zeros((3, 2), dtype=np.float32)
    table = EmbeddingTable(Vocabulary.fit(pa.array(["a"]), "f"), vectors)
    vectors[:] = 1
    assert not table.vectors.any()
    assert table.vectors.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        table.vectors[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        table.counts[0] = 1


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, 2)), r"vectors of 'f' must have shape \(3, embedding_dim\), found \(2, 2\)"),
        (np.zeros((3, 0)), r"found \(3, 0\)"),
        (np.zeros(3), r"found \(3,\)"),
        ([[0.0], [np.nan], [0.0]], "vectors of 'f' must be finite"),
    ],
)
def test_a_table_checks_its_vectors(vectors, message):
    with pytest.raises(InputError, match=message):
        EmbeddingTable(Vocabulary.fit(pa.array(["a"]), "f"), vectors)


def test_vector_and_transform_of_one_column(stores):
    assert stores.vector(7).tolist() == [3, 4]
    assert stores.vector(None).tolist() == [0, 0]
    assert stores.vector(float("nan")).tolist() == [0, 0]
    assert stores.vector(1234).tolist() == [9, 9]
    assert stores.transform(pd.Series([9, 7])).tolist() == [[0, 1], [3, 4]]
    assert stores.encode([9, None, 1234]).tolist() == [4, 0, 1]
    with pytest.raises(InputError, match="column 'Store' was int64 when learned, is string now"):
        stores.vector("7")


@pytest.mark.parametrize(
    ("categories", "value", "found"),
    [
        (["(0, 1]", "2020-01"], pd.Period("2020-01"), 3),
        (["(0, 1]", "2020-01"], pd.Interval(0, 1), 2),
        (["1", "2"], 10**30, 1),
        ([1, 2], np.datetime64("NaT"), 0),
        ([1, 2], Decimal(2), 3),
        ([dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 1, 12)], dt.date(2020, 1, 1), 2),
        ([dt.time(1), dt.time(2)], dt.time(2), 3),
        ([1, 2], pd.Period("2020-01"), "column 'c' was int64 when learned, is string now"),
        ([1, 2], 10**30, "column 'c' was int64 when learned, is string now"),
        ([1, 2], 1j, "column 'c' was int64 when learned, is string now"),
        ([dt.time(1)], np.datetime64("2020-01-01"), "column 'c' was time"),
    ],
)
def test_a_value_of_any_type_is_that_of_a_column_of_it(categories, value, found):
    table = make_table("c", categories, 2)
    if isinstance(found, str):
        for look_up in (table.vector, table.neighbors):
            with pytest.raises(InputError, match=found):
                look_up(value)
    else:
        np.testing.assert_array_equal(table.vector(value), table.vectors[found])
        np.testing.assert_array_equal(table.vector(value), table.transform([value])[0])


def test_neighbors_by_hand(stores):
    found = stores.neighbors(7)
    assert found.columns.tolist() == ["category", "distance", "count"]
    # From (3, 4): store 8 at (3, 0), store 9 at (0, 1), missing at the origin; unknown was never trained.
    assert found["category"].tolist() == [8, 9, "(missing)"]
    np.testing.assert_allclose(found["distance"], [4, 18**0.5, 5])
    assert found["count"].tolist() == [2, 1, 1]
    assert stores.neighbors(7, k=1)["category"].tolist() == [8]
    assert stores.neighbors(None)["category"].tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    ("categories", "labels"),
    [
        (pa.array([1, 2 * 10**9], pa.time64("ns")), ["00:00:00.000000001", "00:00:02.000000000"]),
        (pa.array([0, 2 * 10**9], pa.time64("ns")), ["00:00:00", "00:00:02"]),
        (pa.array([0, 3_660_635], pa.int32()).cast(pa.date32()), ["1970-01-01", "11992-06-24"]),
        (pa.array([-(2 * 10**14)], pa.timestamp("ms")), ["-4368-04-02 04:26:40.000"]),
    ],
)
def test_times_that_python_cannot_hold_are_text(categories, labels):
    vocabulary = Vocabulary.fit(categories, "c")
    table = EmbeddingTable(vocabulary, np.zeros((vocabulary.num_embeddings, 1)))
    assert vocabulary.labels()[2:] == labels
    assert list(map(str, table.neighbors(None)["category"])) == labels
    assert len(vocabulary.to_numpy()) == len(labels)


def test_neighbors_of_no_category(stores):
    for k in (0, 1.5, "2", None):
        with pytest.raises(InputError, match="k must be a whole number of at least 1, got"):
            stores.neighbors(7, k)
    with pytest.raises(InputError, match="column 'Store' has no category 1234"):
        stores.neighbors(1234)
    with pytest.raises(InputError, match=r"column 'c' has no category 'Koln' \(did you mean 'Köln'\?\)"):
        make_table("c", ["Bonn", "Köln"], 1).neighbors("Koln")


def test_numeric_column_by_hand():
    values = np.array([1.0, np.nan, 1e300])
    (plain,) = NumericColumn("x", center=3.0, scale=2.0).transform(values)
    np.testing.assert_array_equal(plain, np.array([-4, np.nan, np.finfo(np.float32).max], dtype=np.float32))
    filled, missing = NumericColumn("x", fill=5.0, missing_scale=0.5).transform(values[:2])
    assert filled.tolist() == [1, 5]
    assert missing.tolist() == [0, 0.5]
    assert plain.dtype == missing.dtype == np.float32


@pytest.mark.parametrize("name", ["fill", "center", "scale", "missing_scale"])
def test_numeric_column_checks_itself(name):
    with pytest.raises(InputError, match=f"{name} of numeric column 'x' must be finite, got nan"):
        NumericColumn("x", **{name: float("nan")})


@pytest.mark.parametrize(
    "table", [make_table("a", ["x", "y"], 12), make_table("b", [], 1), make_table("Größe/m", [0.5, -1.5], 2)]
)
def test_arrow_layout_round_trip(table):
    arrow = table.to_arrow()
    assert arrow.column_names == ["kind", "category", "count", *table.feature_names_out]
    assert arrow["kind"].to_pylist()[:2] == ["missing", "unknown"]
    assert arrow["category"].to_pylist() == [None, None, *table.categories.to_pylist()]
    assert EmbeddingTable.from_arrow(arrow).equals(table)


def replace(arrow: pa.Table, name: str, cells: pa.Array) -> pa.Table:
    return arrow.set_column(arrow.column_names.index(name), name, cells)


# Text that is not UTF-8: only a full validation finds it.
INVALID = pa.array([b"", b"", b"x", b"\xff"]).view(pa.string())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda arrow: replace(arrow, "category", INVALID), "the Arrow data is not valid"),
        (lambda arrow: arrow.drop_columns("count"), "expected columns kind, category, count, found"),
        (lambda arrow: arrow[1:], "rows of 'a' must be of kind missing, unknown, then category"),
        (lambda arrow: arrow[:1], "must be of kind"),
        (
            lambda arrow: replace(arrow, "kind", pa.array(["missing", "unknown", "category", "?"])),
            "must be of kind",
        ),
        (
            lambda arrow: replace(arrow, "category", pa.array(["v", None, "x", "y"])),
            "the first two categories must be null",
        ),
        (
            lambda arrow: replace(arrow, "category", pa.array([None, None, "y", "x"])),
            "must be sorted, unique and not null",
        ),
        (
            lambda arrow: replace(arrow, "category", pa.array([None, None, None, "x"])),
            "must be sorted, unique and not null",
        ),
        (lambda arrow: replace(arrow, "count", pa.array([1, 1, None, 1])), "no count may be"),
        (lambda arrow: replace(arrow, "count", pa.array(["1"] * 4)), "must be int64 or float64"),
        (lambda arrow: replace(arrow, "count", pa.array([1, 1, -1, 1])), "must be finite and not negative"),
        (
            lambda arrow: replace(arrow, "a_1", pa.array([0.0] * 4)),
            "vectors of 'a' must be float32 columns without nulls",
        ),
        (lambda arrow: replace(arrow, "a_1", pa.nulls(4, pa.float32())), "float32 columns without nulls"),
        (
            lambda arrow: replace(arrow, "a_1", pa.array([np.inf] * 4, pa.float32())),
            "vectors of 'a' must be finite",
        ),
        (lambda arrow: arrow.drop_columns(["a_0", "a_1"]), "vectors of 'a' must be float32 columns"),
        (lambda arrow: arrow.drop_columns(["a_0"]), r"must be in columns \('a_0',\)"),
        (lambda arrow: arrow.replace_schema_metadata(None), "must be in columns"),
    ],
)
def test_an_arrow_table_is_not_trusted(spoil, message):
    with pytest.raises(InputError, match=message):
        EmbeddingTable.from_arrow(spoil(make_table("a", ["x", "y"], 2).to_arrow()))
