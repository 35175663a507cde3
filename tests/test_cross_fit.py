"""Training rows encoded without themselves: folds, tables without rows, the choice, and what leaks."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, ShuffleSplit, TimeSeriesSplit
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeRegressor

from embedkit import (
    EntityEmbeddingClassifier,
    EntityEmbeddingEncoder,
    EntityEmbeddingRegressor,
    InputError,
    pilot,
)
from embedkit.folds import make_folds
from embedkit.learning import jackknife
from embedkit.learning.jackknife import Evidence, alignment_residual
from embedkit.models import MODELS
from embedkit.pilot import choose
from embedkit.vocabulary import UNKNOWN

FAST = {
    "hidden_layer_sizes": (8,),
    "max_epochs": 4,
    "max_lr": 0.01,
    "random_state": 0,
    "hidden_fraction": 0.0,
}


@pytest.fixture(scope="module")
def sales():
    """Sales of 2,000 days: many rare shops, few towns, a number."""
    rng = np.random.default_rng(0)
    shop, town, area = rng.integers(0, 400, 2000), rng.integers(0, 5, 2000), rng.normal(size=2000)
    X = pd.DataFrame({"shop": shop.astype(str), "town": town.astype(str), "area": area})
    return X, rng.normal(size=400)[shop] + town + 0.3 * area + rng.normal(size=2000)


def test_a_number_makes_that_many_folds():
    folds = make_folds(4, np.zeros(100), None, 0)
    assert np.bincount(folds.test).tolist() == [25] * 4
    own = folds.excluded[folds.test, folds.cells]
    assert own.all()
    assert folds.excluded.sum() == 4


def test_groups_stay_together():
    groups = np.arange(100) % 10
    folds = make_folds(3, np.zeros(100), groups, 0)
    assert all(len(np.unique(folds.test[groups == group])) == 1 for group in range(10))


def test_in_order_of_time_nothing_later_is_learned_from():
    folds = make_folds(TimeSeriesSplit(4), np.zeros(100), None, 0)
    for row in range(20, 100):  # the oldest block has nothing before it
        learned_from = ~folds.excluded[folds.test[row]][folds.cells]
        assert not learned_from[row:].any()
        assert learned_from[:20].all()
    oldest = ~folds.excluded[folds.test[0]][folds.cells]
    assert not oldest[:20].any()
    assert oldest[20:].all()


@pytest.mark.parametrize(
    ("cross_fit", "message"),
    [
        (1, "cross_fit must be at least 2"),
        (101, "at most 100 rows"),
        (True, "must be 'auto', False, a number or a splitter, got True"),
        (ShuffleSplit(3, random_state=0), "tests a row twice"),
    ],
)
def test_folds_that_make_no_sense_are_refused(cross_fit, message):
    with pytest.raises(InputError, match=message):
        make_folds(cross_fit, np.zeros(100), None, 0)


def ridge(counts, sums, precision):
    """Vectors of width 1 that minimise half the squared errors of the rows plus the prior's penalty."""
    return sums / (counts + precision)


def test_without_a_fold_is_a_fit_without_it_where_the_loss_is_a_parabola():
    rng = np.random.default_rng(0)
    codes, cells = rng.integers(2, 12, 300), rng.integers(0, 3, 300)
    y = rng.normal(size=300) + 1.0
    precision = 0.5
    counts, sums = np.zeros((3, 12)), np.zeros((3, 12))
    np.add.at(counts, (cells, codes), 1)
    np.add.at(sums, (cells, codes), y)
    full = ridge(counts.sum(axis=0), sums.sum(axis=0), precision)
    gradients = counts * full - sums
    evidence = Evidence(
        torch.tensor(full[:, None], dtype=torch.float32),
        torch.tensor(counts, dtype=torch.float32),
        torch.tensor(gradients[:, :, None], dtype=torch.float32),
        torch.tensor(counts.sum(axis=0)[:, None, None], dtype=torch.float32),
        torch.tensor([[precision]], dtype=torch.float64),
    )
    for fold in range(3):
        others = np.arange(3) != fold
        expected = ridge(counts[others].sum(axis=0), sums[others].sum(axis=0), precision)
        found = evidence.without(~others)
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(evidence.without(np.zeros(3, dtype=bool)), evidence.vectors.numpy())


