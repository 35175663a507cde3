"""Rows as tensors: order, weights and repetition."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedkit import EntityEmbeddingEncoder, InputError
from embedkit.learning import data
from embedkit.learning.data import Rows, hold_out, make_rows


def block(rows):
    """Codes, numbers, targets and weights of rows (code, number, target, weight)."""
    table = np.array(rows, dtype=np.float64)
    return table[:, :1].astype(np.int32), table[:, 1:2].astype("f4"), table[:, 2:3].astype("f4"), table[:, 3]


def tuples(rows: Rows):
    parts = (rows.codes[:, 0], rows.numeric[:, 0], rows.targets[:, 0], rows.weights)
    return list(zip(*(part.tolist() for part in parts), strict=True))


cells = st.tuples(st.integers(0, 3), st.integers(-2, 2), st.integers(0, 1), st.integers(0, 3))


@given(
    st.lists(cells, min_size=1, max_size=20).filter(lambda rows: any(row[3] for row in rows)),
    st.permutations(range(20)),
)
def test_whole_weights_are_repeated_rows_in_any_order(rows, order):
    expected = sorted(
        [(*map(float, row[:3]), 1.0) for row in rows for _ in range(row[3])], key=lambda row: row[2::-1]
    )
    assert tuples(make_rows(*block(rows)).repeated()) == expected
    shuffled = [rows[i] for i in order if i < len(rows)]
    assert tuples(make_rows(*block(shuffled)).repeated()) == expected


def test_weights_with_a_fraction_stay_weights():
    rows = [(1, 0, 0, 0.5), (0, 0, 0, 2.0), (1, 0, 0, 0.25), (3, 0, 0, 0.0)]
    assert tuples(make_rows(*block(rows)).repeated()) == [(0, 0, 0, 2.0), (1, 0, 0, 0.25), (1, 0, 0, 0.5)]


def test_large_data_keep_their_rows(monkeypatch):
    monkeypatch.setattr(data, "MAX_SORTED_ROWS", 2)
    rows = [(2, 0, 0, 1.0), (1, 0, 0, 0.0), (0, 0, 0, 2.0), (1, 0, 0, 1.0)]
    assert tuples(make_rows(*block(rows)).repeated()) == [(2, 0, 0, 1), (0, 0, 0, 2), (1, 0, 0, 1)]


def test_hold_out_splits():
    rows = make_rows(*block([(i, 0, 0, 1) for i in range(10)]))
    learned, watched = hold_out(rows, 0.25, torch.Generator().manual_seed(0))
    assert (len(learned), len(watched)) == (8, 2)
    assert sorted([*learned.codes[:, 0].tolist(), *watched.codes[:, 0].tolist()]) == list(range(10))
    few = rows.take(slice(0, 3))
    assert [len(part) for part in hold_out(few, 0.99, torch.Generator())] == [2, 1]
    with pytest.raises(InputError, match="at least 3 rows, found 2"):
        hold_out(rows.take(slice(0, 2)), 0.5, torch.Generator())


def test_batches_are_all_rows_in_order():
    rows = make_rows(*block([(i, 0, 0, 1) for i in range(5)]))
    assert [batch.codes[:, 0].tolist() for batch in rows.batches(2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("early_stopping", [False, True])
def test_vectors_are_the_same_bit_for_bit(early_stopping):
    """Weights or repeated rows, in any order: vectors, numeric columns and history are the same.

    Early stopping holds rows out as they are given, so there it is the order alone that plays no part.
    """
    rng = np.random.default_rng(0)
    n = 80
    X = {
        "shop": rng.choice(["a", "b", "c", "d"], n),
        "town": rng.choice(["x", "y"], n),
        "area": rng.normal(size=n),
    }
    y, weights = rng.normal(size=n), rng.integers(0, 3, n)

    def fitted(index, weights=None):
        import pandas as pd

        encoder = EntityEmbeddingEncoder(
            hidden_layer_sizes=(8,), max_epochs=2, max_lr=0.01, random_state=0, embedding_dim=3,
            early_stopping=early_stopping, min_frequency=2,
        )  # fmt: skip
        frame = pd.DataFrame({name: values[index] for name, values in X.items()})
        return encoder.fit(frame, y[index], sample_weight=weights)

    weighted = fitted(np.arange(n), weights)
    if early_stopping:
        order = rng.permutation(n)
        repeated = fitted(order, weights[order])
    else:
        repeated = fitted(rng.permutation(np.repeat(np.arange(n), weights)))
    for feature in ("shop", "town"):
        np.testing.assert_array_equal(
            weighted.embeddings_[feature].vectors, repeated.embeddings_[feature].vectors
        )
    assert weighted.embeddings_.numerics == repeated.embeddings_.numerics
    assert weighted.history_ == repeated.history_


def test_rows_held_out_to_stop_early_are_not_learned_from_whatever_they_weigh():
    rng = np.random.default_rng(0)
    noise = {"id": [f"i{i}" for i in range(300)]}
    heavy = EntityEmbeddingEncoder(
        embedding_dim=4, shrinkage=0.0, max_epochs=30, max_lr=0.05, early_stopping=True,
        n_iter_no_change=30, random_state=0,
    )  # fmt: skip
    heavy.fit(pa.table(noise), rng.normal(size=300), sample_weight=np.full(300, 4.0))
    assert heavy.history_[-1]["train_loss"] < 0.2  # it remembers what it has seen
    assert heavy.history_[-1]["validation_loss"] > 0.3


def test_light_rows_train_the_unknown_too():
    rng = np.random.default_rng(0)
    X, y = {"id": rng.choice(["a", "b", "c"], 200)}, rng.normal(size=200)
    encoder = EntityEmbeddingEncoder(embedding_dim=2, max_epochs=2, max_lr=0.01, random_state=0)
    table = encoder.fit(pa.table(X), y, sample_weight=np.full(200, 1e-3)).embeddings_["id"]
    mean = np.average(table.vectors[2:], axis=0, weights=table.counts[2:])
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    assert abs(table.vectors[1]).max() > 1e-3  # not filled up with the mean
    assert 0 < table.counts[1] < 1
