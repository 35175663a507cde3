"""The contract with scikit-learn."""

import inspect
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from embedkit import (
    EntityEmbeddingClassifier,
    EntityEmbeddingEncoder,
    EntityEmbeddingRegressor,
    InputError,
    PretrainedEmbeddingEncoder,
    roles,
)
from embedkit.learning import fit as fit_module
from embedkit.roles import Roles

FAST = {"hidden_layer_sizes": (8,), "max_epochs": 2, "max_lr": 0.01, "random_state": 0}
WELL = {"hidden_layer_sizes": (16,), "max_epochs": 20, "max_lr": 0.03, "random_state": 0}
LEARNERS = [EntityEmbeddingEncoder, EntityEmbeddingClassifier, EntityEmbeddingRegressor]


def pretrained(name="x0"):
    """An encoder from a set whose one column is the first of an array, or of a frame of scikit-learn's."""
    numbers = np.round(np.random.default_rng(0).normal(size=(40, 1)), 1)
    learned = EntityEmbeddingEncoder([name], embedding_dim=2, **FAST)
    return PretrainedEmbeddingEncoder(
        learned.fit(pd.DataFrame(numbers, columns=[name]), numbers > 0).embeddings_
    )


ESTIMATORS = [kind(**FAST) for kind in LEARNERS] + [pretrained()]


@pytest.fixture
def shops():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "city": rng.choice(["Bonn", "Oslo", "Rome"], 120),
            "open": rng.choice([True, False], 120),
            "area": rng.normal(100, 20, 120),
        }
    )
    return frame, np.where(frame["city"] == "Rome", "high", "low")


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


# Its checks fit frames and transform arrays, and the other way round.
@pytest.mark.filterwarnings("ignore:X has feature names")
@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
@pytest.mark.parametrize(
    "check",
    [
        "check_transformer_get_feature_names_out",
        "check_transformer_get_feature_names_out_pandas",
        "check_set_output_transform",
        "check_set_output_transform_pandas",
        "check_set_output_transform_polars",
        "check_global_output_transform_pandas",
        "check_global_set_output_transform_polars",
        "check_dataframe_column_names_consistency",
    ],
)
def test_scikit_learn_checks_of_names_and_output(estimator, check, monkeypatch):
    # The checks' frames hold numbers only, which are categories for once.
    monkeypatch.setattr(roles, "column_roles", lambda table, _: Roles(tuple(table.column_names), ()))
    if isinstance(estimator, PretrainedEmbeddingEncoder):
        estimator = pretrained("col_0" if "consistency" in check else "col0")
    getattr(estimator_checks, check)(type(estimator).__name__, clone(estimator))


def test_output_goes_to_the_frame_that_is_asked_for(shops):
    X, y = shops
    encoder = EntityEmbeddingEncoder(embedding_dim=2, **FAST).fit(X, y)
    names = ["city_0", "city_1", "open_0", "open_1", "area"]
    assert encoder.get_feature_names_out().tolist() == names
    plain = encoder.transform(X)
    pandas = encoder.set_output(transform="pandas").transform(X)
    polars = encoder.set_output(transform="polars").transform(pl.from_pandas(X))
    assert (list(pandas.columns), polars.columns) == (names, names)
    np.testing.assert_array_equal(pandas, plain)
    np.testing.assert_array_equal(polars, plain)


@pytest.mark.parametrize("kind", LEARNERS)
def test_fit_transform_is_fit_then_transform(shops, kind):
    X, y = shops
    y = (y == "high").astype(int)
    np.testing.assert_array_equal(kind(**FAST).fit_transform(X, y), kind(**FAST).fit(X, y).transform(X))


