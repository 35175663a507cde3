"""What targets become: kinds of heads, numbers for the network, labels back."""

from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedkit import InputError
from embedkit.learning.targets import Head, as_targets, encode_targets, make_heads


def heads_of(y, target_type="auto", sample_weight=None):
    values, names, _ = as_targets(y)
    return make_heads(values, names, target_type, sample_weight)


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        ([0.5, 1.5, 2.0], "continuous"),
        ([0.5, 1.5], "continuous"),
        (np.arange(20), "multiclass"),
        (np.arange(21), "continuous"),
        (np.arange(21.0), "continuous"),
        ([1.0, 2.0, 3.0], "multiclass"),
        ([0, 1], "binary"),
        ([True, False], "binary"),
        ([f"label {i}" for i in range(30)], "multiclass"),
    ],
)
def test_auto_tells_numbers_from_classes(y, kind):
    assert heads_of(y)[0].kind == kind


@pytest.mark.parametrize(
    "y",
    [
        ["b", "a", "b"],
        np.array(["b", "a", "b"]),
        np.array(["b", "a", "b"], dtype=object),
        pd.Series(["b", "a", "b"], name="y"),
        pd.Series(["b", "a", "b"], dtype="category", name="y"),
        pl.Series("y", ["b", "a", "b"]),
        pl.Series("y", ["b", "a", "b"], dtype=pl.Categorical),
        pa.chunked_array([["b"], ["a", "b"]]),
        pa.array(["b", "a", "b"]),
    ],
    ids=lambda y: type(y).__name__,
)
def test_labels_from_any_container(y):
    values, names, single = as_targets(y)
    (head,) = make_heads(values, names, "auto")
    assert (names, single, head.classes.tolist()) == (["y"], True, ["a", "b"])
    assert head.encode(values[:, 0]).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (pd.Series([3, 1, 2], dtype="Int64"), [1, 2, 3]),
        (pd.Series([True, False], dtype="boolean"), [False, True]),
        (np.array([2, 1], dtype=object), [1, 2]),
        (np.array([True, False], dtype=object), [False, True]),
        (np.array([Decimal("2.0"), Decimal("1.0")]), [1.0, 2.0]),
        (pa.array([True, False]), [False, True]),
    ],
)
def test_nullable_and_object_columns_keep_their_kind(y, classes):
    found = heads_of(y)[0].classes
    assert (found.tolist(), found.dtype.kind) == (classes, np.array(classes).dtype.kind)


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, pa.table])
def test_targets_of_different_kinds_side_by_side(frame):
    y = frame({"price": [0.5, 1.5, 2.5], "size": [1, 2, 3], "label": ["x", "y", "x"]})
    values, names, single = as_targets(y)
    heads = make_heads(values, names, "auto")
    assert (names, single) == (["price", "size", "label"], False)
    assert [head.kind for head in heads] == ["continuous", "multiclass", "binary"]
    assert heads[1].classes.tolist() == [1, 2, 3]
    np.testing.assert_allclose(heads[0].encode(values[:, 0]), [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-6)
    assert heads[2].encode(values[:, 2]).tolist() == [0, 1, 0]


def test_the_network_sees_standardised_numbers():
    (head,) = heads_of([1.0, 1.0, 4.0], "continuous", np.array([1.0, 1.0, 2.0]))
    assert (head.center, head.scale) == (2.5, 1.5)
    assert head.encode(np.array([1.0, 4.0])).tolist() == [-1, 1]
    assert head.decode(np.array([[-1.0], [1.0]])).tolist() == [1, 4]


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 3)), min_size=2, max_size=20).filter(
        # Numbers closer to one another are refused: see below.
        lambda rows: np.ptp([y for y, count in rows if count] or [0.0]) > 1e-150
    ),
    st.randoms(use_true_random=False),
)
def test_weights_are_repeated_rows_in_any_order_to_the_last_bit(rows, random):
    y, counts = (np.array(part) for part in zip(*rows, strict=True))
    (weighted,) = heads_of(y + 0.0, "continuous", counts.astype(float))
    repeated = np.repeat(y, counts).tolist()
    random.shuffle(repeated)
    assert heads_of(np.array(repeated) + 0.0, "continuous")[0] == weighted


def test_rows_of_weight_zero_do_not_exist():
    (head,) = heads_of(np.array(["a", "b", "c", "b"]), sample_weight=np.array([1.0, 1, 0, 2]))
    assert (head.kind, head.classes.tolist()) == ("binary", ["a", "b"])
    assert heads_of([1.0, 3.0, np.nan], "continuous", np.array([1.0, 1, 0]))[0].center == 2


