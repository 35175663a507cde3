"""Estimators in a stored set: as they were, to the bit."""

import numpy as np
import pandas as pd
import pytest

from embedkit import (
    EmbeddingSet,
    EntityEmbeddingClassifier,
    EntityEmbeddingEncoder,
    EntityEmbeddingRegressor,
    StoreError,
    archive,
    store,
)

FAST = {"hidden_layer_sizes": (8,), "max_epochs": 2, "max_lr": 0.01, "random_state": 0}


@pytest.fixture(scope="module")
def flights():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {
            "carrier": rng.choice(["AA", "DL", "UA"], 90),
            "hour": rng.integers(5, 24, 90),
            "far": rng.choice([True, False], 90),
            "distance": rng.normal(1000, 300, 90),
        }
    )
    X.loc[::9, ["carrier", "distance"]] = None
    return X


def targets(n=90):
    number = np.arange(n) % 3
    return {
        "numbers": number + 0.25,
        "several numbers": np.column_stack([number, number**2 + 0.5]),
        "text": np.array(["no", "yes", "perhaps"])[number],
        "integers": number - 1,
        "floats": number + 0.0,
        "booleans": number == 1,
        "classes of several kinds": pd.DataFrame(
            {"a": number, "b": np.array(["x", "y", "z"])[number], "c": number > 1}
        ),
    }


def round_trip(model, X, root):
    model.save(root)
    again = type(model).load(root)
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    assert again.embeddings_.equals(model.embeddings_)
    assert again.history_ == model.history_
    assert (again.n_iter_, again.best_iter_, again.max_lr_) == (
        model.n_iter_,
        model.best_iter_,
        model.max_lr_,
    )
    assert again.get_feature_names_out().tolist() == model.get_feature_names_out().tolist()
    return again


@pytest.mark.parametrize("name", ["numbers", "several numbers"])
def test_regressors(flights, tmp_path, name):
    model = EntityEmbeddingRegressor(["hour"], **FAST).fit(flights, targets()[name])
    again = round_trip(model, flights, tmp_path / "set")
    np.testing.assert_array_equal(again.predict(flights), model.predict(flights))


@pytest.mark.parametrize("name", ["text", "integers", "floats", "booleans", "classes of several kinds"])
def test_classifiers(flights, tmp_path, name):
    model = EntityEmbeddingClassifier(["hour"], **FAST).fit(flights, targets()[name])
    again = round_trip(model, flights, tmp_path / "set")
    np.testing.assert_array_equal(again.predict(flights), model.predict(flights))
    assert again.predict(flights).dtype == model.predict(flights).dtype
    many = isinstance(model.classes_, list)
    for found, expected in zip(
        again.classes_ if many else [again.classes_],
        model.classes_ if many else [model.classes_],
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    np.testing.assert_array_equal(
        np.hstack(again.predict_proba(flights)), np.hstack(model.predict_proba(flights))
    )


@pytest.mark.parametrize("name", targets())
def test_encoders(flights, tmp_path, name):
    model = EntityEmbeddingEncoder(**FAST).fit(flights, targets()[name])
    round_trip(model, flights, tmp_path / "set")


def test_an_encoder_of_arrays(flights, tmp_path):
    X = flights[["carrier", "hour"]].to_numpy()
    model = EntityEmbeddingClassifier(**FAST).fit(X, targets()["text"])
    again = round_trip(model, X, tmp_path / "set")
    assert not hasattr(again, "feature_names_in_")
    assert again.n_features_in_ == 2
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_parameters_come_back_and_those_that_json_cannot_hold_are_the_default(flights, tmp_path):
    y = targets()["numbers"]
    settings = {**FAST, "random_state": np.random.RandomState(0), "embedding_dim": lambda n: 2}
    model = EntityEmbeddingEncoder(np.array(["hour"]), shrinkage=np.float32(0.5), **settings).fit(flights, y)
    model.save(tmp_path / "set")
    parameters = EntityEmbeddingEncoder.load(tmp_path / "set").get_params()
    assert parameters["categorical_features"] == ["hour"]
    assert (parameters["shrinkage"], parameters["max_lr"]) == (0.5, 0.01)
    assert (parameters["embedding_dim"], parameters["random_state"]) == ("auto", None)
    again = EntityEmbeddingEncoder.load(tmp_path / "set").fit(flights, y)
    assert again.transform(flights).shape[0] == 90


def test_a_loaded_estimator_saves_the_same_set_and_says_who_learned_it(flights, tmp_path, monkeypatch):
    model = EntityEmbeddingRegressor(**FAST).fit(flights, targets()["numbers"])
    model.save(tmp_path / "set")
    monkeypatch.setattr(archive.importlib.metadata, "version", lambda name: "another version")
    again = EntityEmbeddingRegressor.load(tmp_path / "set")
    assert again.embeddings_.metadata == model.embeddings_.metadata
    again.save(tmp_path / "copy")
    assert EntityEmbeddingRegressor.load(tmp_path / "copy").embeddings_.equals(model.embeddings_)


def test_a_version_can_be_named(flights, tmp_path):
    y = targets()["numbers"]
    first = EntityEmbeddingRegressor(**FAST).fit(flights, y)
    second = EntityEmbeddingRegressor(**{**FAST, "random_state": 1}).fit(flights, y)
    versions = [first.save(tmp_path / "set"), second.save(tmp_path / "set")]
    for version, model in zip(versions, (first, second), strict=True):
        loaded = EntityEmbeddingRegressor.load(tmp_path / "set", version)
        np.testing.assert_array_equal(loaded.predict(flights), model.predict(flights))


def test_the_range_test_is_stored(flights, tmp_path):
    model = EntityEmbeddingEncoder(**{**FAST, "max_lr": "auto", "max_epochs": 400}).fit(
        flights, targets()["numbers"]
    )
    model.save(tmp_path / "set")
    import io

    table = pd.read_parquet(io.BytesIO(store.read_attachment(tmp_path / "set", archive.LR_FINDER)))
    np.testing.assert_array_equal(table["lr"], model.lr_finder_.lrs)
    np.testing.assert_array_equal(table["loss"], model.lr_finder_.losses)


def test_another_kind_is_named(flights, tmp_path):
    model = EntityEmbeddingRegressor(**FAST).fit(flights, targets()["numbers"])
    model.save(tmp_path / "set")
    with pytest.raises(StoreError, match="holds EntityEmbeddingRegressor, not EntityEmbeddingClassifier"):
        EntityEmbeddingClassifier.load(tmp_path / "set")
    EmbeddingSet(model.embeddings_.values()).save(tmp_path / "tables")
    with pytest.raises(StoreError, match="holds embeddings only, not EntityEmbeddingRegressor"):
        EntityEmbeddingRegressor.load(tmp_path / "tables")


def test_damaged_weights_are_refused(flights, tmp_path):
    EntityEmbeddingRegressor(**FAST).fit(flights, targets()["numbers"]).save(tmp_path / "set")
    (path,) = (tmp_path / "set").rglob(archive.WEIGHTS)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=archive.WEIGHTS):
        EntityEmbeddingRegressor.load(tmp_path / "set")