def test_pandas_polars_arrow_and_order_of_rows_do_not_matter(shops):
    X, y = shops
    expected = EntityEmbeddingEncoder(**FAST).fit(X, y)
    order = np.random.default_rng(0).permutation(len(X))
    for frame, labels in [
        (pl.from_pandas(X), pl.Series(y)),
        (pl.from_pandas(X).to_arrow(), list(y)),
        (X.iloc[order], pd.Series(y).iloc[order]),
    ]:
        found = EntityEmbeddingEncoder(**FAST).fit(frame, labels)
        np.testing.assert_array_equal(found.transform(X), expected.transform(X))


def test_grid_search_over_a_pipeline(shops):
    X, y = shops
    pipeline = make_pipeline(EntityEmbeddingEncoder(**WELL), KNeighborsClassifier(5))
    grid = {"entityembeddingencoder__embedding_dim": [1, 2]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X, y)
    assert search.best_score_ > 0.9
    assert search.predict(X[:3]).shape == (3,)


def test_column_transformer_over_frame_and_array(shops):
    X, y = shops
    by_name = ColumnTransformer(
        [("e", EntityEmbeddingEncoder(**FAST), ["city", "open"])], remainder="passthrough"
    )
    out = by_name.set_output(transform="pandas").fit_transform(X, y)
    assert out.columns[-1] == "remainder__area"
    assert out.columns[0] == "e__city_0"
    by_position = ColumnTransformer([("e", EntityEmbeddingEncoder(**FAST), [1])], remainder="drop")
    encoded = by_position.fit_transform(X[["open", "city"]].to_numpy(dtype=object), y)
    assert encoded.shape == (120, len(by_position.get_feature_names_out()))
    np.testing.assert_array_equal(
        encoded, EntityEmbeddingEncoder(**FAST).fit(X[["city"]], y).transform(X[["city"]])
    )


def test_forest_learns_from_the_vectors(shops):
    X, y = shops
    model = make_pipeline(EntityEmbeddingEncoder(**WELL), RandomForestClassifier(5, random_state=0))
    assert model.fit(X[:90], y[:90]).score(X[90:], y[90:]) > 0.9


def test_weights_are_routed_through_a_pipeline(shops):
    X, y = shops
    weights = (np.arange(len(X)) % 2).astype(float)
    with sklearn.config_context(enable_metadata_routing=True):
        encoder = EntityEmbeddingEncoder(**FAST).set_fit_request(sample_weight=True)
        forest = RandomForestClassifier(2, random_state=0).set_fit_request(sample_weight=False)
        routed = Pipeline([("encoder", encoder), ("forest", forest)]).fit(X, y, sample_weight=weights)
    half = EntityEmbeddingEncoder(**FAST).fit(X[1::2], y[1::2])
    np.testing.assert_array_equal(routed[0].transform(X), half.transform(X))


