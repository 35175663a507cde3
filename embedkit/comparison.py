"""Does it help? The models people already run, under every encoding, on rows that none of them has seen."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from embedkit.errors import InputError
from embedkit.models import MODELS, macro_auc, make_model

ENCODINGS = ("ordinal", "onehot", "target", "native", "embedkit", "embedkit+native")
# Those that need embeddings, and those that only LightGBM can take.
OURS = ("embedkit", "embedkit+native")
LIGHTGBM_ONLY = ("native", "embedkit+native")
METRICS = {"regression": "R2", "binary": "AUC", "multiclass": "macro AUC"}
# Where one-hot encoding makes more columns, or more cells of the training rows, the models take longer on it
# than on all other encodings together: it is left out.
MAX_ONEHOT_COLUMNS = 1_000
MAX_ONEHOT_CELLS = 25_000_000
# Beside vectors LightGBM gets categories as such from columns of at most so many, its bins of a number: of
# more it makes subsets that fit their noise, and that the vectors had been rid of.
MAX_CATEGORIES_BESIDE = 255
COLUMNS = [
    "encoding",
    "model",
    "metric",
    "score",
    "n_columns",
    "fit_seconds",
    "transform_seconds",
    "model_seconds",
]


@dataclass(frozen=True)
class Problem:
    """Rows to learn from, rows to be judged on, and what the columns are for.

    Attributes
    ----------
    X_train, X_test : DataFrame
    y_train, y_test : ndarray of shape (n_rows,)
    categorical, numeric : list of str
    kind : {"regression", "binary", "multiclass"}
    groups : ndarray of shape (n_train,), optional
        Training rows of one group resemble one another more than test rows resemble them: where an encoding
        cross-fits, they are in one fold (target encoding needs scikit-learn 1.9 for that).
    """

    X_train: pd.DataFrame
    y_train: np.ndarray
    X_test: pd.DataFrame
    y_test: np.ndarray
    categorical: list[str]
    numeric: list[str]
    kind: str
    groups: np.ndarray | None = None

    def sample(self, n_rows: int | None, random_state: int) -> np.ndarray:
        """Positions of at most `n_rows` training rows, drawn at random, in order."""
        n = len(self.X_train)
        if n_rows is None or n_rows >= n:
            return np.arange(n)
        return np.sort(np.random.RandomState(random_state).permutation(n)[:n_rows])


@dataclass(frozen=True)
class Encoded:
    """A problem's rows under an encoding.

    Attributes
    ----------
    train, test : array, sparse array or DataFrame of shape (n_rows, n_columns)
    fit_seconds, transform_seconds : float
        Time to learn the encoding and encode the training rows, and to encode the test rows.
    """

    train: Any
    test: Any
    fit_seconds: float
    transform_seconds: float


def compare(
    problem: Problem,
    encoder: Any,
    vectors: np.ndarray | None = None,
    *,
    encodings: Sequence[str] = ENCODINGS,
    models: Sequence[str] = MODELS,
    max_rows: int | None = None,
    random_state: int = 0,
    n_jobs: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> pd.DataFrame:
    """Score models under encodings on held-out rows.

    Every encoding is learned from all training rows; the models learn from the same sample of them. What an
    encoder's `fit_transform` returns is what the models learn from: scikit-learn's TargetEncoder cross-fits
    there, and so may embedkit's.

    Parameters
    ----------
    problem : Problem
    encoder : EntityEmbeddingClassifier or EntityEmbeddingRegressor
        Fitted here, and also scored itself, as model "network".
    vectors : array of shape (n_rows, n_columns), optional
        What ``encoder.fit_transform`` has returned for the training rows; with it, nothing is fitted again.
    encodings : sequence of {"ordinal", "onehot", "target", "native", "embedkit", "embedkit+native"}
        "native" is LightGBM's own treatment of categories, for that model only, and so is "embedkit+native":
        beside the vectors the categories of all columns that have at most 255; "onehot" is left out where it
        would make more than 1,000 columns or 25 million cells.
    models : sequence of {"knn", "forest", "lightgbm"}
    max_rows : int, optional
        Most rows the models learn from.
    random_state : int
        Of the rivals' encodings, of the models and of the sample.
    n_jobs : int, optional
        Threads of the models, as in scikit-learn.
    progress : callable
        Wraps the iterable of pairs, as ``tqdm`` does.

    Returns
    -------
    DataFrame
        Columns ``encoding, model, metric, score, n_columns, fit_seconds, transform_seconds, model_seconds``;
        the first two times are those of the encoding.
    """
    rows = problem.sample(max_rows, random_state)
    metric = METRICS[problem.kind]
    records = []
    # The network stands in for a model, and its vectors come with it.
    ours = encode_with(encoder, problem, vectors)
    records.append(("embedkit", "network", metric, score_of(encoder, problem.X_test, problem), *_costs(ours)))
    encoded = {"embedkit": ours}
    for encoding, model_name in progress(pairs(feasible(problem, encodings), models)):
        if encoding not in encoded:  # one at a time, ours apart
            found = (
                _beside_native(ours, problem)
                if encoding == "embedkit+native"
                else encode(problem, encoding, random_state)
            )
            encoded = {"embedkit": ours, encoding: found}
        start = time.perf_counter()
        # The vectors' distances mean something as they are; the rivals' columns have to be brought to one
        # scale.
        model = make_model(
            model_name,
            problem.kind,
            scale=encoding not in OURS,
            random_state=random_state,
            n_jobs=n_jobs,
        )
        train = encoded[encoding].train
        model.fit(train.iloc[rows] if hasattr(train, "iloc") else train[rows], problem.y_train[rows])
        score = score_of(model, encoded[encoding].test, problem)
        costs = (*_costs(encoded[encoding])[:-1], time.perf_counter() - start)
        records.append((encoding, model_name, metric, score, *costs))
    return pd.DataFrame(records, columns=COLUMNS)


def feasible(problem: Problem, encodings: Sequence[str]) -> list[str]:
    """The encodings, without one-hot where it would be too wide."""
    width = sum(problem.X_train[name].nunique(dropna=False) for name in problem.categorical)
    fits = width <= MAX_ONEHOT_COLUMNS and width * len(problem.X_train) <= MAX_ONEHOT_CELLS
    return [name for name in encodings if name != "onehot" or fits]


def pairs(encodings: Sequence[str], models: Sequence[str]) -> list[tuple[str, str]]:
    """Every encoding with every model that can take it."""
    return [(e, m) for e in encodings for m in models if e not in LIGHTGBM_ONLY or m == "lightgbm"]


def encode_with(encoder: Any, problem: Problem, vectors: np.ndarray | None = None) -> Encoded:
    """A problem's rows under an estimator with `fit_transform`; see `compare` for `vectors`."""
    start = time.perf_counter()
    if vectors is None:
        groups = {} if problem.groups is None else {"groups": problem.groups}
        vectors = encoder.fit_transform(problem.X_train, problem.y_train, **groups)
    fitted = time.perf_counter()
    test = encoder.transform(problem.X_test)
    return Encoded(vectors, test, fitted - start, time.perf_counter() - fitted)


