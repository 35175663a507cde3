"""Does it help? The models people already run, under every encoding, on rows that none of them has seen."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from embedkit.errors import InputError, require

ENCODINGS = ("ordinal", "target", "native", "embedkit")
MODELS = ("knn", "forest", "lightgbm")
METRICS = {"regression": "R2", "binary": "AUC", "multiclass": "macro AUC"}


@dataclass(frozen=True)
class Problem:
    """Rows to learn from, rows to be judged on, and what the columns are for.

    Attributes
    ----------
    X_train, X_test : DataFrame
    y_train, y_test : ndarray of shape (n_rows,)
    categorical, numeric : list of str
    kind : {"regression", "binary", "multiclass"}
    """

    X_train: pd.DataFrame
    y_train: np.ndarray
    X_test: pd.DataFrame
    y_test: np.ndarray
    categorical: list[str]
    numeric: list[str]
    kind: str

    def sample(self, n_rows: int | None, random_state: int) -> np.ndarray:
        """Positions of at most `n_rows` training rows, drawn at random, in order."""
        n = len(self.X_train)
        if n_rows is None or n_rows >= n:
            return np.arange(n)
        return np.sort(np.random.RandomState(random_state).permutation(n)[:n_rows])


def compare(
    problem: Problem,
    encoder: Any,
    *,
    encodings: Sequence[str] = ENCODINGS,
    models: Sequence[str] = MODELS,
    max_rows: int | None = None,
    random_state: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> pd.DataFrame:
    """Score models under encodings on held-out rows.

    Every encoding is learned from all training rows; the models learn from the same sample of them. What an
    encoder's `fit_transform` returns is what the models learn from (scikit-learn's TargetEncoder cross-fits
    there).

    Parameters
    ----------
    problem : Problem
    encoder : EntityEmbeddingClassifier or EntityEmbeddingRegressor
        Fitted on the training rows of the problem; also scored itself, as model "network".
    encodings : sequence of {"ordinal", "onehot", "target", "native", "embedkit"}
        "native" is LightGBM's own treatment of categories, for that model only.
    models : sequence of {"knn", "forest", "lightgbm"}
    max_rows : int, optional
        Most rows the models learn from.
    random_state : int
    progress : callable
        Wraps the iterable of pairs, as ``tqdm`` does.

    Returns
    -------
    DataFrame
        Columns ``encoding, model, metric, score, n_columns, seconds``; the time is that of the model.
    """
    rows = problem.sample(max_rows, random_state)
    records = []
    encoded: dict[str, tuple[Any, Any]] = {}
    pairs = [(e, m) for e in encodings for m in models if e != "native" or m == "lightgbm"]
    for encoding, model_name in progress(pairs):
        if encoding not in encoded:
            encoded = {encoding: encode(problem, encoding, encoder, rows, random_state)}  # one at a time
        train, test = encoded[encoding]
        start = time.perf_counter()
        # The vectors' distances mean something as they are; the rivals' columns have to be brought to one
        # scale.
        model = make_model(model_name, problem.kind, scale=encoding != "embedkit", random_state=random_state)
        model.fit(train, problem.y_train[rows])
        score = score_of(model, test, problem)
        seconds = time.perf_counter() - start
        records.append((encoding, model_name, METRICS[problem.kind], score, train.shape[1], seconds))
    records.append(
        ("embedkit", "network", METRICS[problem.kind], score_of(encoder, problem.X_test, problem), 0, 0.0)
    )
    return pd.DataFrame(records, columns=["encoding", "model", "metric", "score", "n_columns", "seconds"])


def encode(
    problem: Problem, encoding: str, encoder: Any, rows: np.ndarray, random_state: int
) -> tuple[Any, Any]:
    """Training rows (a sample of them) and test rows under an encoding."""
    if encoding == "embedkit":
        return encoder.transform(problem.X_train.iloc[rows]), encoder.transform(problem.X_test)
    if encoding == "native":
        return _native(problem, rows)
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer

    kind = "continuous" if problem.kind == "regression" else problem.kind
    transformer = make_column_transformer(
        (_rival(encoding, kind, random_state), problem.categorical),
        (SimpleImputer(strategy="median", keep_empty_features=True), problem.numeric),
        sparse_threshold=1.0,
    )
    train = transformer.fit_transform(_as_text(problem.X_train, problem.categorical), problem.y_train)
    return train[rows], transformer.transform(_as_text(problem.X_test, problem.categorical))


def make_model(name: str, kind: str, *, scale: bool, random_state: int) -> Any:
    """A model with the settings that all encodings share.

    KNN with 20 neighbours weighted by inverse distance (on standardised columns if `scale`), a forest of 100
    trees, LightGBM with 400 trees of 31 leaves at rate 0.05; all else at the libraries' defaults.
    """
    regression = kind == "regression"
    if name == "knn":
        from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = (KNeighborsRegressor if regression else KNeighborsClassifier)(
            20, weights="distance", n_jobs=-1
        )
        return make_pipeline(StandardScaler(with_mean=False), model) if scale else model
    if name == "forest":
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

        forest = RandomForestRegressor if regression else RandomForestClassifier
        return forest(100, n_jobs=-1, random_state=random_state)
    if name == "lightgbm":
        lightgbm = require("lightgbm", "train")
        boosting = lightgbm.LGBMRegressor if regression else lightgbm.LGBMClassifier
        return boosting(n_estimators=400, learning_rate=0.05, random_state=random_state, verbose=-1)
    raise InputError(f"model must be one of {', '.join(MODELS)}, got {name!r}")


def score_of(model: Any, X: Any, problem: Problem) -> float:
    """R2, ROC AUC, or macro one-vs-rest ROC AUC of a fitted model on the test rows."""
    from sklearn.metrics import r2_score, roc_auc_score

    if problem.kind == "regression":
        return float(r2_score(problem.y_test, model.predict(X)))
    probabilities = model.predict_proba(X)
    if problem.kind == "binary":
        return float(roc_auc_score(problem.y_test, probabilities[:, 1]))
    return float(roc_auc_score(problem.y_test, probabilities, multi_class="ovr", labels=model.classes_))


def _rival(encoding: str, kind: str, random_state: int) -> Any:
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder

    if encoding == "ordinal":
        return OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    if encoding == "onehot":
        return OneHotEncoder(handle_unknown="ignore", dtype=np.float32)
    if encoding == "target":
        return TargetEncoder(target_type=kind, random_state=random_state)
    raise InputError(f"encoding must be one of {', '.join(ENCODINGS)} or onehot, got {encoding!r}")


def _native(problem: Problem, rows: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Columns of pandas categories, which LightGBM splits by itself."""
    train = problem.X_train[[*problem.categorical, *problem.numeric]].copy()
    test = problem.X_test[[*problem.categorical, *problem.numeric]].copy()
    for name in problem.categorical:
        dtype = pd.CategoricalDtype(train[name].dropna().unique())
        known = test[name].where(test[name].isin(dtype.categories))
        train[name], test[name] = train[name].astype(dtype), known.astype(dtype)
    return train.iloc[rows], test


def _as_text(frame: pd.DataFrame, categorical: Sequence[str]) -> pd.DataFrame:
    """Categories as strings, so that every encoder takes every type; missing is a category of its own."""
    frame = frame.copy()
    for name in categorical:
        column = frame[name]
        frame[name] = column.astype(object).astype(str).where(column.notna(), "(missing)").astype(object)
    return frame