@pytest.mark.parametrize("kind", LEARNERS)
def test_pickle_round_trip(shops, kind):
    X, y = shops
    y = (y == "high").astype(int)
    model = kind(**FAST).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    if hasattr(model, "predict"):
        np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_a_pickled_encoder_transforms_where_there_is_no_torch(shops, tmp_path):
    X, y = shops
    model = EntityEmbeddingEncoder(**{**FAST, "max_lr": "auto", "max_epochs": 300}).fit(X, y)
    assert model.lr_finder_ is not None
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, X)))
    code = """
import pickle, sys
import numpy as np
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("no torch here")
sys.meta_path.insert(0, NoTorch())
model, X = pickle.load(open("model.pickle", "rb"))
np.save("out.npy", model.transform(X))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), model.transform(X))


def test_without_torch_fit_and_predict_name_the_extra(shops, monkeypatch):
    X, y = shops
    model = EntityEmbeddingClassifier(**FAST).fit(X, y)
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (lambda: EntityEmbeddingEncoder(**FAST).fit(X, y), lambda: model.predict(X)):
        with pytest.raises(ImportError, match=r'pip install "\.\[train\]"'):
            call()


def test_unknown_and_missing_categories_have_vectors(shops):
    X, y = shops
    model = EntityEmbeddingClassifier(embedding_dim=2, **FAST).fit(X, y)
    odd = pd.DataFrame({"city": ["Atlantis", None], "open": [None, True], "area": [np.nan, 1.0]})
    out = model.transform(odd)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[0, :2], model.embeddings_["city"].vectors[1])
    np.testing.assert_array_equal(out[1, :2], model.embeddings_["city"].vectors[0])
    assert np.isfinite(model.predict_proba(odd)).all()


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_mixed_columns_stay_text_in_a_batch_that_is_not_mixed():
    mixed = pd.DataFrame({"code": pd.Series(["x", 1, 2, "y"] * 20, dtype=object)})
    encoder = EntityEmbeddingEncoder(embedding_dim=2, **FAST).fit(mixed, [0, 1, 2, 3] * 20)
    pretrained = PretrainedEmbeddingEncoder(encoder.embeddings_)
    for batch in (mixed[1:3], mixed[1:3].to_numpy()):
        np.testing.assert_array_equal(encoder.transform(batch), encoder.transform(mixed)[1:3])
        np.testing.assert_array_equal(pretrained.fit_transform(batch), encoder.transform(mixed)[1:3])


def test_a_record_batch_is_a_frame(shops):
    X, y = shops
    encoder = EntityEmbeddingEncoder(**FAST).fit(pa.RecordBatch.from_pandas(X, preserve_index=False), y)
    assert encoder.feature_names_in_.tolist() == list(X.columns)
    np.testing.assert_array_equal(encoder.transform(X), EntityEmbeddingEncoder(**FAST).fit(X, y).transform(X))
    swapped = pa.RecordBatch.from_pandas(X[X.columns[::-1]], preserve_index=False)
    with pytest.raises(ValueError, match="same order"):
        encoder.transform(swapped)


def test_large_ids_in_a_frame_without_names_stay_different():
    ids = 2**53 + np.arange(60) % 5
    whole = pd.DataFrame({0: ids, 1: np.arange(60) % 2 / 2})
    missing = pd.DataFrame({0: pd.array([*ids, None], dtype="Int64"), 1: 1})
    unsigned = pd.DataFrame({0: ids.astype(np.uint64), 1: -ids})
    for frame in (whole, missing, unsigned, whole.to_numpy(dtype=object).tolist()):
        encoder = EntityEmbeddingEncoder(**FAST).fit(frame, np.arange(len(frame)))
        assert encoder.categories_[0].tolist() == sorted(set(ids.tolist()))
        assert encoder.embeddings_["x0"].counts[2:].tolist() == [12] * 5
        assert encoder.transform(frame).shape == (len(frame), len(encoder.get_feature_names_out()))


def test_names_of_numpy_are_names(shops, tmp_path):
    X, y = shops
    expected = EntityEmbeddingEncoder(**FAST).fit(X, y)
    renamed = X.set_axis(pd.Index(list(map(np.str_, X.columns)), dtype=object), axis=1)
    learned = EntityEmbeddingEncoder(**FAST).fit(renamed, y)
    np.testing.assert_array_equal(learned.transform(renamed), expected.transform(X))
    assert list(learned.feature_names_in_) == list(X.columns)
    learned.save(tmp_path / "set")
    np.testing.assert_array_equal(
        EntityEmbeddingEncoder.load(tmp_path / "set").transform(renamed), expected.transform(X)
    )


def test_targets_of_a_record_batch_have_names(shops):
    X, _ = shops
    y = pa.record_batch({"low": X["area"], "high": 1000 - 10 * X["area"]})
    learned = EntityEmbeddingRegressor(**FAST).fit(X, y)
    assert [head.name for head in learned._learned.heads] == ["low", "high"]


def test_columns_of_a_frame_without_names_are_what_their_types_say(shops):
    X, y = shops
    encoder = EntityEmbeddingEncoder(**FAST).fit(X.set_axis(range(X.shape[1]), axis=1), y)
    named = EntityEmbeddingEncoder(**FAST).fit(X, y)
    assert [f"x{X.columns.get_loc(name)}" for name in named.embeddings_] == list(encoder.embeddings_)
    assert len(encoder.embeddings_.numerics) == len(named.embeddings_.numerics) == 1


@pytest.mark.parametrize("far", [1e39, -1e300])
def test_a_number_far_out_does_not_break_the_network(shops, far):
    X, y = shops
    model = EntityEmbeddingClassifier(**FAST).fit(X, y)
    found = model.predict_proba(X.assign(area=far))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_names_of_what_comes_out_are_made_of_names_given_for_an_array(shops):
    X, y = shops
    array = X[["city", "open"]].to_numpy(dtype=object)
    learned = EntityEmbeddingEncoder(embedding_dim=2, **FAST).fit(array, y)
    assert list(learned.get_feature_names_out()) == ["x0_0", "x0_1", "x1_0", "x1_1"]
    assert list(learned.get_feature_names_out(np.array(["a", "b"]))) == ["a_0", "a_1", "b_0", "b_1"]
    for names in (["a"], ["a", "b", "c"], "ab", 3):
        with pytest.raises(InputError, match=r"length equal to number of features \(2\), got"):
            learned.get_feature_names_out(names)
    named = EntityEmbeddingEncoder(embedding_dim=2, **FAST).fit(X[["city", "open"]], y)
    with pytest.raises(InputError, match="input_features is not equal to feature_names_in_"):
        named.get_feature_names_out(["open", "city"])
    stored = PretrainedEmbeddingEncoder(named.embeddings_).fit(array)  # its columns have names
    assert list(stored.get_feature_names_out(["a", "b"])) == ["city_0", "city_1", "open_0", "open_1"]


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_an_array_after_a_frame_has_the_columns_of_the_frame(shops):
    X, y = shops
    encoder = EntityEmbeddingEncoder(**FAST).fit(X[["city"]], y)
    np.testing.assert_array_equal(encoder.transform(X[["city"]].to_numpy()), encoder.transform(X[["city"]]))


def test_a_second_fit_forgets_the_first(shops):
    X, y = shops
    encoder = EntityEmbeddingEncoder(**FAST).fit(X, y)
    assert encoder.classes_.tolist() == ["high", "low"]
    assert not hasattr(encoder.fit(X.to_numpy(), np.arange(120.0)), "classes_")
    assert not hasattr(encoder, "feature_names_in_")


@pytest.mark.parametrize("method", ["fit", "fit_transform"])
def test_a_fit_that_fails_leaves_what_an_earlier_one_learned(shops, method):
    X, _ = shops
    regressor = EntityEmbeddingRegressor(**FAST).fit(X, X["area"])
    before, seen = regressor.predict(X), dict(vars(regressor))
    swapped = X[["open", "city"]].assign(more="x")
    with pytest.raises(InputError, match="one class or value only"):
        getattr(regressor, method)(swapped, np.ones(len(X)))
    assert vars(regressor) == seen
    np.testing.assert_array_equal(regressor.predict(X), before)


def test_rows_in_lists_keep_the_types_of_their_cells(shops):
    X, y = shops
    classifier = EntityEmbeddingClassifier(**FAST).fit(X, y)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        found = classifier.predict_proba(X[:1].to_numpy(dtype=object).tolist())
    np.testing.assert_array_equal(found, classifier.predict_proba(X[:1]))
    encoder = EntityEmbeddingEncoder(**FAST).fit([["a", "x"], ["b", float("nan")]] * 50, [1.0, 2.0] * 50)
    assert encoder.embeddings_["x1"].categories.to_pylist() == ["x"]


def test_the_state_of_torch_in_a_program_does_not_matter(shops):
    X, y = shops
    expected = EntityEmbeddingClassifier(**FAST).fit(X, y).predict_proba(X)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            found = EntityEmbeddingClassifier(**FAST).fit(X, y)
            found.extend(X.assign(city=X["city"].replace("Rome", "Roma")), y)
            assert torch.get_default_dtype() == torch.float64
        np.testing.assert_array_equal(EntityEmbeddingClassifier(**FAST).fit(X, y).predict_proba(X), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_subclass_may_have_parameters_of_its_own(shops):
    class Narrow(EntityEmbeddingEncoder):
        def __init__(self, units=8, random_state=0):
            super().__init__(hidden_layer_sizes=units, max_epochs=1, random_state=random_state)
            self.units = units

    X, y = shops
    expected = EntityEmbeddingEncoder(hidden_layer_sizes=8, max_epochs=1, random_state=0).fit_transform(X, y)
    np.testing.assert_array_equal(clone(Narrow()).fit_transform(X, y), expected)


def test_several_targets(shops):
    X, y = shops
    number = np.arange(120) % 3
    labels = pd.DataFrame({"price": y, "size": number, "open": X["open"]})
    model = EntityEmbeddingClassifier(**FAST).fit(X, labels)
    assert [list(classes) for classes in model.classes_] == [["high", "low"], [0, 1, 2], [False, True]]
    predicted = model.predict(X)
    assert predicted.shape == (120, 3)
    assert isinstance(predicted[0, 0], str)
    assert set(predicted[:, 1]) <= {0, 1, 2}
    assert [p.shape for p in model.predict_proba(X)] == [(120, 2), (120, 3), (120, 2)]
    numbers = EntityEmbeddingRegressor(**FAST).fit(X, np.column_stack([number, -100.0 * number]))
    assert numbers.predict(X).shape == (120, 2)


def test_probabilities_are_in_the_order_of_classes():
    X = pd.DataFrame({"k": ["a", "b", "c"] * 60})
    labels = np.array(["zebra", "ant", "moose"])[np.arange(180) % 3]
    model = EntityEmbeddingClassifier(random_state=0).fit(X, labels)
    assert model.classes_.tolist() == ["ant", "moose", "zebra"]
    p = model.predict_proba(X[:3])
    assert p.argmax(axis=1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert model.predict(X[:3]).tolist() == ["zebra", "ant", "moose"]
    binary = EntityEmbeddingClassifier(random_state=0).fit(X, labels == "ant")
    assert (binary.predict_proba(X[:3])[:, 1] > 0.5).tolist() == [False, True, False]


def test_the_pretrained_encoder_is_the_live_one(shops, tmp_path):
    X, y = shops
    live = EntityEmbeddingEncoder(categorical_features=["city"], **FAST).fit(X, y)
    live.save(tmp_path / "shops.embedkit")
    stored = PretrainedEmbeddingEncoder(tmp_path / "shops.embedkit")
    np.testing.assert_array_equal(stored.fit_transform(X), live.transform(X))
    np.testing.assert_array_equal(stored.transform(X[:5]), live.transform(X[:5]))
    only_city = stored.fit_transform(X[["city"]])
    np.testing.assert_array_equal(only_city, live.transform(X)[:, : only_city.shape[1]])
    array = X[["city", "open"]].to_numpy()
    np.testing.assert_array_equal(stored.fit(array).transform(array), live.transform(X)[:, :-1])
    with pytest.raises(InputError, match="none of the columns"):
        stored.fit(pd.DataFrame({"town": ["Rome"]}))


BAD = {
    "max_epochs": (0, "max_epochs"),
    "batch_size": (1, "batch_size"),
    "dropout": (1.0, "dropout"),
    "max_lr": ("fast", "max_lr"),
    "numeric": ("log", "numeric must be one of"),
    "target_type": ("ordinal", "target_type"),
    "schedule": ("warmup", "warmup"),
    "embedding_dim": (0, "embedding_dim"),
    "device": ("abacus", "device"),
    "hidden_layer_sizes": (("wide",), "hidden_layer_sizes"),
    "embedding_dropout": ("some", "embedding_dropout"),
    "weight_decay": (None, "weight_decay"),
    "schedule_options": ({"max_lr": 0.1}, "schedule_options cannot set max_lr: use the parameters"),
    "shrinkage": (-1.0, "shrinkage"),
    "validation_fraction": (0.0, "validation_fraction"),
    "categorical_features": ("city", "from_dtype"),
}


@pytest.mark.parametrize("X", [{"city": np.array([1 + 2j, 3j])}, {"city": np.array([1, 2], np.longdouble)}])
def test_a_column_that_arrow_cannot_hold_is_named(X):
    with pytest.raises(InputError, match=r"column 'city' cannot be read .*: cast it to numbers or text"):
        EntityEmbeddingEncoder(**FAST).fit(pd.DataFrame(X), [0, 1])


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters_are_one_line_that_names_them(shops, name):
    X, y = shops
    value, message = BAD[name]
    for data in (X, X.to_numpy(dtype=object)):
        with pytest.raises(InputError, match=message) as error:
            EntityEmbeddingEncoder(**{**FAST, name: value}).fit(data, y)
        assert "\n" not in str(error.value)


WRONG = ["no", "200", None, -1, 1.5, np.nan, np.array([1, 2]), {1: 2}, {"T_mult": "x"}, b"x", object()]
SOUND = {
    **dict.fromkeys(["min_frequency", "max_categories", "schedule_options", "random_state"], "None"),
    **dict.fromkeys(["shrinkage", "weight_decay", "max_lr"], "1.5"),
    "cross_fit": "-1",  # the number of rows that it is held against is known in fit_transform
    "hidden_layer_sizes": "array([1, 2])",
}


@pytest.mark.parametrize("name", inspect.signature(EntityEmbeddingEncoder).parameters)
def test_values_of_a_wrong_kind_are_one_line_that_names_the_parameter_and_what_was_found(shops, name):
    for value in WRONG:
        found = repr(value)
        if found != SOUND.get(name):
            with pytest.raises(InputError, match=rf"(?s)^{name} .*({re.escape(found)}|names \[)") as error:
                EntityEmbeddingEncoder(**{**FAST, name: value}).fit(*shops)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["meta", "cpu:x", 3])
def test_devices_that_are_not_there(shops, device):
    with pytest.raises(InputError, match=f"device must be 'auto' or a torch device.*, got {device!r}"):
        EntityEmbeddingEncoder(device=device, **FAST).fit(*shops)


def test_a_name_that_does_not_come_out_is_no_clash(shops):
    X, y = shops
    X = X.assign(city_9=1.5, city_00=1.5, area_missing=0.5)
    out = EntityEmbeddingEncoder(**FAST).fit(X, y).get_feature_names_out()
    assert {"city_9", "city_00", "area_missing"} < set(out)


def test_which_axes_come_out_does_not_decide_whether_a_name_is_refused(shops):
    X, y = shops
    X = X.assign(city_3=1.5)  # the fourth of four axes, of which fewer hold up
    with pytest.raises(
        InputError, match="'city_3' has a name that is also that of an output of column 'city'"
    ):
        EntityEmbeddingEncoder(**FAST).fit(X, y)
    EntityEmbeddingEncoder(embedding_dim=3, **FAST).fit(X, y)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("city_0", "'city_0' has a name that is also that of an output of column 'city'"),
        ("area_missing", "'area_missing' has a name that is also that of an output of column 'area'"),
    ],
)
def test_a_name_that_would_come_out_twice_is_refused_before_the_training(shops, monkeypatch, column, message):
    X, y = shops
    X = X.assign(**{column: 1.5, "area": X["area"].where(X["area"] > X["area"].median())})
    EntityEmbeddingEncoder(numeric="drop", **FAST).fit(X, y)  # no numeric column comes out
    monkeypatch.setattr(fit_module, "train", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(InputError, match=message):
        EntityEmbeddingEncoder(**FAST).fit(X, y)


def test_a_number_of_units_is_one_layer(shops):
    one = EntityEmbeddingEncoder(**{**FAST, "hidden_layer_sizes": 8}).fit(*shops)
    assert one._learned.shape.hidden_layer_sizes == (8,)


def test_numbers_of_numpy_are_numbers(shops):
    sizes = {**FAST, "hidden_layer_sizes": np.array([8, 4]), "max_lr": np.float32(0.5)}
    learned = EntityEmbeddingEncoder(**sizes).fit(*shops)
    assert (learned._learned.shape.hidden_layer_sizes, learned.max_lr_) == ((8, 4), 0.5)


@pytest.mark.parametrize("kind", ["target", "column"])
def test_numbers_too_large_to_standardise_are_refused_before_the_training(shops, monkeypatch, kind):
    X, _ = shops
    y = np.arange(120) * 0.5
    monkeypatch.setattr(fit_module, "train", lambda *_, **__: pytest.fail("it was trained"))
    X, y, message = (
        (X, 1e300 * y, "target 'y'")
        if kind == "target"
        else (X.assign(area=1e200 * X["area"]), y, "column 'area'")
    )
    with pytest.raises(InputError, match=f"{message} holds numbers too large to standardise"):
        EntityEmbeddingRegressor(**FAST).fit(X, y)


def test_targets_too_close_to_standardise_are_refused(shops):
    X, _ = shops
    y = np.arange(120) * 1e-200
    with pytest.raises(InputError, match="target 'y' holds numbers too close to one another to standardise"):
        EntityEmbeddingRegressor(**FAST).fit(X, y)
    with pytest.raises(InputError, match="target 'y' holds numbers too large to standardise"):
        EntityEmbeddingRegressor(**FAST).fit(X, np.where(y > 0, 1e308, -1e308))


@pytest.mark.parametrize("weight", [1e-300, 1e-45, 1e38, 1e308])
def test_weights_that_float32_cannot_hold_are_refused(shops, weight):
    X, y = shops
    with pytest.raises(InputError, match=r"^sample_weight is .* at most, .*: rescale it to a mean of 1"):
        EntityEmbeddingEncoder(**FAST).fit(X, y, sample_weight=np.full(len(X), weight))
    weights = np.where(np.arange(len(X)) < 5, min(weight, 1e-45), 1.0)  # a few may well be next to nothing
    found = EntityEmbeddingEncoder(**FAST).fit(X, y, sample_weight=weights)
    assert np.isfinite(found.transform(X)).all()


def test_fits_in_threads_repeat_and_leave_random_numbers_alone(shops):
    X, y = shops
    alone = EntityEmbeddingClassifier(**FAST).fit(X, y).predict_proba(X)
    state = torch.random.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda _: EntityEmbeddingClassifier(**FAST).fit(X, y).predict_proba(X), range(3))
        )
    for probabilities in found:
        np.testing.assert_array_equal(probabilities, alone)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_targets_of_a_frame_are_found_by_name(shops):
    X, _ = shops
    Y = pd.DataFrame({"low": X["area"], "high": 1000 - 10 * X["area"]})
    learned = EntityEmbeddingRegressor(**FAST).fit(X, Y)
    swapped = learned.category_losses(X, Y[["high", "low"]])
    pd.testing.assert_frame_equal(swapped, learned.category_losses(X, Y))
    pd.testing.assert_frame_equal(swapped, learned.category_losses(X, Y.to_numpy()))
    with pytest.raises(
        InputError, match=r"the targets \['low', 'high'\] that were learned, found \['low', 'x'\]"
    ):
        learned.extend(X, Y.rename(columns={"high": "x"}))


@pytest.mark.parametrize("names", [pd.Series(["id"], index=[7]), iter(["id"]), {"id": 1}])
def test_categorical_features_from_any_iterable(shops, names):
    X, y = shops
    encoder = EntityEmbeddingEncoder(names, **FAST).fit(X.assign(id=np.arange(len(X)) % 5), y)
    assert "id" in encoder.embeddings_


def test_categorical_features_that_are_no_list(shops):
    with pytest.raises(InputError, match="categorical_features must be 'from_dtype' or a list of names, got"):
        EntityEmbeddingEncoder(None, **FAST).fit(*shops)


def test_bad_data_is_one_line_that_names_it(shops):
    X, y = shops
    for data, labels, weights, message in [
        (X[["area"]], y, None, "no categorical column"),
        (X[:0], y[:0], None, "0 sample"),
        (X.assign(area=np.inf), y, None, "'area' holds 120 infinite"),
        (X, None, None, "requires y"),
        (X, np.zeros(120), None, "one class or value only"),
        (X, np.where(np.arange(120) == 7, np.nan, 1.5), None, "missing in 1 row.*row 7"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            EntityEmbeddingEncoder(**FAST).fit(data, labels, sample_weight=weights)
        assert "\n" not in str(error.value)
    encoder = EntityEmbeddingEncoder(**FAST).fit(X, y)
    with pytest.raises(InputError, match="'city' was string when learned, is int64 now"):
        encoder.transform(X.assign(city=1))
    with pytest.raises(ValueError, match="feature names"):
        encoder.transform(X.drop(columns="city"))


@pytest.mark.parametrize("kind", ["views", "objects", "null"])
def test_unusual_columns_of_text(kind):
    rng = np.random.default_rng(0)
    city = rng.choice(["Bonn", "Oslo", "1"], 1200)
    if kind == "views":
        X = pa.table({"city": pa.array(city).cast(pa.string_view())})
    elif kind == "null":  # a missing value in the dictionary itself
        codes = pa.array(np.where(city == "Bonn", 0, np.where(city == "Oslo", 1, 2)))
        X = pa.table({"city": pa.DictionaryArray.from_arrays(codes, pa.array(["Bonn", None, "1"]))})
    else:  # two categories of one text
        cells = np.where(city == "1", 1, city.astype(object))
        cells[::2] = np.where(city[::2] == "1", "1", cells[::2])
        X = pd.DataFrame({"city": pd.Series(cells, dtype=object).astype("category")})
        assert len(X["city"].cat.categories) == 4
    y = city == "Oslo"
    learned = EntityEmbeddingClassifier(**FAST)
    vectors = learned.fit_transform(X, y)
    assert vectors.shape[0] == 1200
    names = {"Bonn", "1"} if kind == "null" else {"Bonn", "Oslo", "1"}
    assert set(learned.embeddings_["city"].categories.to_pylist()) == names
    assert len(learned.top_losses(X, y, 5)) == 5


def test_parameters_that_name_columns_survive_storage(shops, tmp_path):
    X, y = shops
    X = X.assign(id=np.arange(120) % 7, kind=np.arange(120) % 3)
    for i, names in enumerate([pd.Index(["id", "kind"]), {"kind", "id"}, ("id", "kind")]):
        EntityEmbeddingEncoder(names, **FAST).fit(X, y).save(tmp_path / f"{i}.embedkit")
        loaded = EntityEmbeddingEncoder.load(tmp_path / f"{i}.embedkit")
        assert loaded.categorical_features == ["id", "kind"]
    EntityEmbeddingEncoder(embedding_dim={"city": lambda n: 2}, **FAST).fit(X, y).save(
        tmp_path / "c.embedkit"
    )
    assert EntityEmbeddingEncoder.load(tmp_path / "c.embedkit").embedding_dim == "auto"


def test_a_subset_by_name_or_by_any_iterable(shops):
    embeddings = EntityEmbeddingEncoder(**FAST).fit(*shops).embeddings_
    assert list(embeddings.subset("city")) == ["city"]
    assert list(embeddings.subset(name for name in ["open", "city"])) == list(
        embeddings.subset(["city", "open"])
    )
