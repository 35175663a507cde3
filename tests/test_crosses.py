"""Numbers for combinations of categories: what they are, which are chosen, and that they go everywhere."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import KFold
from sklearn.tree import DecisionTreeRegressor

from embedkit import (
    EmbeddingSet,
    EntityEmbeddingClassifier,
    EntityEmbeddingEncoder,
    EntityEmbeddingRegressor,
    InputError,
    StoreError,
)
from embedkit.crosses import Cross
from embedkit.folds import blocks_in_order, make_folds
from embedkit.inputs import task_of_rows
from embedkit.layout import FORMAT_VERSION
from embedkit.learning.combinations import (
    VIEW,
    VIEWS,
    _spread,
    auto_pairs,
    blocks_of,
    cross_fitted_effects,
    learn_cross,
    learn_crosses,
    order_pairs,
)
from embedkit.learning.jackknife import coded_rows
from embedkit.learning.targets import Head
from embedkit.pilot import Choice, numbers_of_pairs, view_of_crosses
from embedkit.serving.batch import transform_dataset
from embedkit.serving.export import export_tables

FAST = {"hidden_layer_sizes": (8,), "max_epochs": 2, "max_lr": 0.01, "random_state": 0, "hidden_fraction": 0}


@pytest.fixture(scope="module")
def access() -> tuple[pd.DataFrame, np.ndarray]:
    """Who asks for which resource: only the combination tells, and the place tells nothing."""
    rng = np.random.default_rng(0)
    who, what, place = rng.integers(0, 30, (3, 4000))
    X = pd.DataFrame({"place": place.astype(str), "who": who.astype(str), "what": what.astype(str)})
    return X, rng.normal(size=(30, 30))[who, what] + 0.5 * rng.normal(size=4000)


@pytest.fixture(scope="module")
def regressor(access: tuple[pd.DataFrame, np.ndarray]) -> EntityEmbeddingRegressor:
    return EntityEmbeddingRegressor(**FAST, crosses=1).fit(*access)


def test_means_are_shrunk_as_worked_out_by_hand() -> None:
    # Three combinations of two rows: means 0, 3 and 6, squares within 2 each, so MSB = 18 and MSE = 2:
    # variance components (18 - 2) / 2 = 8 and 2, and each mean keeps 2 * 8 / (2 * 8 + 2) of its way.
    y = np.array([-1.0, 1.0, 2.0, 4.0, 5.0, 7.0])
    codes = np.array([[2, 2], [2, 2], [2, 3], [2, 3], [3, 2], [3, 2]])
    cross = learn_cross(("a", "b"), codes, y[:, None], np.ones(6))
    assert cross.pairs.tolist() == [[2, 2], [2, 3], [3, 2]]
    assert cross.counts.tolist() == [2, 2, 2]
    np.testing.assert_allclose(cross.effects[:, 0], np.array([-3, 0, 3]) * 16 / 18, rtol=1e-6)


def test_what_chance_explains_has_no_number() -> None:
    codes = np.repeat([[2, 2], [2, 3]], 2, axis=0)
    cross = learn_cross(("a", "b"), codes, np.array([[0.0], [1.0], [0.0], [1.0]]), np.ones(4))
    assert not cross.effects.any()


@pytest.mark.parametrize("seed", range(3))
def test_a_row_of_weight_two_is_two_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, y = rng.integers(0, 4, (50, 2)), rng.normal(size=(50, 2))
    weights = rng.integers(0, 4, 50)
    rows = np.repeat(np.arange(50), weights)
    weighted = learn_cross(("a", "b"), codes, y, weights.astype(float))
    repeated = learn_cross(("a", "b"), codes[rows], y[rows], np.ones(len(rows)))
    assert np.array_equal(weighted.pairs, repeated.pairs)
    np.testing.assert_allclose(weighted.effects, repeated.effects, atol=1e-9)


def test_rows_are_encoded_without_their_folds() -> None:
    rng = np.random.default_rng(0)
    codes, y, weights = rng.integers(0, 5, (300, 2)), rng.normal(size=(300, 2)), rng.integers(1, 3, 300)
    y += codes
    folds = make_folds(3, y, None, 0)
    found = cross_fitted_effects(codes, y, weights.astype(float), folds)
    for fold in range(3):
        here = folds.test == fold
        without = learn_cross(("a", "b"), codes[~here], y[~here], weights[~here].astype(float))
        expected = without.transform(*codes[here].T)
        np.testing.assert_allclose(found[here], expected, rtol=1e-5, atol=1e-9)
        assert expected.any()


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))), st.integers(1, 3))
def test_lookup_is_that_of_a_dictionary(pairs: set[tuple[int, int]], n_outputs: int) -> None:
    known = {pair: np.float32([i + 1] * n_outputs) for i, pair in enumerate(sorted(pairs))}
    effects = np.array(list(known.values()), dtype=np.float32).reshape(len(known), n_outputs)
    cross = Cross(("a", "b"), np.array(list(known)).reshape(-1, 2), np.ones(len(known)), effects)
    first, second = np.divmod(np.arange(36), 6)
    expected = [known.get(pair, np.zeros(n_outputs)) for pair in zip(first, second, strict=True)]
    assert np.array_equal(cross.transform(first, second), expected)
    assert Cross.from_arrow(["a", "b"], cross.to_arrow()).equals(cross)


def test_the_pair_that_tells_is_chosen(access: tuple, regressor: EntityEmbeddingRegressor) -> None:
    (cross,) = regressor.embeddings_.crosses
    assert cross.features == ("who", "what")
    assert regressor.get_feature_names_out()[-1] == "who_x_what"
    assert np.corrcoef(regressor.transform(access[0])[:, -1], access[1])[0, 1] > 0.8
    every = EntityEmbeddingRegressor(**FAST, crosses=9).fit(*access).embeddings_.crosses
    assert every[0].equals(cross)


def test_pairs_are_in_the_order_of_what_they_explain() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 20, (3000, 3))
    strong, weak = rng.normal(size=(2, 20, 20))
    y = 2 * strong[codes[:, 2], codes[:, 0]] + weak[codes[:, 0], codes[:, 1]] + rng.normal(size=3000)
    folds = make_folds(5, y, None, 0)
    assert order_pairs(codes, y[:, None], np.ones(3000), folds) == [(0, 2), (0, 1), (1, 2)]
    assert order_pairs(codes, y[:, None], (np.arange(3000) < 1500) + 0.0, folds)[0] == (0, 2)


def test_pairs_whose_numbers_are_all_zero_are_left_out(access: tuple) -> None:
    found = []
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(size=len(access[1]))
        found += EntityEmbeddingRegressor(**FAST, crosses=3).fit(access[0], noise).embeddings_.crosses
    assert all(cross.effects.any() for cross in found)
    assert len(found) < 9  # of noise, chance explains the differences of about every other pair


def test_a_small_tree_learns_what_only_the_combination_tells(access: tuple) -> None:
    X, y = access
    scores = {}
    for crosses in (0, 1):
        encoder = EntityEmbeddingEncoder(**FAST, crosses=crosses)
        vectors = encoder.fit_transform(X[:3000], y[:3000])
        tree = DecisionTreeRegressor(max_leaf_nodes=20, random_state=0).fit(vectors, y[:3000])
        scores[crosses] = tree.score(encoder.transform(X[3000:]), y[3000:])
    assert scores[0] < 0.2 < 0.5 < scores[1]


def test_noise_is_not_recalled() -> None:
    rng = np.random.default_rng(0)
    codes, y = rng.integers(0, 50, (2000, 2)), rng.normal(size=(2000, 1))
    codes[:200] = codes[0]  # of which the means differ by more than chance explains
    y[:200] += 1
    ones, folds = np.ones(2000), make_folds(5, y, None, 0)
    honest = cross_fitted_effects(codes, y, ones, folds)[200:, 0]
    naive = learn_cross(("a", "b"), codes, y, ones).transform(*codes[200:].T)[:, 0]
    assert np.corrcoef(naive, y[200:, 0])[0, 1] > 0.5
    assert abs(np.corrcoef(honest, y[200:, 0])[0, 1]) < 0.1


def test_fit_transform_encodes_rows_without_their_folds(access: tuple) -> None:
    X, y = access
    encoder = EntityEmbeddingRegressor(**FAST, crosses=1)
    own, full = encoder.fit_transform(X, y)[:, -1], encoder.transform(X)[:, -1]
    assert np.corrcoef(own, full)[0, 1] > 0.9
    coded = {name: encoder.embeddings_[name].encode(X[name]) for name in X}
    vectors = np.hstack([encoder.embeddings_[name].learned_vectors[codes] for name, codes in coded.items()])
    unit = 0.6 * np.sqrt(vectors.var(axis=0).sum()) / y.std()
    residual = y - full / unit
    assert np.corrcoef(full, residual)[0, 1] > np.corrcoef(own, residual)[0, 1]
    folds = blocks_in_order(np.ones(4000, dtype=bool), 5)
    codes = np.stack([coded["who"], coded["what"]], axis=1)
    expected = cross_fitted_effects(codes, unit * y[:, None], np.ones(4000), folds)
    np.testing.assert_allclose(own, expected[:, 0], rtol=0.005)  # counts know the rows of trained unknowns


@pytest.mark.parametrize("kind", ["number", "two classes", "three classes"])
def test_the_numbers_of_all_targets_are_on_the_scale_of_the_vectors(access: tuple, kind: str) -> None:
    X = access[0]
    mean = np.random.default_rng(0).normal(size=(30, 30))[X["who"].astype(int), X["what"].astype(int)]
    y = {"number": 70 * mean, "two classes": mean > 1, "three classes": np.digitize(mean, [-1, 1])}[kind]
    kind_of_encoder = EntityEmbeddingRegressor if kind == "number" else EntityEmbeddingClassifier
    encoder = kind_of_encoder(**FAST, crosses=1).fit(X, y)
    (cross,) = encoder.embeddings_.crosses
    codes = {name: encoder.embeddings_[name].encode(X[name]) for name in X}
    numbers = cross.transform(codes["who"], codes["what"])
    assert numbers.shape[1] == (3 if kind == "three classes" else 1)
    vectors = np.hstack([encoder.embeddings_[name].learned_vectors[codes[name]] for name in X])
    of_spread = np.sqrt(numbers.var(axis=0).sum() / vectors.var(axis=0).sum())
    assert of_spread == pytest.approx(VIEW, rel=0.02)  # there is no noise to shrink them for


@pytest.fixture(scope="module")
def passing() -> tuple[pd.DataFrame, np.ndarray]:
    """Days, one after another, of which each moves every shop, and kinds that shops sell more or less of."""
    rng = np.random.default_rng(0)
    day, shop, kind = np.arange(3000) // 150, rng.integers(0, 10, 3000), rng.integers(0, 10, 3000)
    of_the_day, lasting = 3 * rng.normal(size=(20, 10)), 2 * rng.normal(size=(10, 10))
    y = of_the_day[day, shop] + lasting[shop, kind] + 0.1 * rng.normal(size=3000)
    return pd.DataFrame({"day": day, "shop": shop, "kind": kind}).astype(str), y


@pytest.mark.parametrize(
    ("cross_fit", "expected"),
    [(5, ("day", "shop")), (KFold(10), ("shop", "kind")), ("auto", ("shop", "kind"))],
)
def test_pairs_are_judged_on_the_folds_of_cross_fit(
    passing: tuple, cross_fit: object, expected: tuple[str, str]
) -> None:
    regressor = EntityEmbeddingRegressor(**FAST, crosses=1, cross_fit=cross_fit)
    regressor.fit_transform(*passing)
    assert [cross.features for cross in regressor.embeddings_.crosses] == [expected]


def test_fit_judges_pairs_on_blocks_of_rows(passing: tuple) -> None:
    regressor = EntityEmbeddingRegressor(**FAST, crosses=1).fit(*passing)
    assert [cross.features for cross in regressor.embeddings_.crosses] == [("shop", "kind")]


@pytest.mark.parametrize("method", ["fit", "fit_transform"])
@pytest.mark.parametrize("kind", ["rising", "falling", "classes"])
def test_rows_in_the_order_of_the_target_have_random_blocks(access: tuple, kind: str, method: str) -> None:
    X, y = access
    order = np.argsort(y if kind == "rising" else -y, kind="stable")
    X, y = X.iloc[order], y[order]
    if kind == "classes":  # together, but not in the order of their names
        y = np.array(["b", "a", "c"])[np.searchsorted([-1, 1], -y)]
    kind_of_encoder = EntityEmbeddingClassifier if kind == "classes" else EntityEmbeddingRegressor
    encoder = kind_of_encoder(**FAST, crosses=1)
    encoded = getattr(encoder, method)(X, y)
    assert [cross.features for cross in encoder.embeddings_.crosses] == [("who", "what")]
    if method == "fit_transform":
        n_numbers = 3 if kind == "classes" else 1
        own, full = encoded[:, -1 * n_numbers], encoder.transform(X)[:, -1 * n_numbers]
        assert np.corrcoef(own, full)[0, 1] > 0.9


SHUFFLED = np.random.default_rng(0).permutation(2000)


@pytest.mark.parametrize(
    ("order", "random"),
    [
        (np.arange(2000), True),
        (np.roll(np.arange(2000), -1), True),  # but for the first row, which is the last
        (np.argsort(np.arange(2000) + 50 * np.sin(SHUFFLED)), True),
        (SHUFFLED, False),
        (np.argsort(np.arange(2000) + 4000 * np.sin(SHUFFLED)), False),  # a trend
    ],
    ids=["sorted", "but for one", "almost", "shuffled", "trend"],
)
@pytest.mark.parametrize("kind", ["number", "rare class", "classes"])
def test_blocks_are_random_where_rows_are_in_the_order_of_the_target(
    kind: str, order: np.ndarray, random: bool
) -> None:
    y = np.sort(np.random.default_rng(0).normal(size=2000))
    if kind != "number":
        y = np.array(["b", "c", "a"])[np.digitize(y, [1.7] if kind == "rare class" else [-0.5, 0.5])]
    X = pd.DataFrame({"shop": (np.arange(2000) % 7).astype(str)})
    make = EntityEmbeddingRegressor if kind == "number" else EntityEmbeddingClassifier
    blocks = blocks_of(task_of_rows(make(**FAST), X, y[order], None))
    assert (np.diff(blocks.test) >= 0).all() != random


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 7))
def test_blocks_are_equal_shares_of_the_rows_that_exist(present: list[bool], n_blocks: int) -> None:
    folds = blocks_in_order(np.array(present), n_blocks)
    assert (np.diff(folds.test) >= 0).all()
    sizes = np.bincount(folds.test[np.array(present)], minlength=n_blocks)
    assert len(sizes) == n_blocks
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(folds.excluded[folds.test, folds.cells], np.ones(len(present), dtype=bool))


class AskedPilot:
    """A pilot whose LightGBM is known to gain by crosses, and its KNN by how much it sees of them.

    In one block more than in the other.
    """

    def __init__(
        self,
        gain: float,
        differ: float = 0.01,
        *,
        n_numbers: int = 1,
        n_blocks: int = 5,
        by_view: Mapping[float, float] = MappingProxyType({}),
    ) -> None:
        self.gain, self.differ, self.by_view = gain, differ, by_view
        self.pairs = np.zeros((20, n_numbers)), np.zeros((10, n_numbers))
        self.blocks = np.arange(20) % n_blocks, np.arange(10) % 2 + 3

    def score(self, model: str, cross_fitted: list[str], *, view: float, block: int) -> np.ndarray:
        assert cross_fitted == ["shop"]
        gain = self.by_view.get(view) if model == "knn" else (self.gain if view else None)
        scores = np.linspace(0.5, 0.6, 5)
        return scores if gain is None else scores + gain + {3: self.differ, 4: -self.differ}[block]


CHOICE = Choice(["shop"], [{"mean": 0.5}], "")


@pytest.mark.parametrize(("gain", "differ", "pay"), [(5, 10, 1), (3, 10, 0), (5, 20, 0), (-10, 10, 0)])
def test_crosses_pay_where_boosted_trees_surely_gain(gain: int, differ: int, pay: bool) -> None:
    view, why = view_of_crosses(AskedPilot(gain / 1000, differ / 1000), CHOICE)
    assert view == (VIEW if pay else 0)
    said = f"LightGBM gains {gain / 1000:.4f} +- {differ / 3000:.4f} by crosses on held-out rows"
    assert why == said + ("; KNN sees them at 0.6 of the vectors' spread" if pay else ": too little")


@pytest.mark.parametrize(
    ("by_view", "view", "by"),
    [
        ({0.01: 0.003, 1.2: 0.002}, VIEW, ""),  # an error of 0.0033
        ({0.01: 0.01}, 0.01, ", which gains 0.0100 +- 0.0033"),
        ({0.01: 0.01, 1.2: 0.02, 2.4: 0.03, 4.8: 0.02}, 2.4, ", which gains 0.0300 +- 0.0033"),
    ],
)
def test_knn_sees_crosses_as_it_surely_gains_most(by_view: dict, view: float, by: str) -> None:
    found, why = view_of_crosses(AskedPilot(0.02, by_view=by_view), CHOICE)
    assert found == view
    assert why.endswith(f"; KNN sees them at {view} of the vectors' spread{by}")


def test_why_nothing_is_asked() -> None:
    assert view_of_crosses(AskedPilot(1), Choice([], [], "no column helps")) == (0, "no column helps")
    view, why = view_of_crosses(AskedPilot(1, n_numbers=0), CHOICE)
    assert not view
    assert "too few rows" in why
    view, why = view_of_crosses(AskedPilot(1, n_blocks=1), CHOICE)
    assert not view
    assert "two groups" in why


@pytest.mark.parametrize(("n_classes", "n_pairs"), [(2, 8), (4, 8), (5, 6), (20, 1), (40, 0)])
def test_auto_takes_fewer_pairs_of_many_classes(n_classes: int, n_pairs: int) -> None:
    kind = "multiclass" if n_classes > 2 else "binary"
    assert auto_pairs([Head("y", kind, np.arange(n_classes))]) == n_pairs


@pytest.mark.parametrize("combinations", [0, 2])
def test_auto_takes_crosses_where_they_pay(combinations: float) -> None:
    rng = np.random.default_rng(0)
    shop, kind, town = rng.integers(0, 30, (3, 6000))
    y = rng.normal(size=30)[shop] + combinations * rng.normal(size=(30, 30))[shop, kind]
    y += rng.normal(size=30)[kind] + rng.normal(size=6000)
    X = pd.DataFrame({"shop": shop, "kind": kind, "town": town}).astype(str)
    encoder = EntityEmbeddingRegressor(**FAST | {"max_epochs": 8})
    vectors = encoder.fit_transform(X, y)
    found = [cross.features for cross in encoder.embeddings_.crosses]
    assert (("shop", "kind") in found) == (combinations > 0)
    assert "by crosses on held-out rows" in encoder.cross_fit_["crosses"]
    assert vectors.shape == encoder.transform(X).shape
    asked_for = EntityEmbeddingRegressor(**FAST | {"max_epochs": 8}, crosses=8 if combinations else 0)
    same = asked_for.fit_transform(X, y)
    numbers = [name for cross in encoder.embeddings_.crosses for name in cross.feature_names_out]
    seen = np.isin(encoder.get_feature_names_out(), numbers)
    if combinations:  # they are all there is to know, and KNN sees more of them
        more = vectors[:, seen].std() / same[:, seen].std()
        assert more * VIEW == pytest.approx(max(VIEWS))
        same[:, seen] *= more
    np.testing.assert_allclose(vectors, same, rtol=1e-5)
    assert asked_for.cross_fit_["crosses"] == "not measured"


def test_auto_takes_none_where_it_cannot_measure(access: tuple) -> None:
    assert EntityEmbeddingRegressor(**FAST).fit(*access).embeddings_.crosses == ()
    for cross_fit in (False, 5, KFold(3)):
        regressor = EntityEmbeddingRegressor(**FAST, cross_fit=cross_fit)
        regressor.fit_transform(*access)
        assert regressor.embeddings_.crosses == ()


def test_the_numbers_of_held_out_rows_know_neither_them_nor_their_block(
    access: tuple, regressor: EntityEmbeddingRegressor
) -> None:
    learned, task = regressor._learned, task_of_rows(clone(regressor), *access, None)
    rows, blocks = coded_rows(learned, task), blocks_in_order(np.ones(4000, dtype=bool), 4)
    train, held = np.split(np.random.default_rng(0).permutation(4000), [3000])
    found = numbers_of_pairs(learned, rows, blocks, train, held, 0)
    crosses = learn_crosses(learned, rows.take(train), 8, blocks.take(train), 0, view=1)
    names = [part.feature for part in learned.tables]
    outputs, row_codes = rows.targets.double().numpy(), rows.codes.numpy()
    outputs *= _spread(learned) / outputs[train].std()
    for i, cross in enumerate(crosses):
        codes = row_codes[:, [names.index(name) for name in cross.features]]
        for block in range(4):
            others = train[blocks.test[train] != block]
            without = learn_cross(cross.features, codes[others], outputs[others], np.ones(len(others)))
            here = np.flatnonzero(blocks.test[[*train, *held]] == block)
            expected = without.transform(*codes[[*train, *held]][here].T)[:, 0]
            np.testing.assert_allclose(found[here, i], expected, rtol=1e-4, atol=1e-6)
    assert found.shape == (4000, len(crosses))
    assert found[3000:].any()


def test_of_many_columns_those_that_spread_most_are_looked_at(access: tuple) -> None:
    X, y = access
    rng = np.random.default_rng(0)
    many = X.assign(**{f"noise{i}": rng.integers(0, 3, 4000).astype(str) for i in range(30)})
    y = y + 0.5 * (X["who"].astype(int) + X["what"].astype(int))
    settings = FAST | {"max_epochs": 6, "min_reliability": 0.5}
    (cross,) = EntityEmbeddingRegressor(**settings, crosses=1).fit(many, y).embeddings_.crosses
    assert cross.features == ("who", "what")
    looked_at = []

    def order(codes: np.ndarray, *others: object) -> list[tuple[int, int]]:
        looked_at.append(codes.shape[1])
        return order_pairs(codes, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedkit.learning.combinations.order_pairs", order)
        EntityEmbeddingRegressor(**settings, crosses=1).fit(many, y)
    assert looked_at == [25]


def test_names_that_differ_in_case_only_have_no_cross(access: tuple) -> None:
    X = access[0].assign(WHO_x_what=1.0)
    embeddings = EntityEmbeddingRegressor(**FAST, crosses=3).fit(X, access[1]).embeddings_
    assert ("who", "what") not in [cross.features for cross in embeddings.crosses]


def test_a_hidden_value_hides_its_combinations(access: tuple) -> None:
    hiding = EntityEmbeddingRegressor(**FAST | {"hidden_fraction": 0.2}, crosses=1)
    vectors = hiding.fit_transform(*access)
    unknown = hiding.transform(pd.DataFrame({"place": ["?"], "who": ["?"], "what": ["?"]}))[0]
    start = hiding.embeddings_["place"].embedding_dim
    who = hiding.embeddings_["who"].embedding_dim
    hidden = (vectors[:, start : start + who] == unknown[start : start + who]).all(axis=1)
    assert 0.15 < hidden.mean() < 0.25
    assert not vectors[hidden, -1].any()
    assert unknown[-1] == 0


def test_combinations_that_hardly_repeat_have_none() -> None:
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.integers(0, 2000, (2000, 2)).astype(str), columns=["a", "b"])
    X.iloc[:5] = X.iloc[0].to_numpy()
    encoder = EntityEmbeddingEncoder(**FAST, crosses=1).fit(X, rng.normal(size=2000))
    assert encoder.embeddings_.crosses == ()


def test_hidden_values_are_what_a_value_never_seen_is(access: tuple) -> None:
    X, y = access
    X = X.assign(who=X["who"].where(np.arange(4000) % 5 > 0, [f"rare {i}" for i in range(4000)]))
    rare = {"min_frequency": 5, "hidden_fraction": 0.2}
    encoder = EntityEmbeddingRegressor(**FAST | rare, crosses=1)
    vectors, names = encoder.fit_transform(X, y), list(encoder.get_feature_names_out())
    (cross,) = encoder.embeddings_.crosses
    codes = [encoder.embeddings_[name].encode(X[name]) for name in cross.features]
    start = names.index(f"{cross.features[0]}_0")
    unknown = encoder.embeddings_[cross.features[0]].vectors[1]
    hidden = (vectors[:, start : start + len(unknown)] == unknown).all(axis=1) & (codes[0] != 1)
    never = cross.transform(np.ones(4000, dtype=int), codes[1])[:, 0]
    kept = vectors[hidden, -1] == never[hidden]  # the other value may be hidden, too
    assert 0.7 < kept.mean() < 0.9
    assert never.any()


def test_few_rows_have_none(access: tuple) -> None:
    X, y = access[0][:500], access[1][:500]
    few = EntityEmbeddingRegressor(**FAST, crosses=1).fit(X, y)
    assert few.embeddings_.crosses == ()
    assert few.fit_transform(X, y).shape[1] == few.embeddings_.width


def test_one_group_leaves_none_where_models_learn(access: tuple) -> None:
    regressor = EntityEmbeddingRegressor(**FAST, crosses=1)
    vectors = regressor.fit_transform(*access, groups=np.zeros(4000))
    assert regressor.embeddings_.crosses == ()
    assert vectors.shape[1] == regressor.embeddings_.width


def test_classes_and_several_targets_have_a_number_each(access: tuple) -> None:
    X, y = access
    labels = np.digitize(y, [-0.5, 0.5])
    classifier = EntityEmbeddingClassifier(**FAST, crosses=1).fit(X, labels)
    assert list(classifier.get_feature_names_out()[-3:]) == [f"who_x_what_{i}" for i in range(3)]
    effects = classifier.transform(X)[:, -3:]
    assert (effects.argmax(axis=1) == labels).mean() > 0.5
    both = EntityEmbeddingEncoder(**FAST, crosses=1).fit(X, pd.DataFrame({"y": y, "z": -y}))
    assert np.allclose(*(both.transform(X)[:, -2:] * [1, -1]).T, atol=1e-6)


def test_names_that_are_taken_have_no_cross(access: tuple) -> None:
    X = access[0].assign(who_x_what=1.0)
    embeddings = EntityEmbeddingRegressor(**FAST, crosses=3).fit(X, access[1]).embeddings_
    assert ("who", "what") not in [cross.features for cross in embeddings.crosses]
    assert embeddings.feature_names_out.count("who_x_what") == 1


def test_names_given_for_an_array(access: tuple) -> None:
    regressor = EntityEmbeddingRegressor(**FAST, crosses=1).fit(access[0].to_numpy(), access[1])
    assert regressor.get_feature_names_out()[-1] == "x1_x_x2"
    assert regressor.get_feature_names_out(["a", "b", "c"])[-1] == "b_x_c"


def test_stored_and_loaded(access: tuple, regressor: EntityEmbeddingRegressor, tmp_path: Path) -> None:
    regressor.save(tmp_path / "s")
    loaded = EntityEmbeddingRegressor.load(tmp_path / "s")
    assert loaded.embeddings_.equals(regressor.embeddings_)
    assert np.array_equal(loaded.transform(access[0]), regressor.transform(access[0]))
    assert EmbeddingSet.load(tmp_path / "s").subset(["who"]).crosses == ()
    assert EmbeddingSet.load(tmp_path / "s").subset(["who", "what"]).crosses[0].features == ("who", "what")
    manifest = (tmp_path / "s" / "v000001" / "manifest.json").read_text()
    assert f'"format_version": {FORMAT_VERSION}' in manifest
    path = tmp_path / "s" / "v000001" / "crosses" / "0.parquet"
    path.write_bytes(path.read_bytes().replace(b"count", b"c0unt"))
    with pytest.raises(StoreError, match=r"crosses/0\.parquet"):
        EmbeddingSet.load(tmp_path / "s")


@pytest.mark.parametrize("layout", ["wide", "vector"])
def test_batch_jobs_put_them_out(
    access: tuple, regressor: EntityEmbeddingRegressor, tmp_path: Path, layout: str
) -> None:
    regressor.save(tmp_path / "s")
    access[0].to_parquet(tmp_path / "rows.parquet")
    transform_dataset(tmp_path / "s", tmp_path / "rows.parquet", tmp_path / "out", layout=layout)
    found = pq.read_table(tmp_path / "out")["who_x_what"].to_numpy()
    assert np.array_equal(found, regressor.transform(access[0])[:, -1])


def test_old_combinations_stay_when_categories_are_added(access: tuple) -> None:
    X, y = access
    grown = EntityEmbeddingRegressor(**FAST, crosses=1).fit(X, y)
    before = grown.transform(X)
    grown.extend(X[:50].assign(who="100"), y[:50])
    assert "100" in grown.categories_[1]
    assert np.array_equal(grown.transform(X), before)
    assert not grown.transform(X[:50].assign(who="100"))[:, -1].any()


def test_exported_as_text(regressor: EntityEmbeddingRegressor, tmp_path: Path) -> None:
    export_tables(regressor.embeddings_, tmp_path)
    pairs = pq.read_table(tmp_path / "who_x_what.parquet")
    (cross,) = regressor.embeddings_.crosses
    place = pairs["first"].to_pylist().index("7")
    rows = pd.DataFrame({"place": ["1"], "who": ["7"], "what": [pairs["second"][place].as_py()]})
    assert regressor.transform(rows)[0, -1] == pairs["who_x_what"][place].as_py() != 0
    assert pairs.num_rows == len(cross.pairs)


def test_rows_in_files_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedkit.learning.numeric.MAX_SORTED_ROWS", 10)
    pq.write_table(pa.table({"a": ["x", "y"] * 10, "y": np.arange(20.0)}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="crosses are learned from rows in memory"):
        EntityEmbeddingRegressor(crosses=1).fit(tmp_path / "rows.parquet", "y")


@pytest.mark.parametrize("crosses", [-1, 1.5, "some", None, True])
def test_what_crosses_may_be(access: tuple, crosses: object) -> None:
    expected = f"crosses must be 'auto' or a whole number of at least 0, got {crosses!r}"
    with pytest.raises(InputError, match=expected):
        EntityEmbeddingRegressor(crosses=crosses).fit(*access)


def test_parts_of_a_cross_must_fit() -> None:
    with pytest.raises(InputError, match="as many rows"):
        Cross(("a", "b"), np.zeros((2, 2)), np.ones(2), np.zeros((1, 1)))
    with pytest.raises(InputError, match="sorted and unique"):
        Cross(("a", "b"), np.zeros((2, 2)), np.ones(2), np.zeros((2, 1)))
    table = Cross(("a", "b"), np.array([[0, 1]]), np.ones(1), np.ones((1, 1))).to_arrow()
    with pytest.raises(InputError, match="must be in columns"):
        Cross.from_arrow(["a", "c"], table)
    with pytest.raises(InputError, match="must be in columns"):
        Cross.from_arrow(["a", "b"], table.drop_columns(["second"]))


def test_a_cross_is_of_categories_of_the_set(regressor: EntityEmbeddingRegressor) -> None:
    tables, far = regressor.embeddings_.values(), np.array([[0, 1_000]])
    for features in (("who", "what"), ("who", "when")):
        with pytest.raises(InputError, match="must be of categories of two of the features"):
            EmbeddingSet(tables, crosses=[Cross(features, far, np.ones(1), np.ones((1, 1)))])