def test_a_category_without_rows_left_is_unknown_and_steps_are_bounded():
    vectors = torch.tensor([[0.0], [0.5], [2.0], [3.0]])
    counts = torch.tensor([[0.0, 4.0, 3.0, 1.0], [0.0, 4.0, 0.0, 9.0]])
    gradients = torch.full((2, 4, 1), -1e6)
    evidence = Evidence(
        vectors, counts, gradients, torch.ones(4, 1, 1), torch.ones(1, 1, dtype=torch.float64)
    )
    found = evidence.without(np.array([True, False]))[:, 0]
    assert found[UNKNOWN] == 0.5
    assert found[2] == found[UNKNOWN]
    assert abs(found[3] - 3.0) == pytest.approx(2.5)  # as far as from unknown


def test_alignment_residual_by_hand():
    full = np.array([[0.0], [2.0]])
    assert alignment_residual(full, full) == 0
    assert alignment_residual(full, full + 1) == pytest.approx(1.0)
    assert alignment_residual(np.ones((2, 1)), np.zeros((2, 1))) == 0


def test_rows_do_not_know_themselves(sales):
    X, y = sales
    encoder = EntityEmbeddingEncoder(**FAST, cross_fit=5)
    crossed = encoder.fit_transform(X, y)
    plain = EntityEmbeddingEncoder(**FAST, cross_fit=False).fit(X, y).transform(X)
    np.testing.assert_array_equal(encoder.transform(X), plain)  # new rows are encoded by the same tables
    names = encoder.get_feature_names_out()
    area = names == "area"
    np.testing.assert_array_equal(crossed[:, area], plain[:, area])
    # What the noise of a row did to its shop's vector is gone: the vector says less of this row's target.
    shop = np.flatnonzero([name.startswith("shop") for name in names])[0]
    signal = np.corrcoef(plain[:, shop], y)[0, 1] ** 2
    assert np.corrcoef(crossed[:, shop], y)[0, 1] ** 2 < 0.8 * signal
    features = encoder.cross_fit_["features"]
    assert features["shop"]["alignment_residual"] > 3 * features["town"]["alignment_residual"] > 0
    assert encoder.cross_fit_["reason"] == "asked for"


def test_the_choice_is_measured_recorded_and_stored(sales, tmp_path):
    X, y = sales
    regressor = EntityEmbeddingRegressor(**FAST)
    vectors = regressor.fit_transform(X, y)
    record = regressor.cross_fit_
    tried = [score["cross_fitted"] for score in record["scores"]]
    assert tried[0] == []
    assert sorted(tried[-1]) == ["shop", "town"]
    best = max(record["scores"], key=lambda score: score["mean"])
    for score in record["scores"]:
        assert score["mean"] == pytest.approx(np.mean([score[model] for model in MODELS]))
    crossed = [name for name, said in record["features"].items() if said["cross_fitted"]]
    assert sorted(crossed) in (sorted(best["cross_fitted"]), ["shop"])  # the usual choice
    assert (vectors != regressor.transform(X)).any() == bool(crossed)
    regressor.save(tmp_path / "sales.embedkit")
    assert EntityEmbeddingRegressor.load(tmp_path / "sales.embedkit").cross_fit_ == record


class MadeUpPilot:
    """A pilot whose models' scores on ten blocks are known, by how many of three columns are cross-fitted."""

    embeddings = ("day", "shop", "town")

    def __init__(self, *gains):
        self.gains = gains

    def score(self, model, cross_fitted):
        return np.linspace(0.5, 0.6, 10) + self.gains[len(cross_fitted)]


