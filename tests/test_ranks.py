"""The rank of a category beside its vector: what trees can do with it, and what nothing else notices."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsRegressor
from sklearn.tree import DecisionTreeRegressor

from embedkit import EmbeddingSet, EmbeddingTable, EntityEmbeddingRegressor, InputError
from embedkit.learning.ranks import REACH, ranks, ranks_between
from embedkit.vocabulary import Vocabulary

FAST = {"hidden_layer_sizes": (16,), "max_epochs": 4, "random_state": 0, "max_lr": 0.01}


@pytest.fixture(scope="module")
def shops():
    """Shops that all sell differently, in towns: rows, targets."""
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 40, 2000)
    X = pd.DataFrame({"shop": [f"s{i:02}" for i in shop], "town": (shop % 5).astype(str)})
    return X, rng.normal(size=40)[shop] + rng.normal(size=2000) / 10


def told_apart(column):
    """How many groups of rows a tree of scikit-learn makes along a column."""
    return DecisionTreeRegressor(random_state=0).fit(column, np.arange(len(column))).get_n_leaves()


@pytest.mark.parametrize("n", [2, 3, 5_000, 50_000])
def test_a_tree_can_tell_any_two_neighbours_apart(n):
    assert told_apart(ranks(n)) == n


@pytest.mark.parametrize("n", [50_001, 200_000])
def test_of_very_many_categories_neighbours_share_a_rank(n):
    assert told_apart(ranks(n)) == 50_000


def test_a_tree_can_tell_new_categories_from_old_ones():
    sources = np.insert(np.arange(42), range(3, 42), -1)
    assert told_apart(ranks_between(ranks(42), sources)) == len(sources)


@given(st.integers(2, 2_000_000))
def test_ranks_rise_and_stay_small(n):
    found = ranks(n)
    assert found.dtype == np.float32
    assert found.shape == (n, 1)
    assert found[0] == 0
    assert 0 < found[-1] <= np.float32(REACH)
    assert (np.diff(found[:, 0]) >= 0).all()


@given(st.lists(st.booleans(), max_size=50))
def test_new_categories_come_between_old_ones_which_stay(new):
    sources, code = [0, 1], 2
    for is_new in new:
        sources.append(-1 if is_new else code)
        code += not is_new
    sources = np.array(sources)
    old = ranks(code)
    found = ranks_between(old, sources)
    np.testing.assert_array_equal(found[sources >= 0], old)
    assert (np.diff(found[:, 0]) > 0).all()


@pytest.mark.parametrize(("n_old", "n_new"), [(100, 100_000), (200_000, 50_000)])
def test_categories_that_come_last_stay_within_reach(n_old, n_new):
    sources = np.concatenate([np.arange(n_old), np.full(n_new, -1)])
    found = ranks_between(ranks(n_old), sources)
    assert found[-1] <= np.float32(REACH)
    assert (np.diff(found[:, 0]) >= 0).all()


def test_ranks_come_last_and_are_in_sorted_order(shops):
    X, y = shops
    regressor = EntityEmbeddingRegressor(**FAST).fit(X, y)
    names = regressor.get_feature_names_out().tolist()
    assert [name for name in names if name.endswith("_rank")] == ["shop_rank", "town_rank"]
    table = regressor.embeddings_["shop"]
    assert table.feature_names_out[-1] == "shop_rank"
    assert table.learned_vectors.shape == (42, table.embedding_dim - 1)
    np.testing.assert_array_equal(table.vectors[:, -1:], ranks(42))
    column = regressor.transform(X)[:, names.index("shop_rank")]
    np.testing.assert_array_equal(np.argsort(column, kind="stable"), np.argsort(X["shop"], kind="stable"))


def test_without_ranks_all_else_is_the_same(shops, tmp_path):
    X, y = shops
    ranked = EntityEmbeddingRegressor(**FAST).fit(X, y)
    plain = EntityEmbeddingRegressor(**FAST, ranks=False).fit(X, y)
    for name, table in plain.embeddings_.items():
        np.testing.assert_array_equal(table.vectors, ranked.embeddings_[name].learned_vectors)
        assert not table.ranked
    np.testing.assert_array_equal(plain.predict(X), ranked.predict(X))
    neighbors = ranked.embeddings_["shop"].neighbors("s07")
    pd.testing.assert_frame_equal(neighbors, plain.embeddings_["shop"].neighbors("s07"))
    by_distance = [
        KNeighborsRegressor(20, weights="distance").fit(model.transform(X[:1500]), y[:1500])
        for model in (ranked, plain)
    ]
    predicted = [
        model.predict(encoder.transform(X[1500:]))
        for model, encoder in zip(by_distance, (ranked, plain), strict=True)
    ]
    np.testing.assert_allclose(*predicted, atol=1e-3)
    ranked.save(tmp_path / "shops.embedkit")
    stored = EmbeddingSet.load(tmp_path / "shops.embedkit")
    assert stored.equals(ranked.embeddings_)
    assert stored["shop"].ranked


def test_a_width_that_was_asked_for_has_no_rank_in_it(shops):
    X, y = shops
    regressor = EntityEmbeddingRegressor(**FAST, embedding_dim={"shop": 3}).fit(X, y)
    assert not regressor.embeddings_["shop"].ranked
    assert regressor.embeddings_["shop"].embedding_dim == 3
    assert regressor.embeddings_["town"].ranked


def test_a_column_of_that_name_keeps_it(shops):
    X, y = shops
    X = X.assign(shop_rank=np.arange(len(X)) % 7)
    regressor = EntityEmbeddingRegressor(**FAST).fit(X, y)
    assert not regressor.embeddings_["shop"].ranked
    assert regressor.embeddings_["town"].ranked
    assert regressor.get_feature_names_out()[-1] == "shop_rank"
    named = EntityEmbeddingRegressor(**FAST).fit(X[["shop", "town"]], pd.Series(y, name="shop_rank"))
    assert [table.ranked for table in named.embeddings_.values()] == [False, True]


def test_a_table_of_nothing_but_ranks_is_refused():
    vocabulary = Vocabulary.fit(pa.array(["a"]), "shop")
    with pytest.raises(InputError, match="'shop' must have a column beside the ranks"):
        EmbeddingTable(vocabulary, np.ones((3, 1)), ranked=True)


def test_ranks_of_rows_encoded_without_themselves_are_the_same(shops):
    X, y = shops
    regressor = EntityEmbeddingRegressor(**FAST, cross_fit=5, hidden_fraction=0)
    vectors = regressor.fit_transform(X, y)
    names = regressor.get_feature_names_out()
    ranked = np.array([name.endswith("_rank") for name in names])
    later = regressor.transform(X)
    np.testing.assert_array_equal(vectors[:, ranked], later[:, ranked])
    assert (vectors[:, ~ranked] != later[:, ~ranked]).any()


def test_a_set_that_grows_keeps_its_ranks(shops):
    X, y = shops
    regressor = EntityEmbeddingRegressor(**FAST).fit(X, y)
    before = regressor.embeddings_["shop"]
    more = pd.DataFrame({"shop": ["s07a"] * 30 + ["t"] * 30, "town": ["2"] * 60})
    regressor.extend(more, np.ones(60))
    after = regressor.embeddings_["shop"]
    rank = {label: after.vectors[code, -1] for code, label in enumerate(after.vocabulary.labels())}
    assert rank["s07"] < rank["s07a"] < rank["s08"]
    assert rank["s39"] < rank["t"]
    for code, label in enumerate(before.vocabulary.labels()):
        assert rank[label] == before.vectors[code, -1]
