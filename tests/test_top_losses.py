"""Where the network is wrong: rows, and categories by their support."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner
from sklearn.metrics import log_loss

from embedkit import (
    EntityEmbeddingClassifier,
    EntityEmbeddingEncoder,
    EntityEmbeddingRegressor,
    InputError,
    StoreError,
)
from embedkit.cli import main
from embedkit.predictors import load_predictor

FAST = {"hidden_layer_sizes": (16,), "max_epochs": 6, "max_lr": 0.02, "random_state": 0}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    random = np.random.default_rng(0)
    city = random.choice(["Bonn", "Oslo", "Rome"], 400, p=[0.5, 0.45, 0.05])
    return pd.DataFrame({"city": city, "area": random.normal(size=400)})


@pytest.fixture(scope="module")
def regressor(rows: pd.DataFrame) -> EntityEmbeddingRegressor:
    y = rows["city"].map({"Bonn": 1.0, "Oslo": 2.5, "Rome": 4.0}) + 0.1 * rows["area"]
    return EntityEmbeddingRegressor(**FAST).fit(rows, y)


@pytest.fixture(scope="module", params=[2, 3])
def classifier(request: pytest.FixtureRequest, rows: pd.DataFrame) -> EntityEmbeddingClassifier:
    labels = {"Bonn": "low", "Oslo": "mid", "Rome": "mid" if request.param == 2 else "top"}
    return EntityEmbeddingClassifier(**FAST).fit(rows, rows["city"].map(labels))


def test_rows_of_a_regression(regressor: EntityEmbeddingRegressor, rows: pd.DataFrame) -> None:
    X = pd.DataFrame({"city": ["Bonn", "Rome", "Kyiv", None], "area": [0.0, np.nan, 1.0, 2.0]})
    predicted = regressor.predict(X)
    y = predicted + [0.1, -3.0, 0.0, 2.0]
    found = regressor.top_losses(X, y, k=3)
    assert list(found.columns) == ["row", "loss", "target", "prediction", "city", "city_count", "area"]
    assert found["row"].tolist() == [1, 3, 0]
    np.testing.assert_allclose(found["prediction"], predicted[[1, 3, 0]])
    np.testing.assert_allclose(found["target"], y[[1, 3, 0]])
    scale = regressor._learned.heads[0].scale
    np.testing.assert_allclose(found["loss"], 0.5 * (np.array([3.0, 2.0, 0.1]) / scale) ** 2, rtol=1e-9)
    assert found["city"].tolist()[0::2] == ["Rome", "Bonn"]
    assert pd.isna(found["city"][1])
    counts = rows["city"].value_counts()
    assert found["city_count"].tolist() == [counts["Rome"], 0, counts["Bonn"]]


def test_probabilities_carry_the_names_of_the_classes(
    classifier: EntityEmbeddingClassifier, rows: pd.DataFrame
) -> None:
    X, y = rows[:50], np.where(np.arange(50) % 7 == 0, "mid", "low")
    found = classifier.top_losses(X, y, k=50)
    probabilities = classifier.predict_proba(X)[found["row"]]
    for i, label in enumerate(classifier.classes_):
        np.testing.assert_array_equal(found[f"probability_{label}"], probabilities[:, i])
    np.testing.assert_array_equal(found["prediction"], classifier.predict(X)[found["row"]])
    of_target = [row[f"probability_{row['target']}"] for _, row in found.iterrows()]
    np.testing.assert_allclose(found["loss"], -np.log(of_target), rtol=1e-6)
    assert found["loss"].is_monotonic_decreasing


def test_losses_are_those_of_the_training(classifier: EntityEmbeddingClassifier, rows: pd.DataFrame) -> None:
    y = np.where(rows["city"] == "Bonn", "low", "mid")
    found = classifier.top_losses(rows, y, k=len(rows))
    expected = log_loss(y, classifier.predict_proba(rows), labels=classifier.classes_)
    assert found["loss"].mean() == pytest.approx(expected, rel=1e-6)


def test_categories_by_what_they_cost(regressor: EntityEmbeddingRegressor, rows: pd.DataFrame) -> None:
    X = pd.DataFrame({"city": ["Bonn"] * 4 + ["Rome"] * 2 + ["Kyiv"], "area": 0.0})
    y = regressor.predict(X) + np.array([0, 0, 0, 0, 2.0, 2.0, 1.0])
    found = regressor.category_losses(X, y).set_index("category")
    assert found.index.tolist() == ["Rome", "(unknown)", "Bonn"]
    assert found["rows"].tolist() == [2, 1, 4]
    counts = rows["city"].value_counts()
    assert found["count"].tolist()[::2] == [counts["Rome"], counts["Bonn"]]
    unit = 0.5 / regressor._learned.heads[0].scale ** 2
    np.testing.assert_allclose(found["total_loss"], [8 * unit, unit, 0], atol=1e-9)
    np.testing.assert_allclose(found["mean_loss"], [4 * unit, unit, 0], atol=1e-9)
    np.testing.assert_allclose(
        found["excess_loss"], [unit * (8 - 18 / 7), unit * (1 - 9 / 7), unit * (0 - 36 / 7)], atol=1e-9
    )


def test_several_targets_have_their_names(rows: pd.DataFrame) -> None:
    y = pd.DataFrame({"price": rows["area"] * 2, "size": rows["area"] + 1})
    model = EntityEmbeddingRegressor(**FAST).fit(rows, y)
    found = model.top_losses(rows, y, k=2)
    assert {"target_price", "prediction_price", "target_size", "prediction_size"} < set(found.columns)
    errors = (y.to_numpy() - model.predict(rows)) / y.std(ddof=0).to_numpy()
    assert found["loss"][0] == pytest.approx((0.5 * errors**2).sum(axis=1).max(), rel=1e-5)


def test_what_does_not_fit_is_refused(
    regressor: EntityEmbeddingRegressor, classifier: EntityEmbeddingClassifier, rows: pd.DataFrame
) -> None:
    with pytest.raises(InputError, match="k must be a whole number of at least 1, got 0"):
        regressor.top_losses(rows, np.zeros(400), k=0)
    with pytest.raises(InputError, match=r"target is missing or infinite in 1 row\(s\), the first is row 7"):
        regressor.top_losses(rows, np.where(np.arange(400) == 7, np.nan, 1.0))
    with pytest.raises(InputError, match="has the class 'huge' in row 0, which was not learned"):
        classifier.category_losses(rows[:1], ["huge"])


def test_inspect_worst_lists_rows_and_categories(
    classifier: EntityEmbeddingClassifier, rows: pd.DataFrame, tmp_path: Path
) -> None:
    classifier.save(tmp_path / "s.embedkit")
    truth = np.where(rows["city"] == "Rome", "low", "mid")
    rows.assign(y=truth, other=1).to_parquet(tmp_path / "rows.parquet")
    arguments = ["inspect", tmp_path / "s.embedkit", "--worst", tmp_path / "rows.parquet", "--target", "y"]
    done = CliRunner().invoke(main, [str(argument) for argument in [*arguments, "--rows", 3]])
    assert done.exit_code == 0, done.output
    worst = classifier.top_losses(rows, truth, k=3)
    listed = done.stdout.split("Categories")[0].splitlines()[2:]
    assert [int(line.split()[0]) for line in listed] == worst["row"].tolist()
    assert "probability_low" in done.stdout
    assert "excess_loss" in done.stdout


def test_a_stored_encoder_predicts_nothing(rows: pd.DataFrame, tmp_path: Path) -> None:
    EntityEmbeddingEncoder(**FAST).fit(rows, rows["area"]).save(tmp_path / "s")
    with pytest.raises(StoreError, match="holds EntityEmbeddingEncoder, which predicts nothing"):
        load_predictor(tmp_path / "s")


@pytest.mark.parametrize("dtype", [pa.time64("ns"), pa.date32()])
def test_times_that_pandas_cannot_hold(dtype):
    cells = pa.array(np.arange(40) % 2 * 3_660_635).cast(pa.int32() if dtype == pa.date32() else pa.int64())
    X, y = pa.table({"when": cells.cast(dtype)}), np.arange(40) / 7
    regressor = EntityEmbeddingRegressor(["when"], max_epochs=1, max_lr=0.01, random_state=0).fit(X, y)
    texts = regressor.embeddings_["when"].vocabulary.labels()[2:]
    assert set(regressor.top_losses(X, y, 40)["when"]) == set(texts)
    assert set(regressor.category_losses(X, y)["category"]) == set(texts)
    assert regressor.categories_[0].astype(str).tolist() == texts