@pytest.mark.parametrize(
    ("size", "gain", "error", "chosen"),
    [
        (1, 0.01, 0.005, ["shop"]),
        (1, 0.01, 0.02, ["shop"]),  # as good as any without measuring
        (0, 0.01, 0.005, []),
        (0, 0.01, 0.02, ["shop"]),
        (2, 0.01, 0.005, ["shop", "town"]),
        (2, 0.01, 0.02, ["shop"]),
        (3, 0.01, 0.005, ["shop", "town", "day"]),
        (3, 0, 0, ["shop"]),
    ],
)
def test_other_choices_must_gain_more_than_chance(size, gain, error, chosen):
    gains = [np.zeros(10) for _ in range(4)]
    gains[size] = gain + error * 10**0.5 * np.repeat([-1, 1], 5) * (9 / 10) ** 0.5
    choice = choose(MadeUpPilot(*gains), {"town": 0.4, "shop": 0.5, "day": 0.3})
    assert choice.columns == chosen
    tried = [score["cross_fitted"] for score in choice.scores]
    assert tried == [["shop", "town", "day"][:i] for i in range(4)]
    assert f"gains {gain:.4f} +- {error:.4f} over" in choice.reason
    assert choice.reason.endswith("too little") == (len(chosen) != size)


def test_a_sure_gain_goes_before_a_larger_one_that_is_not():
    sure, unsure = np.full(10, 0.01), 0.012 + 0.1 * np.repeat([-1, 1], 5)
    choice = choose(MadeUpPilot(sure, np.zeros(10), unsure, sure / 2), {"town": 1, "shop": 2, "day": 0.1})
    assert choice.columns == []
    assert "none gains 0.0100" in choice.reason
    assert np.argmax([score["mean"] for score in choice.scores]) == 2


def test_columns_without_vectors_are_in_nobodys_way(monkeypatch):
    rng = np.random.default_rng(0)
    noise, shop = rng.integers(0, 900, (4, 3000)), rng.integers(0, 300, 3000)
    X = pd.DataFrame({f"noise{i}": column.astype(str) for i, column in enumerate(noise)})
    y = rng.normal(size=3000)
    encoder = EntityEmbeddingEncoder(**FAST | {"max_epochs": 8}, min_reliability=0.9)
    encoder.fit_transform(X, y)
    assert not any(table.vectors.any() for table in encoder.embeddings_.values())
    assert encoder.cross_fit_["reason"] == "no column has vectors to cross-fit"
    assert encoder.cross_fit_["scores"] == []
    tried = []

    def asked(pilot, residuals, bar):
        tried.extend(pilot.embeddings)
        return choose(pilot, residuals, bar)

    monkeypatch.setattr("embedkit.cross_fitting.choose", asked)
    X["shop"] = shop.astype(str)
    encoder.fit_transform(X, rng.normal(size=300)[shop] + 0.1 * y)
    published = [name for name, table in encoder.embeddings_.items() if table.vectors.any()]
    assert "shop" in tried
    assert len(tried) < 5
    assert set(published) <= set(tried)
    for name, of in encoder.cross_fit_["features"].items():
        assert name in tried or not of["cross_fitted"]


def test_one_column_is_cross_fitted_unless_that_hurts():
    class OneColumn(MadeUpPilot):
        embeddings = ("shop",)

    assert choose(OneColumn(np.zeros(10), np.zeros(10)), {"shop": 0.5}).columns == ["shop"]
    assert choose(OneColumn(np.full(10, 0.1), np.zeros(10)), {"shop": 0.5}).columns == []


def test_filters_of_warnings_stay_as_they_were(sales, monkeypatch):
    monkeypatch.setattr(pa, "cpu_count", lambda: 3)
    before = list(warnings.filters)
    for _ in range(3):
        EntityEmbeddingEncoder(**FAST).fit_transform(*sales)
        assert warnings.filters == before


