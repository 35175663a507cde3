"""Category values to codes: checked against a reference that is written for reading."""

import datetime
import pickle
import random
from collections import Counter
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import OneHotEncoder

from embedkit.errors import InputError
from embedkit.vocabulary import FIRST, MISSING, UNKNOWN, Vocabulary

TYPES = {
    "string": (pa.string(), st.text(max_size=3)),
    "large_string": (pa.large_string(), st.text(max_size=3)),
    "string_view": (pa.string_view(), st.text(max_size=3)),
    "int8": (pa.int8(), st.integers(-3, 3)),
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "double": (pa.float64(), st.floats(allow_nan=False, allow_infinity=False)),
    "float": (pa.float32(), st.floats(allow_nan=False, allow_infinity=False, width=32)),
    "bool": (pa.bool_(), st.booleans()),
    "decimal": (pa.decimal128(6, 2), st.decimals(-99, 99, places=2)),
    "date": (pa.date32(), st.dates()),
    "date64": (pa.date64(), st.dates(datetime.date(1900, 1, 1), datetime.date(2100, 1, 1))),
    "timestamp": (pa.timestamp("us"), st.datetimes()),
    "timestamp[s]": (pa.timestamp("s"), st.datetimes().map(lambda time: time.replace(microsecond=0))),
    "zoned": (pa.timestamp("us", "UTC"), st.datetimes(timezones=st.just(ZoneInfo("UTC")))),
    "time": (pa.time64("us"), st.times()),
    "duration": (pa.duration("us"), st.timedeltas(datetime.timedelta(-9), datetime.timedelta(9))),
}


@st.composite
def columns(draw: st.DrawFn) -> tuple[list, pa.Array]:
    """Cells of one type as a list, and as an Arrow array that may be a dictionary or in chunks."""
    dtype, values = TYPES[draw(st.sampled_from(sorted(TYPES)))]
    pool = draw(st.lists(values, min_size=1, max_size=8))
    cells = draw(st.lists(st.one_of(st.none(), st.sampled_from(pool)), max_size=30))
    column = pa.array(cells, dtype)
    if draw(st.booleans()):
        column = column.dictionary_encode()
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(cells)))
        column = pa.chunked_array([column[:cut], column[cut:]])
    return cells, column


def naive_vocabulary(
    cells: list, min_frequency: float | None, max_categories: int | None, weights: list[int]
) -> tuple[list, list]:
    """Categories and counts, one rule a line."""
    frequency = Counter()
    for cell, weight in zip(cells, weights, strict=True):
        frequency[cell] += weight
    missing, total = frequency.pop(None, 0), sum(weights)
    kept = [cell for cell in frequency if frequency[cell] > 0]
    if isinstance(min_frequency, int):
        kept = [cell for cell in kept if frequency[cell] >= min_frequency]
    elif min_frequency is not None:
        kept = [cell for cell in kept if frequency[cell] >= min_frequency * total]
    if max_categories is not None:
        kept = sorted(kept, key=lambda cell: (-frequency[cell], cell))[:max_categories]
    kept = sorted(kept)
    rare = sum(frequency.values()) - sum(frequency[cell] for cell in kept)
    return kept, [missing, rare, *(frequency[cell] for cell in kept)]


@given(
    columns(),
    st.one_of(st.none(), st.integers(1, 4), st.sampled_from([0.1, 0.25, 0.5])),
    st.one_of(st.none(), st.integers(1, 4)),
    st.data(),
)
def test_fit_and_encode_follow_the_reference(column, min_frequency, max_categories, data):
    cells, array = column
    weights = None
    if data.draw(st.booleans()):
        weights = data.draw(st.lists(st.integers(0, 3), min_size=len(cells), max_size=len(cells)))
    vocabulary = Vocabulary.fit(
        array, "c", min_frequency=min_frequency, max_categories=max_categories, sample_weight=weights
    )
    categories, counts = naive_vocabulary(cells, min_frequency, max_categories, weights or [1] * len(cells))
    assert vocabulary.categories.to_pylist() == categories
    assert vocabulary.counts.tolist() == counts
    assert vocabulary.counts.dtype == (np.int64 if weights is None else np.float64)

    code_of = {category: FIRST + i for i, category in enumerate(categories)} | {None: MISSING}
    codes = vocabulary.encode(array)
    assert codes.dtype == np.int32
    assert codes.tolist() == [code_of.get(cell, UNKNOWN) for cell in cells]
    assert vocabulary.decode(codes).to_pylist() == [cell if cell in categories else None for cell in cells]
    assert len(vocabulary.labels()) == vocabulary.num_embeddings == vocabulary.cardinality + 2


