"""Where a network is wrong: the rows with the highest loss, and the categories behind them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from embedkit.errors import InputError
from embedkit.frames import to_list

if TYPE_CHECKING:
    from embedkit.learning.targets import Head
    from embedkit.predictors import EntityEmbeddingClassifier, EntityEmbeddingRegressor

    Predictor = EntityEmbeddingClassifier | EntityEmbeddingRegressor


def top_losses(estimator: "Predictor", X: Any, y: Any, k: int = 20) -> pd.DataFrame:
    """The rows that a fitted estimator predicts worst; see `EntityEmbeddingClassifier.top_losses`."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"k must be a whole number of at least 1, got {k!r}")
    table = estimator._read(X, reset=False)
    outputs, targets = estimator._outputs(table), estimator._targets(y, table.num_rows)
    losses = _losses(estimator, outputs, targets)
    rows = np.argsort(-losses, kind="stable")[:k]
    columns = {"row": rows, "loss": losses[rows]}
    heads = estimator._learned.heads
    for i, head in enumerate(heads):
        suffix = "" if len(heads) == 1 else f"_{head.name}"
        columns[f"target{suffix}"] = targets[rows, i]
        columns |= dict(_predictions(head, outputs[i][rows], suffix))
    worst = table.take(rows)
    inputs = {}
    for part in estimator._learned.tables:
        inputs[part.feature] = _cells(worst[part.feature])
        inputs[f"{part.feature}_count"] = part.counts[part.encode(worst[part.feature])]
    for name in estimator._learned.inputs.features:
        inputs[name] = worst[name].to_pandas()
    # Side by side, so that a column of X may have the name of one of ours.
    return pd.concat([pd.DataFrame(columns), pd.DataFrame(inputs)], axis=1)


def category_losses(estimator: "Predictor", X: Any, y: Any) -> pd.DataFrame:
    """The loss behind each category; see `EntityEmbeddingClassifier.category_losses`."""
    table = estimator._read(X, reset=False)
    losses = _losses(estimator, estimator._outputs(table), estimator._targets(y, table.num_rows))
    frames = []
    for part in estimator._learned.tables:
        codes = part.encode(table[part.feature])
        rows = np.bincount(codes, minlength=part.num_embeddings)
        total = np.bincount(codes, weights=losses, minlength=part.num_embeddings)
        seen = np.flatnonzero(rows)
        labels = part.vocabulary.labels()
        frames.append(
            pd.DataFrame(
                {
                    "feature": part.feature,
                    "category": [labels[code] for code in seen],
                    "count": part.counts[seen],
                    "rows": rows[seen],
                    "mean_loss": total[seen] / rows[seen],
                    "total_loss": total[seen],
                    "excess_loss": total[seen] - rows[seen] * losses.mean(),
                }
            )
        )
    found = pd.concat(frames, ignore_index=True)
    return found.sort_values("excess_loss", ascending=False, kind="stable", ignore_index=True)


def _cells(column: pa.ChunkedArray) -> pd.Series:
    try:
        return column.to_pandas()
    except (OverflowError, ValueError):  # a time or a date that pandas cannot hold
        return pd.Series(to_list(column))


def _losses(estimator: "Predictor", outputs: list[np.ndarray], targets: np.ndarray) -> np.ndarray:
    heads = estimator._learned.heads
    parts = [
        head.losses(part, targets[:, i]) for i, (head, part) in enumerate(zip(heads, outputs, strict=True))
    ]
    losses = np.sum(parts, axis=0)
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise InputError(f"the target is missing or infinite in {len(bad)} row(s), the first is row {bad[0]}")
    return losses


def _predictions(head: "Head", outputs: np.ndarray, suffix: str) -> Iterator[tuple[str, np.ndarray]]:
    """What is predicted, and the probability of each class by its name."""
    yield f"prediction{suffix}", head.decode(outputs)
    if head.classes is not None:
        for label, column in zip(head.classes, head.probabilities(outputs).T, strict=True):
            yield f"probability{suffix}_{label}", column