def test_groups_of_very_different_sizes(sales):
    X, y = sales
    groups = np.repeat(np.arange(5), [1990, 3, 3, 2, 2])
    encoder = EntityEmbeddingEncoder(**FAST)
    vectors = encoder.fit_transform(X, y, groups=groups)
    np.testing.assert_array_equal(vectors, encoder.transform(X))
    assert "too unequal" in encoder.cross_fit_["reason"]
    groups = np.repeat(np.arange(5), [900, 10, 10, 540, 540])
    encoder.fit_transform(X, y, groups=groups)
    assert np.isfinite([score["mean"] for score in encoder.cross_fit_["scores"]]).all()
    assert "gains" in encoder.cross_fit_["reason"]


def test_only_noise_has_to_help(monkeypatch):
    rng = np.random.default_rng(1)
    town = rng.integers(0, 5, 4000)
    X = pd.DataFrame({"noise": rng.integers(0, 1000, 4000).astype(str), "town": town.astype(str)})
    monkeypatch.setattr(jackknife, "find_useless", lambda learned, rows, features: list(features))
    encoder = EntityEmbeddingEncoder(max_epochs=8, max_lr=0.01, random_state=0, shrinkage=0.01)
    encoder.fit_transform(X, town + rng.normal(size=4000))
    features = encoder.cross_fit_["features"]
    assert not features["noise"]["helps"]
    assert features["noise"]["alignment_residual"] > 0.125**0.5  # more than half of it is noise
    assert features["town"]["helps"]
    assert features["town"]["alignment_residual"] < 0.125**0.5


def test_few_rows_are_not_enough_to_measure(sales):
    X, y = sales
    encoder = EntityEmbeddingEncoder(**FAST)
    vectors = encoder.fit_transform(X[:500], y[:500])
    assert "too few" in encoder.cross_fit_["reason"]
    np.testing.assert_array_equal(vectors, encoder.transform(X[:500]))


def test_a_splitter_is_taken_and_not_stored(sales, tmp_path):
    X, y = sales
    encoder = EntityEmbeddingEncoder(**FAST, cross_fit=KFold(3))
    encoder.fit_transform(X, y)
    encoder.save(tmp_path / "sales.embedkit")
    loaded = EntityEmbeddingEncoder.load(tmp_path / "sales.embedkit")
    np.testing.assert_array_equal(loaded.transform(X), encoder.transform(X))


def test_an_unknown_word_is_refused(sales):
    with pytest.raises(
        InputError, match="cross_fit must be 'auto', False, a number or a splitter, got 'yes'"
    ):
        EntityEmbeddingEncoder(**FAST, cross_fit="yes").fit_transform(*sales)


def leak(vectors, y, model):
    """How well a model that cannot learn single rows by heart knows the rows that it learned from."""
    return roc_auc_score(y, model.fit(vectors, y).predict_proba(vectors)[:, 1])


def test_noise_does_not_leak():
    """5,000 categories of nothing: a model sees nothing in them, unless their vectors know its rows."""
    from lightgbm import LGBMClassifier

    rng = np.random.default_rng(0)
    X = pd.DataFrame({"id": rng.integers(0, 5000, 20_000).astype(str)})
    new = pd.DataFrame({"id": rng.integers(0, 5000, 20_000).astype(str)})
    y, y_new = rng.integers(0, 2, (2, 20_000))
    models = {
        "forest": RandomForestClassifier(50, min_samples_leaf=50, random_state=0),
        "lightgbm": LGBMClassifier(n_estimators=50, random_state=0, n_jobs=1, verbose=-1),
    }
    honest = EntityEmbeddingClassifier(max_epochs=8, max_lr=0.01, random_state=0)
    vectors, later = honest.fit_transform(X, y), honest.transform(new)
    naive = EntityEmbeddingClassifier(max_epochs=8, max_lr=0.01, random_state=0, cross_fit=False)
    naive_vectors = naive.fit_transform(X, y)
    for model in models.values():
        assert leak(naive_vectors, y, model) > 0.65
        assert leak(vectors, y, model) < 0.52
        assert abs(roc_auc_score(y_new, model.predict_proba(later)[:, 1]) - 0.5) < 0.015
    assert not honest.cross_fit_["features"]["id"]["helps"]
    assert (later == 0).all()


