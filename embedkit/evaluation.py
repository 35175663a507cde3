"""Should embeddings be used on a table, and for which model? Nested cross-validation with a plain verdict."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn import config_context

from embedkit.comparison import ENCODINGS, OURS, Problem, compare, feasible, pairs
from embedkit.errors import InputError, did_you_mean, require
from embedkit.folds import check_groups
from embedkit.frames import is_array, numeric_block, to_table
from embedkit.models import MODELS
from embedkit.roles import choose_roles
from embedkit.verdict import Evaluation

KINDS = {"continuous": "regression", "binary": "binary", "multiclass": "multiclass"}


def evaluate(
    X: Any,
    y: Any,
    *,
    categorical_features: str | Sequence[str] = "from_dtype",
    target_type: str = "auto",
    groups: Any = None,
    time: Any = None,
    n_folds: int = 5,
    encodings: Sequence[str] = ENCODINGS,
    models: Sequence[str] = MODELS,
    max_rows: int | None = 100_000,
    random_state: int = 0,
    n_jobs: int | None = None,
    progress: bool = False,
    **parameters: Any,
) -> Evaluation:
    """Find out by cross-validation whether embeddings help the models that are run on a table.

    Every fold learns its own embeddings, and all other encodings, from its training rows alone, then every
    model on every encoding, and scores them on its test rows.

    Parameters
    ----------
    X : frame or array of shape (n_rows, n_columns)
        In memory; names of columns are strings.
    y : array or Series of shape (n_rows,)
        One target.
    categorical_features, target_type
        As in `EntityEmbeddingEncoder`.
    groups : str or array of shape (n_rows,), optional
        A column of X, which is not learned from, or values: no group is on both sides of a fold, nor on both
        sides of the inner folds of an encoding that cross-fits.
    time : str or array of shape (n_rows,), optional
        Likewise; every fold is tested on rows that come after those it learned from.
    n_folds : int, default=5
        At least 2.
    encodings, models : sequence of str
        See `embedkit.comparison.compare`.
    max_rows : int, optional
        Larger tables are sampled at random to this many rows, for all encodings and models alike.
    random_state : int
        Of folds, sample, encodings and models.
    n_jobs : int, optional
        Threads of the models, as in scikit-learn.
    progress : bool
        Show a progress bar.
    **parameters
        Of the embeddings; see `EntityEmbeddingEncoder`.

    Returns
    -------
    Evaluation
        Prints as a table with a verdict; ``scores`` is a frame of all results.

    Raises
    ------
    InputError
        If the table or a setting cannot be used.
    MissingExtraError
        If torch or LightGBM is not installed.

    Examples
    --------
    >>> import embedkit
    >>> found = embedkit.evaluate(X, y, categorical_features=["Store"])  # doctest: +SKIP
    >>> print(found)  # doctest: +SKIP
    """
    require("torch", "train")
    if not {"embedkit"} < set(encodings) <= set(ENCODINGS) or not models or not set(models) <= set(MODELS):
        raise InputError(
            f"encodings must be 'embedkit' and some of {ENCODINGS}, models some of {MODELS}: "
            f"got {tuple(encodings)}, {tuple(models)}"
        )
    encodings, models = tuple(dict.fromkeys(encodings)), tuple(dict.fromkeys(models))
    if isinstance(n_folds, bool) or not isinstance(n_folds, (int, np.integer)) or n_folds < 2:
        raise InputError(f"n_folds must be a whole number of at least 2, got {n_folds!r}")
    whole, keys = _read(X, y, categorical_features, target_type, {"groups": groups, "time": time})
    if "groups" in keys:
        keys["groups"] = check_groups(keys["groups"], len(whole.y_train))
    if max_rows is not None and (not isinstance(max_rows, (int, np.integer)) or max_rows < n_folds):
        raise InputError(f"max_rows must be a whole number of at least n_folds, got {max_rows!r}")
    rows = whole.sample(max_rows, random_state)
    whole, keys = _take(whole, rows, rows), {name: values[rows] for name, values in keys.items()}
    folds = _split(whole, n_folds, random_state, **keys)
    encodings = feasible(whole, encodings)  # the same in every fold
    if all(encoding in OURS for encoding, _ in pairs(encodings, models)):
        raise InputError(
            f"there is nothing to compare embeddings with under {', '.join(models)}: one-hot is left out of "
            "wide tables and native categories are for LightGBM only; add another encoding, such as 'target'"
        )
    parts = []
    with (
        _bar(len(folds) * len(pairs(encodings, models)), progress) as bar,
        config_context(transform_output="default", enable_metadata_routing=False),
    ):
        for i, (train, test) in enumerate(folds):
            scores = compare(
                _take(whole, train, test, keys.get("groups")),
                _estimator(whole, random_state, parameters),
                encodings=encodings,
                models=models,
                random_state=random_state,
                n_jobs=n_jobs,
                progress=lambda steps: _counted(steps, bar),
            )
            parts.append(scores.assign(fold=i, n_train=len(train), n_test=len(test)))
    return Evaluation(pd.concat(parts, ignore_index=True))


def _read(
    X: Any,
    y: Any,
    categorical_features: str | Sequence[str],
    target_type: str,
    keys: dict[str, Any],
) -> tuple[Problem, dict[str, np.ndarray]]:
    """The whole table as a problem, and what its rows are split by."""
    from embedkit.learning.targets import as_targets, make_heads

    table = to_table(X)
    targets, target_names, single = as_targets(y)
    if not single:
        raise InputError(f"one target is compared at a time, got {target_names}: give one column")
    _check_length("y", targets, table.num_rows)
    (head,) = make_heads(targets, target_names, target_type)
    columns = [key for key in keys.values() if isinstance(key, str)]
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise InputError(f"X has no column {absent}{did_you_mean(absent, table.column_names)} to split by")
    values = {
        name: _key((X if isinstance(X, pd.DataFrame) else table)[key] if isinstance(key, str) else key)
        for name, key in keys.items()
        if key is not None
    }
    for name, array in values.items():
        _check_length(name, array, table.num_rows)
        if pd.isna(array).any():
            raise InputError(f"{name} is missing in {pd.isna(array).sum()} row(s): drop these rows")
    table = table.drop_columns(list(dict.fromkeys(columns)))
    roles = choose_roles(table, categorical_features, typed=not is_array(X))
    # With integers as they are, where some are missing too: floats do not tell all of them apart.
    frame = table.select(roles.categorical).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    frame[list(roles.numeric)] = numeric_block(table, roles.numeric)
    target = targets[:, 0].astype(np.float64) if head.kind == "continuous" else targets[:, 0]
    kind = KINDS[head.kind]
    return Problem(frame, target, frame, target, list(roles.categorical), list(roles.numeric), kind), values


def _key(values: Any) -> np.ndarray:
    """What rows are split by; ordered categories as their places in that order."""
    values = values.to_arrow() if hasattr(values, "to_arrow") else values  # of polars
    values = values.to_pandas() if isinstance(values, (pa.Array, pa.ChunkedArray)) else values
    if not isinstance(getattr(values, "dtype", None), pd.CategoricalDtype):
        return np.asarray(values)
    if not values.dtype.ordered:
        return np.asarray(values.astype(object))
    codes = pd.Series(values).cat.codes
    return codes.where(codes >= 0).to_numpy()


def _check_length(name: str, values: np.ndarray, num_rows: int) -> None:
    if len(values) != num_rows:
        raise InputError(f"{name} has {len(values)} rows, X has {num_rows}: give one for each row")


def _take(whole: Problem, train: np.ndarray, test: np.ndarray, groups: np.ndarray | None = None) -> Problem:
    """Some rows to learn from, and some to be judged on."""
    X, y = whole.X_train, whole.y_train
    return replace(
        whole,
        X_train=X.iloc[train],
        y_train=y[train],
        X_test=X.iloc[test],
        y_test=y[test],
        groups=None if groups is None else groups[train],
    )


def _split(
    whole: Problem,
    n_folds: int,
    random_state: int,
    groups: np.ndarray | None = None,
    time: np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions of training and test rows of each fold."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

    X, y = whole.X_train, whole.y_train
    if groups is not None and time is not None:
        raise InputError("folds are made by groups or by time, not by both: give one of them")
    if groups is not None and (n_groups := len(np.unique(groups))) < n_folds:
        raise InputError(f"{n_folds} folds need as many groups, found {n_groups}: ask for fewer")
    if len(y) <= n_folds:
        raise InputError(f"{n_folds} folds need more than {n_folds} rows, found {len(y)}: ask for fewer")
    if time is not None:
        return _split_by_time(_as_times(time), n_folds)
    if groups is not None:
        return list(GroupKFold(n_folds, shuffle=True, random_state=random_state).split(X, y, groups))
    if whole.kind != "regression":
        labels, counts = np.unique(y, return_counts=True)
        if counts.min() < n_folds:
            raise InputError(
                f"class {str(labels[counts.argmin()])!r} has {counts.min()} row(s), {n_folds} folds need as "
                "many: drop the class or ask for fewer folds"
            )
    folds = KFold if whole.kind == "regression" else StratifiedKFold
    return list(folds(n_folds, shuffle=True, random_state=random_state).split(X, y))


def _as_times(time: np.ndarray) -> np.ndarray:
    """Text as dates: only some of it sorts as these do."""
    if not pd.api.types.is_string_dtype(pd.Series(time)):
        return time
    try:
        return pd.to_datetime(pd.Series(time), format="ISO8601").to_numpy()
    except (ValueError, TypeError) as error:
        raise InputError(
            f"time holds text such as {str(time[0])!r}, which does not sort by time: turn it into dates, or "
            "into text such as 2013-01-31"
        ) from error


def _split_by_time(time: np.ndarray, n_folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds of about as many rows each, tested on what comes later; rows of one moment stay together."""
    order = np.argsort(time, kind="stable")
    ordered = time[order]
    size = len(order) // (n_folds + 1)
    cuts = []
    for cut in range(len(order) - n_folds * size, len(order), size):
        before, after = (int(np.searchsorted(ordered, ordered[cut], side)) for side in ("left", "right"))
        cuts.append(before if cut - before <= after - cut else after)
    cuts.append(len(order))
    if min(np.diff([0, *cuts])) < 2:
        raise InputError(
            f"rows cannot be split into {n_folds} folds of different times, as too many have the same: "
            "ask for fewer folds, or split by a finer time"
        )
    return [(order[:start], order[start:stop]) for start, stop in pairwise(cuts)]


def _estimator(whole: Problem, random_state: int, parameters: dict[str, Any]) -> Any:
    from embedkit.predictors import EntityEmbeddingClassifier, EntityEmbeddingRegressor

    kind = EntityEmbeddingRegressor if whole.kind == "regression" else EntityEmbeddingClassifier
    return kind(whole.categorical, random_state=random_state, **parameters)


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="comparing", unit="model", disable=not shown, leave=False)


def _counted(steps: Iterable[Any], bar: Any) -> Iterator[Any]:
    for step in steps:
        yield step
        bar.update()