@given(columns(), st.randoms(use_true_random=False), st.data())
def test_order_of_rows_changes_nothing(column, shuffler: random.Random, data):
    cells, array = column
    if array.type == pa.string_view():
        array = array.cast(pa.string())  # Arrow cannot take from views
    weights = np.array(data.draw(st.lists(st.floats(0, 9), min_size=len(cells), max_size=len(cells))))
    order = list(range(len(cells)))
    shuffler.shuffle(order)
    straight = Vocabulary.fit(array, "c", min_frequency=0.2, sample_weight=weights)
    shuffled = Vocabulary.fit(
        array.take(pa.array(order, pa.int64())), "c", min_frequency=0.2, sample_weight=weights[order]
    )
    assert straight.categories.equals(shuffled.categories)
    assert straight.counts.tobytes() == shuffled.counts.tobytes()


@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40),
    st.one_of(st.integers(1, 5), st.floats(0.01, 0.9)),
)
def test_rare_is_what_scikit_learn_calls_infrequent(cells, min_frequency):
    encoder = OneHotEncoder(min_frequency=min_frequency).fit(np.array(cells, dtype=object)[:, None])
    infrequent = encoder.infrequent_categories_[0]
    expected = sorted(set(cells) - set([] if infrequent is None else infrequent))
    assert (
        Vocabulary.fit(pa.array(cells), "c", min_frequency=min_frequency).categories.to_pylist() == expected
    )


def test_a_worked_example():
    cells = ["b", "a", None, "b", "c", "d", "d"]
    vocabulary = Vocabulary.fit(pa.array(cells), "c", max_categories=2)
    assert vocabulary.categories.to_pylist() == ["b", "d"]
    assert vocabulary.counts.tolist() == [1, 2, 2, 2]
    assert vocabulary.encode(pa.array(cells)).tolist() == [2, 1, 0, 2, 1, 3, 3]
    assert vocabulary.labels() == ["(missing)", "(unknown)", "b", "d"]
    # Of a, b, c, d each seen once, the first in sorted order stay.
    tied = Vocabulary.fit(pa.array(["d", "c", "b", "a"]), "c", max_categories=2)
    assert tied.categories.to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([-0.0, 0.0, float("nan"), None], [2, 2, 0, 0]),
        ([0.0, 7.0], [2, 1]),
    ],
)
def test_zero_has_no_sign_and_nan_is_missing(cells, expected):
    vocabulary = Vocabulary.fit(pa.array([0.0, -0.0, float("nan")]), "c")
    assert vocabulary.categories.to_pylist() == [0.0]
    assert vocabulary.counts.tolist() == [1, 0, 2]
    assert vocabulary.encode(pa.array(cells)).tolist() == expected
    assert vocabulary.encode(pa.array(cells).dictionary_encode()).tolist() == expected


def test_a_dictionary_may_repeat_values_hold_nulls_and_unused_ones():
    values = pa.array(["b", None, "a", "b", "unused"])
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3, None], pa.int8()), values)
    vocabulary = Vocabulary.fit(column, "c")
    assert vocabulary.categories.to_pylist() == ["a", "b"]
    assert vocabulary.counts.tolist() == [2, 0, 1, 2]
    assert vocabulary.encode(column).tolist() == [3, 0, 2, 3, 0]
    assert vocabulary.encode(column[:2]).tolist() == [3, 0]