def test_folds_that_learn_from_the_rows_they_encode_are_refused():
    rows = np.arange(10)

    class Careless:
        def split(self, X, y, groups):
            return [(rows, rows[:5]), (rows, rows[5:])]

    with pytest.raises(InputError, match="cross_fit tests rows that it trains on"):
        make_folds(Careless(), np.zeros(10), None, 0)


def test_few_groups_make_few_folds_and_one_makes_none(sales):
    X, y = sales
    thirds = EntityEmbeddingEncoder(**FAST)
    thirds.fit_transform(X, y, groups=np.arange(len(X)) % 3)
    assert thirds.cross_fit_["scores"]
    alone = EntityEmbeddingEncoder(**FAST)
    vectors = alone.fit_transform(X, y, groups=np.zeros(len(X)))
    assert "one group" in alone.cross_fit_["reason"]
    np.testing.assert_array_equal(vectors, alone.transform(X))
    with pytest.raises(InputError, match="at most 3 groups, got 5"):
        EntityEmbeddingEncoder(**FAST, cross_fit=5).fit_transform(X, y, groups=np.arange(len(X)) % 3)
    with pytest.raises(InputError, match="groups must have one entry for each of 2000 rows"):
        EntityEmbeddingEncoder(**FAST).fit_transform(X, y, groups=[1, 2])


def test_groups_are_routed_through_a_pipeline(sales):
    X, y = sales
    groups = np.arange(len(X)) // 500
    with sklearn.config_context(enable_metadata_routing=True):
        encoder = EntityEmbeddingEncoder(**FAST, cross_fit=3).set_fit_request(groups=True)
        routed = Pipeline([("encoder", encoder), ("ridge", Ridge())]).fit(X, y, groups=groups)
    by_hand = EntityEmbeddingEncoder(**FAST, cross_fit=3).fit_transform(X, y, groups=groups)
    np.testing.assert_array_equal(routed.predict(X), Ridge().fit(by_hand, y).predict(encoder.transform(X)))
    assert (by_hand != EntityEmbeddingEncoder(**FAST, cross_fit=3).fit_transform(X, y)).any()


def test_rows_of_weight_zero_are_not_asked(sales):
    X, y = sales
    weights = np.ones(len(X))
    weights[::4] = 0
    unknown = np.where(weights > 0, y, np.nan)
    weighted, without = EntityEmbeddingEncoder(**FAST), EntityEmbeddingEncoder(**FAST)
    vectors = weighted.fit_transform(X, unknown, sample_weight=weights)
    np.testing.assert_array_equal(vectors[weights > 0], without.fit_transform(X[weights > 0], y[weights > 0]))
    assert weighted.cross_fit_["scores"] == without.cross_fit_["scores"]
    for name in ("shop", "town"):
        moved, expected = (
            record["features"][name]["alignment_residual"]
            for record in (weighted.cross_fit_, without.cross_fit_)
        )
        assert moved == pytest.approx(expected, rel=1e-5)


def test_some_values_are_hidden_from_models(sales):
    X, y = sales
    plain = EntityEmbeddingEncoder(**FAST, cross_fit=5)
    hiding = EntityEmbeddingEncoder(**FAST | {"hidden_fraction": 0.1}, cross_fit=5)
    seen, vectors = plain.fit_transform(X, y), hiding.fit_transform(X, y)
    np.testing.assert_array_equal(hiding.transform(X), plain.transform(X))
    names = hiding.get_feature_names_out().tolist()
    hidden = {}
    for name in ("shop", "town"):
        table = hiding.embeddings_[name]
        first = names.index(f"{name}_0")
        block = slice(first, first + table.vectors.shape[1])
        hidden[name] = (vectors[:, block] == table.vectors[UNKNOWN]).all(axis=1)
        np.testing.assert_array_equal(vectors[~hidden[name], block], seen[~hidden[name], block])
        assert 0.08 < hidden[name].mean() < 0.12
    assert 0 < (hidden["shop"] & hidden["town"]).mean() < 0.03  # each by itself
    np.testing.assert_array_equal(vectors[:, names.index("area")], seen[:, names.index("area")])
    np.testing.assert_array_equal(vectors, clone(hiding).fit_transform(X, y))