def encode(problem: Problem, encoding: str, random_state: int) -> Encoded:
    """A problem's rows under one of the standard encodings, numbers imputed by their median."""
    if encoding == "native":
        return _native(problem)
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer

    transformer = make_column_transformer(
        (_rival(encoding, problem, random_state), problem.categorical),
        (SimpleImputer(strategy="median", keep_empty_features=True), problem.numeric),
        sparse_threshold=1.0,
    )
    frames = (problem.X_train, problem.X_test)
    numbers = [name for name in problem.categorical if all(_told_apart_as_floats(X[name]) for X in frames)]
    X_train, X_test = (_as_text(frame, problem.categorical, numbers) for frame in frames)
    as_text = replace(
        problem,
        X_train=X_train,
        X_test=X_test,
        groups=None,  # the transformer knows them already
    )
    return encode_with(transformer, as_text)


def score_of(model: Any, X: Any, problem: Problem) -> float:
    """R2, ROC AUC, or macro one-vs-rest ROC AUC of a fitted model on the test rows."""
    if problem.kind == "regression":
        from sklearn.metrics import r2_score

        return float(r2_score(problem.y_test, model.predict(X)))
    return macro_auc(problem.y_test, model.predict_proba(X), model.classes_)


def _costs(encoded: Encoded) -> tuple[int, float, float, float]:
    return encoded.train.shape[1], encoded.fit_seconds, encoded.transform_seconds, 0.0