def test_chunks_may_have_dictionaries_of_their_own():
    chunks = [pa.array(cells).dictionary_encode() for cells in (["a", None], ["c", "b", "c"], [])]
    chunks[2] = chunks[0][:0]
    column = pa.chunked_array(chunks)
    vocabulary = Vocabulary.fit(column, "c")
    assert vocabulary.counts.tolist() == [1, 0, 1, 1, 2]
    assert vocabulary.encode(column).tolist() == [2, 0, 4, 3, 4]


@pytest.mark.parametrize("dtype", [pa.string(), pa.int64(), pa.null(), pa.dictionary(pa.int8(), pa.string())])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_columns_without_values(dtype, num_rows):
    column = pa.nulls(num_rows, dtype)
    vocabulary = Vocabulary.fit(column, "c")
    assert (vocabulary.cardinality, vocabulary.counts.tolist()) == (0, [num_rows, 0])
    assert vocabulary.encode(column).tolist() == [MISSING] * num_rows
    # A column that was empty in fit has learned no type: any value is unknown.
    assert vocabulary.encode(pa.array([5, None])).tolist() == [UNKNOWN, MISSING]
    assert vocabulary.encode(pa.array([[5]][:0], pa.string())).tolist() == []
    full = Vocabulary.fit(pa.array([1, 2]), "c")
    assert full.encode(column).tolist() == [MISSING] * num_rows
    assert full.encode(pa.chunked_array([], dtype)).tolist() == []


@pytest.mark.parametrize(
    ("learned", "now", "expected"),
    [
        (pa.array([1, 2]), pa.array([2.0, float("nan"), 9.0]), [3, 0, 1]),
        (pa.array([1, 2]), pa.array([2], pa.uint8()), [3]),
        (pa.array([1, 2]), pa.array([Decimal("2.00")]), [3]),
        (pa.array([1.0, 2.5]), pa.array([1, 2]), [2, 1]),
        (pa.array(["a"]), pa.array(["a"], pa.large_string()).dictionary_encode(), [2]),
        (pa.array([datetime.date(2024, 1, 1)]), pa.array([datetime.datetime(2024, 1, 1)]), [2]),
        (pa.array([datetime.datetime(2024, 1, 1)]), pa.array([datetime.date(2024, 1, 1)]), [2]),
        (
            pa.array([datetime.datetime(2024, 1, 1)], pa.timestamp("ns", "UTC")),
            pa.array([datetime.datetime(2024, 1, 1)], pa.timestamp("s", "Europe/Paris")),
            [2],
        ),
    ],
)
def test_the_same_value_in_another_type(learned, now, expected):
    assert Vocabulary.fit(learned, "c").encode(now).tolist() == expected