def test_nothing_is_hidden_unless_asked_for_and_from_few_rows(sales):
    X, y = sales
    few = EntityEmbeddingEncoder(**FAST | {"hidden_fraction": 0.5})
    np.testing.assert_array_equal(few.fit_transform(X[:999], y[:999]), few.transform(X[:999]))
    alone = EntityEmbeddingEncoder(**FAST | {"hidden_fraction": 0.5}, cross_fit=False)
    np.testing.assert_array_equal(alone.fit_transform(X, y), alone.transform(X))
    with pytest.raises(InputError, match="hidden_fraction must be at least 0 and less than 1, got 1"):
        EntityEmbeddingEncoder(hidden_fraction=1).fit_transform(X, y)


def test_rows_of_weight_zero_hide_nothing(sales):
    X, y = sales
    weights = np.ones(len(X))
    weights[::4] = 0
    weighted = EntityEmbeddingEncoder(**FAST | {"hidden_fraction": 0.2})
    vectors = weighted.fit_transform(X, y, sample_weight=weights)
    without = clone(weighted).fit_transform(X[weights > 0], y[weights > 0])
    np.testing.assert_array_equal(vectors[weights > 0], without)
    np.testing.assert_array_equal(vectors[weights == 0], weighted.transform(X)[weights == 0])


def test_trees_tell_unknown_categories_apart():
    """Without a row of it they take unknown for whatever category lies on its side of a cut."""
    rng = np.random.default_rng(0)
    code = rng.integers(0, 8, 8000)
    X, y = pd.DataFrame({"code": code.astype(str)}), np.exp(code / 2) + rng.normal(size=8000)
    encoder = EntityEmbeddingEncoder(**FAST | {"hidden_fraction": 0.01}, cross_fit=5)
    vectors, unknown = encoder.fit_transform(X, y), encoder.transform(pd.DataFrame({"code": ["never"]}))
    tree = DecisionTreeRegressor(min_samples_leaf=20).fit(vectors, y)
    like_it = vectors[tree.apply(vectors) == tree.apply(unknown)]
    np.testing.assert_array_equal(like_it, np.repeat(unknown, len(like_it), axis=0))


def test_missing_numbers_that_are_passed_through_can_be_measured(sales):
    X, y = sales
    X = X.assign(area=X["area"].where(X["area"] > 0))
    encoder = EntityEmbeddingEncoder(**FAST, numeric="passthrough")
    vectors = encoder.fit_transform(X, y)
    assert encoder.cross_fit_["scores"]
    area = encoder.get_feature_names_out().tolist().index("area")
    np.testing.assert_array_equal(np.isnan(vectors[:, area]), X["area"].isna())


@pytest.mark.parametrize(
    "parameters", [{"shrinkage": 0.0}, {"embedding_dim": 10, "hidden_layer_sizes": (4,)}], ids=str
)
def test_where_the_loss_does_not_say_where_a_vector_goes_it_stays_bounded(sales, parameters):
    X, y = sales
    encoder = EntityEmbeddingEncoder(**FAST | parameters, cross_fit=5)
    crossed = encoder.fit_transform(X.assign(id=np.arange(len(X)).astype(str)), y)
    assert np.isfinite(crossed).all()
    reach = max(np.abs(part.vectors).max() for part in encoder.embeddings_.values())
    assert np.abs(crossed).max() < 10 * reach
    flat = [
        part.feature_names_out[i]
        for part in encoder.embeddings_.values()
        for i in np.flatnonzero((part.vectors == 0).all(axis=0))
    ]
    names = encoder.get_feature_names_out().tolist()
    assert (crossed[:, [names.index(name) for name in flat]] == 0).all()