def _rival(encoding: str, problem: Problem, random_state: int) -> Any:
    import sklearn
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder

    if encoding == "ordinal":
        return OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2)
    if encoding == "onehot":
        return OneHotEncoder(handle_unknown="ignore", dtype=np.float32)
    if encoding == "target":
        regression = problem.kind == "regression"
        target_type = "continuous" if regression else problem.kind
        if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9):  # takes no splitter yet
            return TargetEncoder(target_type=target_type, random_state=random_state)
        n_groups = 0 if problem.groups is None else len(np.unique(problem.groups))
        if n_groups > 1:
            splitter = GroupKFold(min(5, n_groups), shuffle=True, random_state=random_state)
            folds = list(splitter.split(problem.X_train, problem.y_train, problem.groups))
        else:
            splitter = KFold if regression else StratifiedKFold
            folds = splitter(5, shuffle=True, random_state=random_state)
        return TargetEncoder(target_type=target_type, cv=folds)
    raise InputError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")


def _native(problem: Problem) -> Encoded:
    """Columns of pandas categories, which LightGBM splits by itself."""
    start = time.perf_counter()
    # LightGBM refuses some characters in names.
    names = {name: f"x{i}" for i, name in enumerate([*problem.categorical, *problem.numeric])}
    train, test = (frame[list(names)].rename(columns=names) for frame in (problem.X_train, problem.X_test))
    for name in (names[name] for name in problem.categorical):
        known = pd.Index(train[name].dropna().unique())
        for frame in (train, test):  # numbers, as LightGBM cannot hold dates; -1 is missing
            codes = known.get_indexer(frame[name])
            frame[name] = pd.Categorical.from_codes(codes, range(len(known)))
    return Encoded(train, test, time.perf_counter() - start, 0.0)


def _beside_native(ours: Encoded, problem: Problem) -> Encoded:
    """The vectors, and beside them categories as LightGBM splits them by itself, of columns that have few."""
    native = _native(problem)
    categories = native.train.select_dtypes("category")
    few = [name for name in categories if len(categories[name].cat.categories) <= MAX_CATEGORIES_BESIDE]
    train, test = (
        pd.DataFrame(vectors).add_prefix("v").join(columns[few].reset_index(drop=True))
        for vectors, columns in ((ours.train, native.train), (ours.test, native.test))
    )
    return Encoded(train, test, ours.fit_seconds + native.fit_seconds, ours.transform_seconds)


def _as_text(frame: pd.DataFrame, categorical: Sequence[str], numbers: Collection[str]) -> pd.DataFrame:
    """Categories as strings, so that every encoder takes every type, missing as one; `numbers` as such."""
    frame = frame.copy()
    for name in categorical:
        column = frame[name]
        if name in numbers:  # codes in their order
            frame[name] = column.to_numpy(np.float64, na_value=np.nan)
        else:
            frame[name] = column.astype(object).astype(str).where(column.notna(), "(missing)").astype(object)
    return frame


def _told_apart_as_floats(column: pd.Series) -> bool:
    if not pd.api.types.is_numeric_dtype(column):
        return False
    return not pd.api.types.is_integer_dtype(column) or bool((column.abs() < 2**53).all())