@pytest.mark.parametrize(
    ("learned", "now", "message"),
    [
        ([262], ["262"], "column 'Store' was int64 when learned, is string now: cast it to int64"),
        (["262"], [262], "column 'Store' was string when learned, is int64 now: cast it to string"),
        ([1], [True], "was int64 when learned, is bool now: cast it to int64"),
        ([True], [1], "was bool when learned, is int64 now: cast it to bool"),
        ([1], [2.5], r"is double now \(Float value 2.5.* was truncated.*\): cast it to int64"),
        (
            [0.5],
            [2**53 + 1],
            r"was double when learned, is int64 now \(Integer value 9007199254740993 not in range.*",
        ),
        (
            [datetime.date(2024, 1, 1)],
            [datetime.datetime(2024, 1, 1, 5)],
            r"was date32\[day\] when learned, is timestamp\[us\] now \(.*lost.*\): cast it to date32\[day\]",
        ),
        (
            [datetime.datetime(2024, 1, 1)],
            [datetime.datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC"))],
            r"was timestamp\[us\] when learned, is timestamp\[us, tz=UTC\] now: cast it",
        ),
        ([datetime.date(2024, 1, 1)], [datetime.time(5)], r"is time64\[us\] now"),
        ([1], [float("inf")], "column 'Store' holds infinite values"),
        ([1], [[1]], "column 'Store' holds list<.*>: a category argument must be a string or a number"),
    ],
)
def test_a_change_of_type_is_one_clear_line(learned, now, message):
    with pytest.raises(InputError, match=message) as caught:
        Vocabulary.fit(pa.array(learned), "Store").encode(pa.array(now))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "settings", "message"),
    [
        (
            [1.0, float("-inf")],
            {},
            "column 'c' holds infinite values: replace them by NaN or a finite number",
        ),
        ([[1]], {}, "argument must be a string or a number"),
        (
            [1],
            {"min_frequency": 0},
            "min_frequency must be an int >= 1 or a fraction in .* got min_frequency=0",
        ),
        ([1], {"min_frequency": 1.5}, "got min_frequency=1.5"),
        ([1], {"min_frequency": True}, "got min_frequency=True"),
        ([1], {"max_categories": 0}, "max_categories must be an int >= 1, got max_categories=0"),
        ([1], {"max_categories": 0.5}, "got max_categories=0.5"),
        ([1], {"sample_weight": [1, 2]}, r"sample_weight must have shape \(1,\), found \(2,\)"),
        ([1], {"sample_weight": [-1]}, "sample_weight must be finite and not negative"),
        ([1], {"sample_weight": [np.nan]}, "sample_weight must be finite"),
    ],
)
def test_fit_refuses(column, settings, message):
    with pytest.raises(InputError, match=message):
        Vocabulary.fit(pa.array(column), "c", **settings)


def test_whole_numbers_as_floats_must_be_exact():
    vocabulary = Vocabulary.fit(pa.array([2**53 + 1, 2**53 + 2, 7]), "id")
    assert vocabulary.encode(pa.array([7.0, None, 8.0])).tolist() == [2, 0, 1]
    with pytest.raises(InputError, match=r"now is double with values such as 9007199254740992, .*Int64"):
        vocabulary.encode(pa.array([7.0, 2.0**53, None]))
    narrow = Vocabulary.fit(pa.array([2**24 + 1, 2**24 + 2]), "id")
    assert narrow.encode(pa.array([2.0**24 + 1])).tolist() == [2]
    with pytest.raises(InputError, match="and now is float with values such as 16777216"):
        narrow.encode(pa.array(np.array([2**24 + 1], dtype=np.float32)))
    small = Vocabulary.fit(pa.array([1, 2]), "id")
    assert small.encode(pa.array([2.0**60, 2.0])).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("learned", "now", "codes"),
    [
        (["1.50", "2.50"], ["10.00", "2.50", "2.5", None, "0.001"], [1, 3, 3, 0, 1]),
        (["1000"], ["0.5", "1000", "1000.0"], [1, 2, 2]),
    ],
)
def test_decimals_of_another_precision(learned, now, codes):
    vocabulary = Vocabulary.fit(pa.array([Decimal(cell) for cell in learned]), "price")
    cells = [None if cell is None else Decimal(cell) for cell in now]
    assert vocabulary.encode(pa.array(cells)).tolist() == codes


def test_integers_too_large_for_what_was_learned_are_unknown():
    vocabulary = Vocabulary.fit(pa.array([1, 2]), "id")
    assert vocabulary.encode(pa.array([2**64 - 1, 2, None], pa.uint64())).tolist() == [1, 3, 0]
    prices = Vocabulary.fit(pa.array([Decimal("1.00"), Decimal("2.50")]), "price")
    assert prices.encode(pa.array([1, 2])).tolist() == [2, 1]


def test_integers_beyond_64_bits_are_refused():
    with pytest.raises(InputError, match=r"column 'c' does not fit .*: cast it to string"):
        Vocabulary.fit(pa.array([2**64 - 1], pa.uint64()), "c")