def test_a_width_that_was_chosen_is_kept_where_a_column_does_harm():
    rng = np.random.default_rng(1)
    X = pd.DataFrame({"noise": rng.integers(0, 1000, 4000).astype(str)})
    encoder = EntityEmbeddingEncoder(max_epochs=8, max_lr=0.01, embedding_dim={"noise": 3}, random_state=0)
    encoder.fit_transform(X, rng.normal(size=4000))
    assert not encoder.cross_fit_["features"]["noise"]["helps"]
    assert encoder.embeddings_["noise"].embedding_dim == 3
    assert not encoder.embeddings_["noise"].vectors.any()


def test_many_held_out_rows_are_taken_some_at_a_time(sales, monkeypatch):
    X, y = sales
    at_once = EntityEmbeddingEncoder(**FAST)
    at_once.fit_transform(X, y)
    monkeypatch.setattr("embedkit.learning.jackknife.HELD_OUT_BATCH", 97)
    some = EntityEmbeddingEncoder(**FAST)
    some.fit_transform(X, y)
    assert some.cross_fit_["features"] == at_once.cross_fit_["features"]


def test_a_table_that_goes_too_far_helps_with_caution(monkeypatch):
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 20, 1500)
    y = rng.normal(size=20)[shop] + rng.normal(0, 0.5, 1500)
    X = pd.DataFrame({"shop": shop.astype(str), "town": rng.integers(0, 3, 1500).astype(str)})
    encoder = EntityEmbeddingEncoder(**{**FAST, "hidden_layer_sizes": (), "max_epochs": 20}).fit(X, y)
    learned, center = encoder._learned, encoder._learned.projections[0].center
    table = center + 4 * (learned.weights["tables.0"] - center)
    far = replace(learned, weights={**learned.weights, "tables.0": table.astype(np.float32)})
    rows = jackknife.coded_rows(far, encoder._task(X, y, None))
    assert jackknife.find_useless(far, rows, ["shop"]) == []
    monkeypatch.setattr(jackknife, "SCALES", (1.0,))
    assert jackknife.find_useless(far, rows, ["shop"]) == ["shop"]


def test_groups_of_any_type(sales):
    X, y = sales
    town = np.arange(len(X)) % 4
    numbers = EntityEmbeddingEncoder(**FAST, cross_fit=4).fit_transform(X, y, groups=town)
    mixed = np.array([0, 1.5, "a", "b"], dtype=object)[town]
    objects = EntityEmbeddingEncoder(**FAST, cross_fit=4).fit_transform(X, y, groups=mixed)
    np.testing.assert_array_equal(numbers, objects)
    with pytest.raises(InputError, match=r"groups is missing in 500 row\(s\)"):
        EntityEmbeddingEncoder(**FAST).fit_transform(X, y, groups=np.where(town == 1, None, mixed))
    lists = np.fromiter(([name] for name in town), dtype=object)
    with pytest.raises(InputError, match="groups holds what cannot be compared"):
        EntityEmbeddingEncoder(**FAST).fit_transform(X, y, groups=lists)


def test_quick_trees_are_about_as_many_whatever_the_number_of_classes(monkeypatch):
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 60, 3000)
    X, y = pd.DataFrame({"shop": shop.astype(str)}), shop % 40
    grown = []

    def fitted(model, kind, learned_from, test, variance):
        if hasattr(model, "n_estimators") and type(model).__name__.startswith("LGBM"):
            grown.append(model.n_estimators * 40)
        return np.zeros(5)

    monkeypatch.setattr(pilot, "_part_scores", fitted)
    EntityEmbeddingClassifier(**FAST).fit_transform(X, y)
    assert grown
    assert max(grown) <= 4 * 60
