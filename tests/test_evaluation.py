"""Comparisons of encodings: every score is reproduced by hand, and the verdict says what it should."""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import sklearn
from click.testing import CliRunner
from scipy import stats
from sklearn.compose import make_column_transformer
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline

import embedkit
from embedkit import EntityEmbeddingRegressor, InputError, comparison, evaluation
from embedkit.cli import main
from embedkit.comparison import Problem, compare
from embedkit.models import macro_auc, make_model
from embedkit.verdict import Evaluation, paired_difference

FAST = {"hidden_layer_sizes": (16,), "max_epochs": 5, "max_lr": 0.01}


def shops(n_rows: int, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Sales of 40 shops of three kinds at any hour: the network has to find out the kinds."""
    random = np.random.default_rng(seed)
    shop, hour = random.integers(40, size=n_rows), random.integers(12, size=n_rows)
    effect = np.random.default_rng(1).normal(size=(3, 12))
    X = pd.DataFrame({"shop": shop, "hour": hour, "noise": random.normal(size=n_rows)})
    return X, effect[shop % 3, hour] + random.normal(0, 0.1, n_rows)


@pytest.fixture(scope="module")
def problem() -> Problem:
    X, y = shops(700)
    return Problem(X[:500], y[:500], X[500:], y[500:], ["shop", "hour"], ["noise"], "regression")


@pytest.fixture(scope="module")
def scores(problem: Problem) -> pd.DataFrame:
    encoder = EntityEmbeddingRegressor(["shop", "hour"], random_state=0, **FAST)
    return compare(problem, encoder, models=["knn", "lightgbm"], n_jobs=1)


def score(scores: pd.DataFrame, encoding: str, model: str) -> float:
    rows = scores[(scores["encoding"] == encoding) & (scores["model"] == model)]
    (value,) = rows["score"]
    return value


def test_every_pair_is_scored_once(scores: pd.DataFrame) -> None:
    pairs = list(zip(scores["encoding"], scores["model"], strict=True))
    assert len(set(pairs)) == len(pairs)
    both = [(e, m) for e in ("ordinal", "onehot", "target", "embedkit") for m in ("knn", "lightgbm")]
    boosted = [("native", "lightgbm"), ("embedkit+native", "lightgbm")]
    assert set(pairs) == {*both, *boosted, ("embedkit", "network")}
    assert list(scores.columns) == comparison.COLUMNS
    widths = scores.groupby("encoding")["n_columns"].first()
    assert widths[["ordinal", "onehot", "target", "native"]].tolist() == [3, 40 + 12 + 1, 3, 3]
    assert widths["embedkit+native"] == widths["embedkit"] + 2


def test_vectors_and_categories_side_by_side_in_a_pipeline(scores: pd.DataFrame, problem: Problem) -> None:
    dtypes = {"shop": pd.CategoricalDtype(range(40)), "hour": pd.CategoricalDtype(range(12))}
    X_train, X_test = (frame.astype(dtypes) for frame in (problem.X_train, problem.X_test))
    encoder = EntityEmbeddingRegressor(["shop", "hour"], random_state=0, **FAST)
    columns = make_column_transformer((encoder, ["shop", "hour", "noise"]), ("passthrough", ["shop", "hour"]))
    boosting = make_model("lightgbm", "regression", n_jobs=1)
    model = make_pipeline(columns.set_output(transform="pandas"), boosting).fit(X_train, problem.y_train)
    expected = r2_score(problem.y_test, model.predict(X_test))
    assert score(scores, "embedkit+native", "lightgbm") == pytest.approx(expected)
    assert boosting.booster_.trees_to_dataframe()["decision_type"].isin(["=="]).any()


def test_columns_of_many_categories_stand_beside_no_vectors(problem: Problem, monkeypatch) -> None:
    monkeypatch.setattr(comparison, "MAX_CATEGORIES_BESIDE", 12)
    encoder = EntityEmbeddingRegressor(["shop", "hour"], random_state=0, **FAST)
    encodings = ["embedkit", "embedkit+native"]
    index = np.zeros(len(problem.X_train), dtype=int)  # labels of rows may repeat
    again = replace(problem, X_train=problem.X_train.set_index(index))
    found = compare(again, encoder, encodings=encodings, models=["lightgbm"], n_jobs=1)
    widths = found.groupby("encoding")["n_columns"].first()
    assert widths["embedkit+native"] == widths["embedkit"] + 1


def test_scores_by_hand(scores: pd.DataFrame, problem: Problem) -> None:
    encoder = EntityEmbeddingRegressor(["shop", "hour"], random_state=0, **FAST)
    vectors = encoder.fit_transform(problem.X_train, problem.y_train)
    knn = KNeighborsRegressor(20, weights="distance").fit(vectors, problem.y_train)
    expected = r2_score(problem.y_test, knn.predict(encoder.transform(problem.X_test)))
    assert score(scores, "embedkit", "knn") == pytest.approx(expected)
    network = r2_score(problem.y_test, encoder.predict(problem.X_test))
    assert score(scores, "embedkit", "network") == pytest.approx(network)
    columns = [
        frame.to_numpy() / problem.X_train.std(ddof=0).to_numpy()
        for frame in (problem.X_train, problem.X_test)
    ]
    knn.fit(columns[0], problem.y_train)  # numbers without gaps are their own ordinal codes
    assert score(scores, "ordinal", "knn") == pytest.approx(r2_score(problem.y_test, knn.predict(columns[1])))


def test_models_learn_from_what_fit_transform_returned(problem: Problem) -> None:
    encoder = EntityEmbeddingRegressor(["shop", "hour"], random_state=0, **{**FAST, "max_epochs": 30})
    vectors = encoder.fit_transform(problem.X_train, problem.y_train)
    settings = {"encodings": ["embedkit"], "models": ["knn"], "max_rows": 300, "random_state": 3}
    honest, shuffled = (compare(problem, encoder, part, **settings) for part in (vectors, vectors[::-1]))
    assert score(honest, "embedkit", "knn") > 0.5 > score(shuffled, "embedkit", "knn")


def test_strange_names_unseen_values_and_gaps_are_no_problem() -> None:
    X = pd.DataFrame({'a"[b]:,': ["u", "v", None, "w"] * 20, "x": [1.0, np.nan, 3.0, 4.0] * 20})
    y = np.array(["no", "yes", "no", "maybe"] * 20)
    test = X.iloc[:40].assign(**{'a"[b]:,': ["u", "new"] * 20})
    problem = Problem(X, y, test, y[:40], ['a"[b]:,'], ["x"], "multiclass")
    encoder = embedkit.EntityEmbeddingClassifier(random_state=0, **FAST)
    found = compare(problem, encoder, models=["knn", "lightgbm"], n_jobs=1)
    assert found["score"].between(0.3, 1).all()


def test_one_hot_is_left_out_where_it_is_too_wide(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    names = ["onehot", "embedkit"]
    assert comparison.feasible(problem, names) == names
    monkeypatch.setattr(comparison, "MAX_ONEHOT_COLUMNS", 51)
    assert comparison.feasible(problem, names) == ["embedkit"]
    monkeypatch.setattr(comparison, "MAX_ONEHOT_COLUMNS", 52)
    monkeypatch.setattr(comparison, "MAX_ONEHOT_CELLS", 52 * 500 - 1)
    assert comparison.feasible(problem, names) == ["embedkit"]


def test_macro_auc_is_that_of_scikit_learn_and_knows_absent_classes() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), size=60)
    y = random.integers(3, size=60)
    classes = np.array([0, 1, 2])
    assert macro_auc(y, probabilities, classes) == pytest.approx(
        roc_auc_score(y, probabilities, multi_class="ovr")
    )
    two = y != 2
    areas = [roc_auc_score(y[two] == label, probabilities[two, label]) for label in (0, 1)]
    assert macro_auc(y[two], probabilities[two], classes) == pytest.approx(np.mean(areas))
    strange = np.where(y == 2, 9, y)  # a class that the model never saw
    areas = [roc_auc_score(y == label, probabilities[:, label]) for label in (0, 1)]
    assert macro_auc(strange, probabilities, classes) == pytest.approx(np.mean([*areas, 0.5]))
    for third in (-1, 9):  # the same of a model of two classes
        y_test = np.where(y == 2, third, y)
        areas = [roc_auc_score(y == label, probabilities[:, label]) for label in (0, 1)]
        found = macro_auc(y_test, probabilities[:, :2], np.array([0, 1]))
        assert found == pytest.approx(np.mean([*areas, 0.5]))
    with pytest.raises(InputError, match=r"all 5 rows to be judged on are of class '1\.0'"):
        macro_auc(np.ones(5), probabilities[:5], classes)


def test_paired_differences_by_hand() -> None:
    differences = np.array([0.1, 0.3, 0.2, 0.2])
    mean, error, probability = paired_difference(differences, test_share=1 / 3)
    variance = np.var(differences, ddof=1) * (1 / 4 + 1 / 3)
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(variance**0.5))
    assert probability == pytest.approx(stats.t.cdf(0.2 / variance**0.5, df=3))
    assert paired_difference(np.zeros(3), 0.5)[2] == 0.5
    assert paired_difference(np.full(3, 0.25), 0.5)[2] == 1.0


def made_up(**scores_by_fold: list[float]) -> Evaluation:
    """An evaluation of scores by ``model_encoding``."""
    records = [
        (i, 80, 20, encoding, model, "R2", value, 1, 0.0, 0.0, 0.0)
        for name, values in scores_by_fold.items()
        for model, encoding in [name.split("_")]
        for i, value in enumerate(values)
    ]
    return Evaluation(pd.DataFrame(records, columns=["fold", "n_train", "n_test", *comparison.COLUMNS]))


@pytest.mark.parametrize(
    ("scores", "outcomes", "advice"),
    [
        (
            {
                "knn_embedkit": [0.8, 0.81, 0.8],
                "knn_target": [0.7, 0.71, 0.69],
                "network_embedkit": [0.9, 0.91, 0.9],
            },
            ["better", "better"],
            "Use embeddings here: the network itself is best of all.",
        ),
        (
            {
                "knn_embedkit": [0.6, 0.61, 0.6],
                "knn_target": [0.7, 0.71, 0.69],
                "network_embedkit": [0.5, 0.5, 0.5],
            },
            ["worse", "worse"],
            "Don't use embeddings here: KNN on target encoding is best of all.",
        ),
        (
            {
                "knn_embedkit": [0.6, 0.8, 0.7],
                "knn_ordinal": [0.7, 0.71, 0.69],
                "network_embedkit": [0.5, 0.5, 0.5],
            },
            ["open", "open"],
            "Don't use embeddings here: nothing proves them better than KNN on ordinal codes.",
        ),
        (
            {
                "lightgbm_embedkit": [0.6, 0.61, 0.6],
                "lightgbm_embedkit+native": [0.8, 0.81, 0.8],
                "lightgbm_native": [0.7, 0.71, 0.69],
                "network_embedkit": [0.5, 0.5, 0.5],
            },
            ["better", "better"],
            "Use embeddings here: LightGBM on embeddings + native categories is best of all.",
        ),
        (
            {
                "knn_embedkit": [0.8, 0.81, 0.8],
                "knn_target": [0.7, 0.71, 0.69],
                "lightgbm_embedkit": [0.7, 0.7, 0.7],
                "lightgbm_native": [0.9, 0.91, 0.9],
                "network_embedkit": [0.5, 0.5, 0.5],
            },
            ["better", "worse", "worse"],
            "Use embeddings for KNN only: over all models, LightGBM on native categories is best of all.",
        ),
    ],
)
def test_verdicts_and_advice(scores: dict, outcomes: list[str], advice: str) -> None:
    found = made_up(**scores)
    assert [verdict.outcome for verdict in found.verdicts] == outcomes
    assert found.advice == advice
    assert str(found).endswith(advice)
    assert str(found.verdicts[0]) in str(found)


def test_summary_pairs_the_folds() -> None:
    found = made_up(
        knn_embedkit=[0.5, 0.7], knn_target=[0.4, 0.58], knn_ordinal=[0.1, 0.9], network_embedkit=[0.1, 0.1]
    ).summary.set_index(["model", "encoding"])
    row = found.loc[("knn", "target")]
    assert (row["score"], row["gain"]) == (pytest.approx(0.49), pytest.approx(0.11))
    assert row["probability"] > 0.95
    assert 0.4 < found.loc[("knn", "ordinal"), "probability"] < 0.6
    assert np.isnan(found.loc[("knn", "embedkit"), "gain"])


def test_evaluate_learns_in_every_fold_and_finds_that_embeddings_help() -> None:
    X, y = shops(1200)
    found = embedkit.evaluate(
        *(X, y),
        categorical_features=["shop", "hour"],
        models=["knn"],
        encodings=["target", "embedkit"],
        n_folds=3,
        **FAST,
    )
    assert found.scores["fold"].nunique() == 3
    assert (found.scores["n_train"] + found.scores["n_test"] == 1200).all()
    knn, _ = found.verdicts
    assert (knn.subject, knn.outcome) == ("KNN", "better")
    assert found.advice.startswith("Use embeddings here")


def test_groups_and_time_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(problem: Problem, *_: object, **__: object) -> pd.DataFrame:
        seen.append(problem)
        return made_up(knn_embedkit=[1.0], knn_target=[1.0]).scores.drop(
            columns=["fold", "n_train", "n_test"]
        )

    monkeypatch.setattr(evaluation, "compare", spy)
    X, y = shops(90)
    X["when"] = pd.date_range("2020-01-01", periods=90)[::-1]
    X["index"] = np.arange(90)
    embedkit.evaluate(X, y, categorical_features=["shop"], time="when", n_folds=3)
    assert len(seen) == 3
    for problem in seen:  # later rows come first here
        assert problem.X_train["index"].min() > problem.X_test["index"].max()
        assert "when" not in problem.X_train
    seen.clear()
    X["when"] = np.repeat(X["when"].to_numpy()[::6], 6)  # six rows at a time
    embedkit.evaluate(X, y, categorical_features=["shop"], time="when", n_folds=4)
    assert [len(problem.X_test) for problem in seen] == [18] * 4
    for problem in seen:
        moments = [set(part["index"] // 6) for part in (problem.X_train, problem.X_test)]
        assert not moments[0] & moments[1]
        assert min(moments[0]) > max(moments[1])
    seen.clear()
    embedkit.evaluate(
        X.drop(columns="when"), y, categorical_features=["hour"], groups=X["shop"], n_folds=3, max_rows=80
    )
    assert [len(problem.X_train) + len(problem.X_test) for problem in seen] == [80] * 3
    for problem in seen:
        assert not set(problem.X_train["shop"]) & set(problem.X_test["shop"])
        assert (problem.groups == problem.X_train["shop"]).all()


def test_groups_reach_the_encoders(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = problem.X_train["shop"].to_numpy()
    seen = []

    class Recording(EntityEmbeddingRegressor):
        def fit_transform(self, X, y, sample_weight=None, groups=None):
            seen.append(groups)
            return self.fit(X, y).transform(X)

    compare(
        replace(problem, groups=groups),
        Recording(["shop", "hour"], random_state=0, **FAST),
        encodings=["embedkit"],
        models=["knn"],
    )
    assert len(seen) == 1
    assert (seen[0] == groups).all()
    alone = comparison.encode(replace(problem, groups=np.zeros(len(groups))), "target", 0).train
    assert (alone == comparison.encode(problem, "target", 0).train).all()
    if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9):
        return  # its target encoder takes no folds
    # Of a group no row is in its own fold's mean: all shops are as if new to the target encoder.
    encoded = comparison.encode(replace(problem, groups=groups), "target", 0).train
    assert len(np.unique(encoded[:, 0])) == 5
    assert len(np.unique(comparison.encode(problem, "target", 0).train[:, 0])) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": "city"}, r"X has no column \['city'\]"),
        ({"groups": "shop", "time": "hour"}, "by groups or by time, not by both"),
        ({"n_folds": 1}, "n_folds must be a whole number of at least 2, got 1"),
        ({"encodings": ["ordinal"]}, "encodings must be 'embedkit' and some of"),
        ({"models": ["svm"]}, "models some of"),
        ({"groups": [0] * 59 + [1]}, "5 folds need as many groups, found 2"),
        ({"time": [1]}, "time has 1 rows, X has 60"),
        ({"categorical_features": []}, "no categorical column"),
        (
            {"encodings": ["native", "embedkit"], "models": ["knn"]},
            "nothing to compare embeddings with under",
        ),
        ({"encodings": ["embedkit", "embedkit+native"]}, "nothing to compare embeddings with under"),
        ({"time": np.arange(60) // 15}, "cannot be split into 5 folds of different times"),
        ({"time": np.minimum(np.arange(60), 2), "n_folds": 2}, "too many have the same: ask for fewer folds"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options: dict, message: str) -> None:
    X, y = shops(60)
    with pytest.raises(InputError, match=message):
        embedkit.evaluate(X, y, **{"categorical_features": ["noise"], **options})


def test_a_column_of_an_array_cannot_be_named() -> None:
    X, y = shops(60)
    with pytest.raises(InputError, match="from_dtype"):
        embedkit.evaluate(X.to_numpy(), y, categorical_features="noise")


def test_a_class_too_rare_for_the_folds_is_refused() -> None:
    X, _ = shops(60)
    y = ["a"] * 57 + ["b"] * 3
    with pytest.raises(InputError, match=r"class 'b' has 3 row\(s\), 5 folds need as many"):
        embedkit.evaluate(X, np.array(y), categorical_features=["shop"])


def test_the_function_is_not_hidden_by_a_module() -> None:
    import embedkit.changes
    import embedkit.evaluation

    assert inspect.isfunction(embedkit.evaluate)
    assert inspect.isfunction(embedkit.drift)


def test_the_command_prints_the_verdict_and_writes_the_scores(tmp_path: Path) -> None:
    X, y = shops(200)
    X.assign(y=y > 0).to_parquet(tmp_path / "rows.parquet")
    arguments = ["evaluate", tmp_path / "rows.parquet", "--target", "y", "--categorical", "shop,hour"]
    arguments += ["--folds", 2, "--models", "knn", "--max-lr", 0.01]
    done = CliRunner().invoke(
        main, [str(a) for a in [*arguments, "--max-epochs", 1, "--out", tmp_path / "o.parquet"]]
    )
    assert done.exit_code == 0, done.output
    assert "AUC, mean ± standard deviation over 2 folds" in done.stdout
    assert "embeddings" in done.stdout.splitlines()[-1]
    assert pq.read_table(tmp_path / "o.parquet").to_pandas()["fold"].nunique() == 2
    done = CliRunner().invoke(main, [str(a) for a in [*arguments, "--weight", "noise"]])
    assert done.exit_code == 2
    before = (tmp_path / "rows.parquet").read_bytes()
    done = CliRunner().invoke(main, [str(a) for a in [*arguments, "--out", tmp_path / "rows.parquet"]])
    assert done.exit_code == 1
    assert "is read, or would be, as" in done.stderr
    assert (tmp_path / "rows.parquet").read_bytes() == before


@pytest.mark.parametrize("missing", [False, True])
def test_long_integer_ids_are_told_apart_by_every_encoding(missing: bool) -> None:
    ids = pd.Series(2**60 + np.arange(600) % 10, dtype="Int64" if missing else "int64")
    if missing:
        ids[0] = pd.NA
    y = (np.arange(600) % 10).astype(float)
    names = ["ordinal", "target", "native", "embedkit"]
    models = ["knn", "lightgbm"]
    how = {"categorical_features": ["id"], "encodings": names, "models": models, "n_folds": 2, **FAST}
    found = embedkit.evaluate(pd.DataFrame({"id": ids}), y, **how)
    scores = found.scores[found.scores["model"] != "network"]
    assert scores.groupby("encoding")["score"].min().loc[["ordinal", "target", "native"]].gt(0.95).all()


@pytest.mark.parametrize("as_column", [False, True])
def test_ordered_categories_are_a_time(problem: Problem, monkeypatch, as_column: bool) -> None:
    months = ["Jan", "Feb", "Mar", "Apr"]
    month = pd.Series(pd.Categorical(np.repeat(months, 125), categories=months, ordered=True))
    seen = []

    def compare(part: Problem, *_, **__):
        seen.append((sorted(set(part.X_train["hour"])), sorted(set(part.X_test["hour"]))))
        return pd.DataFrame()

    monkeypatch.setattr(evaluation, "compare", compare)
    monkeypatch.setattr(evaluation, "Evaluation", lambda scores: scores)
    X = problem.X_train.assign(hour=np.arange(500) // 125)
    X, time = (X.assign(month=month), "month") if as_column else (X, month)
    embedkit.evaluate(X, problem.y_train, categorical_features=["shop", "hour"], time=time, n_folds=3)
    assert seen == [([0], [1]), ([0, 1], [2]), ([0, 1, 2], [3])]


def test_dates_and_settings_of_scikit_learn_do_not_matter() -> None:
    X, y = shops(300)
    days = X.assign(day=pd.Timestamp("2020-01-01") + pd.to_timedelta(X["hour"], unit="D"))
    settings = {"categorical_features": ["shop", "day"], "n_folds": 2, "max_epochs": 1}
    settings |= {"models": ["lightgbm"], "encodings": ["embedkit", "onehot", "target", "native"]}
    with sklearn.config_context(transform_output="pandas", enable_metadata_routing=True):
        found = embedkit.evaluate(days, y, groups=X["hour"].to_numpy(), **settings).scores
    assert set(found["encoding"]) == {"embedkit", "onehot", "target", "native"}
    assert found["score"].notna().all()


def test_time_is_in_the_order_that_it_is_meant_in() -> None:
    months = pl.Series(["May", "June", "July"] * 20).cast(pl.Enum(["May", "June", "July"]))
    assert evaluation._key(months).tolist()[:3] == [0, 1, 2]
    X, y = shops(60)
    days = [f"{1 + i % 28}/{1 + i // 28}/2013" for i in range(60)]
    with pytest.raises(InputError, match=r"time holds text such as '1/1/2013', which does not sort by time"):
        embedkit.evaluate(X, y, categorical_features=["shop"], time=days)
    times = np.array([f"2013-01-{1 + i % 28:02}" for i in range(60)], dtype=object)
    for train, test in evaluation._split_by_time(evaluation._as_times(times), 3):
        assert times[train].max() < times[test].min()


def test_groups_that_cannot_be_sorted_and_as_many_as_folds() -> None:
    X, y = shops(300)
    groups = np.array([1, "a", 2.5] * 100, dtype=object)
    settings = {"categorical_features": ["shop"], "n_folds": 3, "max_epochs": 1, "models": ["lightgbm"]}
    found = embedkit.evaluate(X, y, groups=groups, encodings=["embedkit", "target"], **settings)
    assert sorted(found.scores["n_test"].unique()) == [100]
    with pytest.raises(InputError, match="max_rows must be a whole number of at least n_folds, got -1"):
        embedkit.evaluate(X, y, max_rows=-1, **settings)
