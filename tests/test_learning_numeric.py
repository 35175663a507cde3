"""Numeric columns: into the network, and out of the encoder."""

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from embedkit import EntityEmbeddingEncoder
from embedkit.learning.numeric import NumericInputs, moments

NAN = np.nan


def test_columns_are_standardised_and_missing_ones_imputed_and_flagged():
    block = np.array([[1.0, 5.0], [3.0, NAN], [NAN, 5.0], [99.0, 99.0]])
    inputs = NumericInputs.fit(block, ["a", "b"], np.array([1.0, 3.0, 1.0, 0.0]))
    assert inputs.means == (2.5, 5.0)  # (1 + 3 * 3) / 4
    np.testing.assert_allclose(inputs.scales, [0.75**0.5, 1.0])  # a constant column has scale 1
    assert (inputs.flagged, inputs.width) == ((True, True), 4)
    np.testing.assert_allclose(
        inputs.transform(block[:3]),
        [[-1.5 / 0.75**0.5, 0, 0, 0], [0.5 / 0.75**0.5, 0, 0, 1], [0, 0, 1, 0]],
        rtol=1e-6,
    )


def test_a_column_without_missing_values_has_no_flag_but_takes_them():
    inputs = NumericInputs.fit(np.array([[1.0], [3.0]]), ["a"], np.ones(2))
    assert (inputs.flagged, inputs.width) == ((False,), 1)
    assert inputs.transform(np.array([[NAN]])).tolist() == [[0.0]]


def test_a_column_that_is_all_missing_and_no_column_at_all():
    inputs = NumericInputs.fit(np.full((3, 1), NAN), ["a"], np.ones(3))
    assert inputs.transform(np.array([[NAN], [2.0]])).tolist() == [[0, 1], [2, 0]]
    assert NumericInputs.fit(np.empty((3, 0)), [], np.ones(3)).transform(np.empty((2, 0))).shape == (2, 0)


def test_constant_columns_come_out_as_zero_whatever_their_rounding_error():
    inputs = NumericInputs.fit(np.full((1000, 1), 0.1), ["a"], np.linspace(0.1, 1, 1000))
    assert abs(inputs.transform(np.array([[0.1]]))[0, 0]) < 1e-6


def test_columns_out():
    inputs = NumericInputs(("a", "b"), (2.0, 3.0), (0.5, 4.0), (False, True))
    scaled = inputs.columns_out("scale", np.array([2.0, 8.0, 0.25]))
    assert [column.feature_names_out for column in scaled] == [("a",), ("b", "b_missing")]
    (a,) = scaled[0].transform(np.array([2.5, NAN]))
    assert a.tolist() == [2.0, 0.0]  # one standard deviation is two units
    b, missing = scaled[1].transform(np.array([7.0, NAN]))
    assert (b.tolist(), missing.tolist()) == ([8.0, 0.0], [0.0, 0.25])
    (raw,) = inputs.columns_out("passthrough", np.ones(3))[0].transform(np.array([2.5, NAN]))
    np.testing.assert_array_equal(raw, np.float32([2.5, NAN]))
    assert inputs.columns_out("drop", np.ones(3)) == ()
    assert NumericInputs.from_json(inputs.to_json()) == inputs


@given(
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.integers(1, 4)), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_moments_know_neither_order_nor_repetition(rows, random):
    values, counts = (np.array(part) for part in zip(*rows, strict=True))
    repeated = np.repeat(values, counts)
    expected = repeated.mean(), repeated.std()
    np.testing.assert_allclose(moments(values, counts.astype(float)), expected, rtol=1e-9, atol=1e-6)
    shuffled = repeated.tolist()
    random.shuffle(shuffled)
    assert moments(np.array(shuffled), np.ones(len(shuffled))) == moments(values, counts.astype(float))


def test_out_of_the_encoder():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {"shop": rng.choice(["a", "b"], 60), "area": rng.normal(5, 2, 60), "age": rng.normal(size=60)}
    )
    X.loc[::7, "age"] = np.nan
    settings = {
        "hidden_layer_sizes": (4,),
        "max_epochs": 1,
        "max_lr": 0.01,
        "random_state": 0,
        "embedding_dim": 1,
    }

    def fitted(numeric):
        return EntityEmbeddingEncoder(numeric=numeric, **settings).fit(X, X["area"] * 2)

    assert fitted("drop").get_feature_names_out().tolist() == ["shop_0"]
    passed = fitted("passthrough").set_output(transform="pandas").transform(X)
    np.testing.assert_array_equal(passed[["area", "age"]], X[["area", "age"]].astype(np.float32))
    scaled = fitted("scale").set_output(transform="pandas").transform(X)
    assert list(scaled) == ["shop_0", "area", "age", "age_missing"]
    assert abs(scaled["area"].mean()) < 1e-6
    np.testing.assert_allclose(np.corrcoef(scaled["area"], X["area"])[0, 1], 1, rtol=1e-6)
    missing = X["age"].isna()
    assert (scaled["age"][missing] == 0).all()
    assert (scaled["age_missing"][~missing] == 0).all()
    assert (scaled["age_missing"][missing] > 0).all()
