"""New categories later: what they learn, and that nothing else changes."""

import copy
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score, roc_auc_score

from embedkit import EntityEmbeddingClassifier, EntityEmbeddingEncoder, EntityEmbeddingRegressor, InputError
from embedkit.learning.losses import row_losses
from embedkit.learning.network import build

FAST = {"hidden_layer_sizes": (32,), "max_epochs": 8, "max_lr": 0.01, "random_state": 0}
NEW = np.array([7, 19, 33, 40])


def sales(n_rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Sales of 41 shops on 5 kinds of day, each with an effect of its own."""
    effects = np.random.default_rng(0)
    by_shop, by_day = effects.normal(size=41), effects.normal(size=5)
    random = np.random.default_rng(seed)
    shop, day = random.integers(41, size=n_rows), random.integers(5, size=n_rows)
    X = pd.DataFrame({"shop": shop, "day": np.array(list("abcde"))[day], "area": random.normal(size=n_rows)})
    return X, by_shop[shop] + by_day[day] + 0.3 * X["area"].to_numpy() + random.normal(0, 0.3, n_rows)


@pytest.fixture(scope="module")
def old_rows() -> tuple[pd.DataFrame, np.ndarray]:
    X, y = sales(3000, 1)
    known = ~X["shop"].isin(NEW).to_numpy()
    return X[known], y[known]


@pytest.fixture(scope="module")
def new_rows() -> tuple[pd.DataFrame, np.ndarray]:
    return sales(1500, 2)


@pytest.fixture(scope="module")
def fitted(old_rows) -> EntityEmbeddingRegressor:
    """Never extended itself."""
    return EntityEmbeddingRegressor(["shop", "day"], **FAST).fit(*old_rows)


def test_new_categories_are_predicted_and_old_ones_stay_to_the_bit(fitted, new_rows) -> None:
    before, model = fitted, copy.deepcopy(fitted)
    assert model.extend(*new_rows) is model
    test, y = sales(4000, 3)
    fresh = test["shop"].isin(NEW).to_numpy()
    for name in ("transform", "predict"):
        old, new = (getattr(estimator, name)(test[~fresh]) for estimator in (before, model))
        np.testing.assert_array_equal(new, old)
    assert r2_score(y[fresh], before.predict(test[fresh])) < 0.6
    assert r2_score(y[fresh], model.predict(test[fresh])) > 0.85

    old, new = before.embeddings_["shop"], model.embeddings_["shop"]
    assert new.categories.to_pylist() == list(range(41))
    is_new = np.concatenate([[False, False], np.isin(np.arange(41), NEW)])
    np.testing.assert_array_equal(new.vectors[~is_new], old.vectors)
    np.testing.assert_array_equal(new.counts[~is_new], old.counts)
    assert new.counts[is_new].tolist() == [(new_rows[0]["shop"] == shop).sum() for shop in NEW]
    assert model.embeddings_["day"].equals(before.embeddings_["day"])
    layers = [name for name in before._learned.weights if name.startswith("layers")]
    for name in layers:
        np.testing.assert_array_equal(model._learned.weights[name], before._learned.weights[name])


def test_new_vectors_are_where_those_of_a_full_training_would_be(fitted, new_rows) -> None:
    """Distances on canonical axes: a new shop is near the old shops that sell as much."""
    model = copy.deepcopy(fitted).extend(*new_rows)
    effects = np.random.default_rng(0).normal(size=41)
    table = model.embeddings_["shop"]
    vectors = table.vectors[2:, 0]
    sign = np.sign(np.corrcoef(vectors, effects)[0, 1])
    old = np.setdiff1d(np.arange(41), NEW)
    slope, shift = np.polyfit(effects[old], sign * vectors[old], 1)
    error = np.abs(sign * vectors[NEW] - (slope * effects[NEW] + shift)) / slope
    assert error.max() < 0.5  # in units of effects, which spread by 1


def test_the_solution_is_the_lowest_penalised_loss(fitted, new_rows) -> None:
    import torch

    X, y = new_rows
    model = copy.deepcopy(fitted).extend(X, y)
    state, shop = model._learned, 19
    rows = (X["shop"] == shop).to_numpy()
    network = build(state.shape, state.weights)
    codes = np.stack([part.encode(X[part.feature]) for part in state.tables], axis=1)[rows]
    numeric = torch.tensor(state.inputs.transform(X[["area"]].to_numpy()[rows]), dtype=torch.float64)
    targets = torch.as_tensor(state.heads[0].encode(y[rows]))[:, None]
    code = codes[0, 0]

    def loss(vector: np.ndarray) -> float:
        embedded = network.lookup(torch.as_tensor(codes)).clone()
        embedded[:, : len(vector)] = torch.as_tensor(vector)
        losses = row_losses(state.heads, network(embedded, numeric), targets, torch.tensor(state.noise))
        return float(losses.sum() + state.projections[0].precision / 2 * (vector**2).sum())

    found = state.weights["tables.0"][code]
    with torch.no_grad():
        lowest = loss(found)
        for step in np.random.default_rng(0).normal(0, 0.05, size=(50, len(found))).astype(np.float32):
            assert loss(found + step) > lowest - 1e-3


def test_published_vectors_of_old_rows_follow_from_the_stored_map(fitted) -> None:
    state = fitted._learned
    for i, (part, projection) in enumerate(zip(state.tables, state.projections, strict=True)):
        raw = state.weights[f"tables.{i}"].astype(np.float64)
        np.testing.assert_array_equal(
            ((raw - projection.center) @ projection.rotation).astype(np.float32), part.learned_vectors
        )


def test_a_stored_estimator_is_extended_like_the_one_in_memory(fitted, new_rows, tmp_path: Path) -> None:
    model = copy.deepcopy(fitted)
    assert model.save(tmp_path / "s") == "v000001"
    loaded = EntityEmbeddingRegressor.load(tmp_path / "s").extend(*new_rows)
    np.testing.assert_array_equal(
        loaded.transform(new_rows[0]), model.extend(*new_rows).transform(new_rows[0])
    )
    assert loaded.save(tmp_path / "s") == "v000002"
    again = EntityEmbeddingRegressor.load(tmp_path / "s")
    np.testing.assert_array_equal(again.predict(new_rows[0]), model.predict(new_rows[0]))


def test_nothing_new_changes_nothing(fitted, old_rows) -> None:
    before, model = fitted, copy.deepcopy(fitted)
    assert model.extend(*old_rows).embeddings_.equals(before.embeddings_)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(["Rome", "Oslo", "Kyiv", "Bonn", None]), min_size=1, max_size=12))
def test_any_new_values_join_the_vocabulary(cities: list[str | None]) -> None:
    X = pd.DataFrame({"city": ["Bonn", "Oslo"] * 10})
    model = EntityEmbeddingEncoder(embedding_dim=2, **FAST).fit(X, [0.0, 1.5] * 10)
    before = model.embeddings_["city"]
    model.extend(pd.DataFrame({"city": pd.Series(cities, dtype=object)}), np.arange(len(cities)) / 2)
    after = model.embeddings_["city"]
    assert after.categories.to_pylist() == sorted({"Bonn", "Oslo", *cities} - {None})
    for city in (None, "Bonn", "Oslo", "elsewhere"):
        np.testing.assert_array_equal(after.vector(city), before.vector(city))


@pytest.mark.parametrize("values", [["Rome", "Oslo"], [7, 5]])
def test_a_column_that_had_no_value_takes_the_type_of_its_first(values: list) -> None:
    X = pd.DataFrame({"city": pd.Series([None] * 20, dtype=object), "shop": ["a", "b"] * 10})
    model = EntityEmbeddingEncoder(**FAST).fit(X, [0.0, 1.5] * 10)
    model.extend(pd.DataFrame({"city": values * 10, "shop": "a"}), [0.0, 1.5] * 10)
    assert model.embeddings_["city"].categories.to_pylist() == sorted(values)
    assert np.isfinite(model.transform(pd.DataFrame({"city": values, "shop": "b"}))).all()


def test_targets_of_rows_of_weight_0_are_not_read(fitted, old_rows) -> None:
    X, y = old_rows[0][:5].assign(shop=99), old_rows[1][:5].copy()
    expected = copy.deepcopy(fitted).extend(X[:4], y[:4]).embeddings_["shop"].vectors
    y[4] = np.nan
    found = copy.deepcopy(fitted).extend(X, y, [1, 1, 1, 1, 0]).embeddings_["shop"].vectors
    np.testing.assert_array_equal(found, expected)


def test_classes_weights_and_rare_values() -> None:
    random = np.random.default_rng(0)
    city = random.choice(["Bonn", "Oslo"], 600)
    model = EntityEmbeddingClassifier(min_frequency=3, **FAST)
    model.fit(
        pd.DataFrame({"city": city}), np.where(random.random(600) < 0.9, city == "Oslo", city == "Bonn")
    )
    X = pd.DataFrame({"city": ["Rome"] * 60 + ["Kyiv"] * 60 + ["Lima"] * 2 + ["Cork"] * 5})
    y = np.arange(127) % 10 < np.where(X["city"] == "Rome", 9, 1)
    weights = np.where(X["city"] == "Cork", 0.0, 1.5)
    model.extend(X, y, weights)
    table = model.embeddings_["city"]
    assert table.categories.to_pylist() == [
        "Bonn",
        "Kyiv",
        "Lima",
        "Oslo",
        "Rome",
    ]  # 2 rows of weight 1.5 are 3
    assert table.counts[[3, 4, 6]].tolist() == [90.0, 3.0, 90.0]
    assert roc_auc_score(y[:120], model.predict_proba(X[:120])[:, 1]) == pytest.approx(0.9, abs=0.02)


def test_what_does_not_fit_is_refused(fitted, old_rows) -> None:
    model = copy.deepcopy(fitted)
    X, y = old_rows[0][:5], old_rows[1][:5]
    with pytest.raises(InputError, match=r"column 'shop' was int64 when learned, is .*string now"):
        model.extend(X.assign(shop=X["shop"].astype(str)), y)
    with pytest.raises(InputError, match="y contains NaN"):
        model.extend(X.assign(shop=99), np.full(5, np.nan))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.extend(X, y[:3])
    with pytest.raises(InputError, match=r"y must have 1 target\(s\), found 2"):
        model.extend(X, np.stack([y, y], axis=1))
    labels = EntityEmbeddingClassifier(**FAST).fit(pd.DataFrame({"c": ["a", "b"] * 9}), ["no", "yes"] * 9)
    with pytest.raises(InputError, match="target 'y' has the class 'maybe' in row 1, which was not learned"):
        labels.extend(pd.DataFrame({"c": ["c", "d"]}), ["no", "maybe"])


def test_no_more_categories_than_may_be_kept(old_rows, new_rows) -> None:
    model = EntityEmbeddingRegressor(["shop", "day"], max_categories=39, **FAST).fit(*old_rows)
    X, y = new_rows
    often = pd.concat([X, X[X["shop"] == NEW[2]]])
    model.extend(often, np.concatenate([y, y[X["shop"] == NEW[2]]]))
    shops = model.embeddings_["shop"].categories.to_pylist()
    assert len(shops) == 39
    assert NEW[2] in shops
    full = EntityEmbeddingRegressor(["shop", "day"], max_categories=3, **FAST).fit(*old_rows)
    before = full.transform(X)
    np.testing.assert_array_equal(full.extend(X, y).transform(X), before)


def test_new_values_that_the_learned_type_cannot_hold_are_named(old_rows) -> None:
    X, y = old_rows
    model = EntityEmbeddingRegressor(["shop", "day"], **FAST).fit(X, y)
    halves = X.assign(shop=pd.Series([Decimal("1.5")] * len(X), index=X.index, dtype=object))
    with pytest.raises(
        InputError, match="column 'shop' was int64 when learned and has new values that do not fit"
    ):
        model.extend(halves, y)