@pytest.mark.parametrize(
    ("categories", "counts", "message"),
    [
        (pa.array(["b", "a"]), [0, 0, 1, 1], "must be sorted, unique and not null"),
        (pa.array(["a", "a"]), [0, 0, 1, 1], "must be sorted, unique and not null"),
        (pa.array(["a", None]), [0, 0, 1, 1], "must be sorted, unique and not null"),
        (pa.array([1], pa.int8()), [0, 0, 1], "cannot have categories of type int8"),
        (pa.array([[1]]), [0, 0, 1], "cannot have categories of type list"),
        (pa.array(["a"]), [0, 0], r"must be int64 or float64 of shape \(3,\), found int64 of shape \(2,\)"),
        (pa.array(["a"]), [False, False, True], "found bool"),
        (pa.array(["a"]), [0, -1, 1], "finite and not negative"),
        (pa.array(["a"]), [0, np.nan, 1], "finite and not negative"),
    ],
)
def test_a_vocabulary_checks_itself(categories, counts, message):
    with pytest.raises(InputError, match=message):
        Vocabulary("c", categories, np.array(counts))


def test_decode_refuses_codes_out_of_range():
    vocabulary = Vocabulary.fit(pa.array(["a"]), "c")
    for codes in ([-1], [3]):
        with pytest.raises(InputError, match=r"codes of column 'c' must be in \[0, 3\)"):
            vocabulary.decode(np.array(codes))


LARGE = {
    "string": pa.array([f"{i:05}" for i in range(5000)]),
    "int64": pa.array(range(0, 10000, 2)),
    "double": pa.array(np.arange(5000) / 4),
    "decimal": pa.array([Decimal(i) / 4 for i in range(5000)], pa.decimal128(8, 2)),
    "date": pa.array(range(5000), pa.int32()).cast(pa.date32()),
    "timestamp": pa.array(range(5000), pa.int64()).cast(pa.timestamp("us")),
    "time": pa.array(range(5000), pa.int32()).cast(pa.time32("ms")),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("arrow_searches", [True, False])
def test_a_search_finds_the_same_as_a_hash(name, arrow_searches, monkeypatch):
    if not arrow_searches:
        monkeypatch.delattr(pc, "search_sorted", raising=False)
    column = LARGE[name]
    vocabulary = Vocabulary.fit(column[1:-1], "c")
    few = column.take(pa.array([0, 1, 4998, 17, None, 17, 4999]))
    assert vocabulary.encode(few).tolist() == [UNKNOWN, 2, 4999, 18, MISSING, 18, UNKNOWN]
    assert vocabulary.encode(column).tolist() == [UNKNOWN, *range(2, 5000), UNKNOWN]


@pytest.mark.parametrize("dtype", [pa.string(), pa.large_string(), pa.string_view()])
def test_few_rows_of_a_large_dictionary(dtype):
    vocabulary = Vocabulary.fit(LARGE["string"][10:], "c")
    column = LARGE["string"].cast(dtype).dictionary_encode()
    few = pa.concat_arrays([column[5:12], pa.nulls(1, column.type)])
    assert vocabulary.encode(few).tolist() == [1, 1, 1, 1, 1, 2, 3, 0]


def test_a_pickle_holds_the_vocabulary_alone():
    vocabulary = Vocabulary.fit(LARGE["string"], "c")
    before = pickle.dumps(vocabulary)
    vocabulary.encode(LARGE["string"][:3])
    assert pickle.dumps(vocabulary) == before
    again = pickle.loads(before)
    assert again.encode(LARGE["string"][:3]).tolist() == [2, 3, 4]
    assert again.categories.equals(vocabulary.categories)
    assert not again.counts.flags.writeable


def test_floats_are_looked_up_among_decimals_without_rounding():
    column = pa.array([Decimal("0.1"), Decimal("0.2"), None])
    vocabulary = Vocabulary.fit(column, "price")
    assert vocabulary.encode(pa.array([0.1, 0.104, 0.2, 0.249, None])).tolist() == [2, 1, 3, 1, 0]
    close = Vocabulary.fit(pa.array([Decimal("0.10000000000000000001"), Decimal("0.1")]), "price")
    with pytest.raises(
        InputError, match=r"'price' was decimal.* floats do not tell apart.*read it as decimals"
    ):
        close.encode(pa.array([0.1]))