def test_outputs_become_labels_and_probabilities():
    several = Head("y", "multiclass", np.array(["a", "b", "c"]))
    outputs = np.log([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    np.testing.assert_allclose(several.probabilities(outputs + 7), [[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    assert several.decode(outputs).tolist() == ["b", "a"]
    two = Head("y", "binary", np.array(["no", "yes"]))
    odds = np.log([[0.25 / 0.75], [3.0]])
    np.testing.assert_allclose(two.probabilities(odds), [[0.75, 0.25], [0.25, 0.75]])
    assert two.decode(odds).tolist() == ["no", "yes"]
    assert np.isfinite(two.probabilities(np.array([[1e4], [-1e4]]))).all()


@pytest.mark.parametrize("classes", [["a", "b"], [1, 2], [1.0, 2.0], [False, True]])
def test_a_head_survives_json(classes):
    import json

    head = Head("y", "binary", np.array(classes), 0.1, 1 / 3)
    again = Head.from_json(json.loads(json.dumps(head.to_json())))
    assert again.classes.dtype == head.classes.dtype
    np.testing.assert_array_equal(again.classes, head.classes)
    assert (again.center, again.scale) == (head.center, head.scale)


@pytest.mark.parametrize(
    ("y", "target_type", "message"),
    [
        ([1.0, np.nan, 2.0], "auto", "'y' is missing in 1 row.*row 1"),
        ([1.0, np.inf, 2.0], "auto", "NaN or infinity in 1 row"),
        (["a", None, "b"], "auto", "missing in 1 row.*row 1"),
        ([2, 2, 2], "auto", "one class or value only"),
        (["a", 1, "b"], "auto", "mixes types"),
        (["a", "b"], "continuous", "must hold numbers"),
        ([0, 1, 2], "binary", "must hold 2 classes, found 3"),
        ([0.5, 1.0, 2.0], "multiclass", "numbers with a fraction"),
        ([0, 1], "ordinal", "target_type must be one of"),
        (pd.date_range("2020-01-01", periods=3), "auto", "found datetime64"),
        (np.ones((3, 2, 2)), "auto", "found 3"),
        (5, "auto", "found 0"),
    ],
)
def test_bad_targets_are_named(y, target_type, message):
    y = np.array(y, dtype=object) if isinstance(y, list) and "a" in y else y
    with pytest.raises(InputError, match=message) as error:
        heads_of(y, target_type)
    assert "\n" not in str(error.value)


def test_whole_numbers_stay_whole():
    long = np.array([np.int64(2**60 + i % 3) for i in range(9)], dtype=object)
    assert as_targets(long)[0].dtype == np.int64
    assert make_heads(*as_targets(long)[:2], "auto")[0].classes.tolist() == [2**60, 2**60 + 1, 2**60 + 2]
    both = pd.DataFrame({"id": long.astype(np.int64), "share": np.arange(9) / 4})
    for frame in (both, pl.from_pandas(both)):
        first, second = make_heads(*as_targets(frame)[:2], "auto")
        assert first.classes.tolist() == [2**60, 2**60 + 1, 2**60 + 2]
        assert second.kind == "continuous"
    with pytest.raises(InputError, match="target holds whole numbers of more than 64 bits: cast it to text"):
        as_targets([2**70, 2**71])
    texts = np.array(["a", "b"], dtype=np.dtypes.StringDType())
    assert make_heads(*as_targets(texts)[:2], "auto")[0].classes.tolist() == ["a", "b"]


def test_targets_have_names_of_their_own():
    with pytest.raises(
        InputError, match=r"targets must have names of their own, found more than once: \['y'\]"
    ):
        make_heads(np.arange(6).reshape(3, 2), ["y", "y"], "auto")


def test_text_for_a_number_is_one_line():
    (head,) = make_heads(np.array([[0.5], [1.5]]), ["y"], "auto")
    for use in (head.encode, lambda y: head.losses(np.zeros((1, 1)), y)):
        with pytest.raises(InputError, match="target 'y' must hold numbers, found <U1: cast it"):
            use(np.array(["a"]))


@pytest.mark.parametrize("y", [[1.5, 2.5, 3.5, np.nan], ["a", "b", "c", None], [1.5, 2.5, 3.5, np.inf]])
def test_errors_count_the_rows_of_weight_0(y):
    weights = np.array([1.0, 0.0, 1.0, 1.0])
    y = np.array(y, dtype=float if isinstance(y[0], float) else object)[:, None]
    with pytest.raises(InputError, match=r"in 1 row\(s\), the first is row 3: "):
        make_heads(y, ["y"], "auto", weights)
    head = Head("y", "binary", np.array(["a", "b"]))
    with pytest.raises(InputError, match="has the class 'c' in row 2, which was not learned"):
        encode_targets([head], np.array([["a"], ["d"], ["c"], ["b"]]), weights > 0)
