"""What changed between two versions of a set: categories added, gone, and moved."""

import os
from typing import TYPE_CHECKING

import numpy as np

from embedkit.columns import EmbeddingTable
from embedkit.tables import EmbeddingSet
from embedkit.vocabulary import FIRST, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd


def drift(
    old: EmbeddingSet | str | os.PathLike,
    new: EmbeddingSet | str | os.PathLike,
    *,
    old_version: str | None = None,
    new_version: str | None = None,
) -> "pd.DataFrame":
    """Compare two sets, category by category.

    Canonical axes have the network's own metric, but two trainings may turn or mirror them. The new vectors
    are therefore laid over the old ones by the best rotation about the mean (orthogonal Procrustes, weighted
    by counts), which keeps all distances; what is left is what moved. Tables of different width are filled up
    with zeros. Where all vectors are the same to the last bit, all distances are 0. Crosses are not compared.

    Parameters
    ----------
    old, new : EmbeddingSet, path or URI
        Stored sets may be two versions of one.
    old_version, new_version : str, optional
        Of stored sets; the current ones by default.

    Returns
    -------
    DataFrame
        A row per feature and category, "(missing)" and "(unknown)" among them: ``feature, category`` (as
        text), ``change`` ("added", "gone" or "kept"), ``old_count, new_count`` (rows behind the vector; NaN
        where there is none), ``distance`` (Euclidean, NaN unless kept) and ``moved``: the distance in units
        of the old table's spread (root mean squared distance from its mean, weighted by counts). Features in
        order, and in them the added, the gone, then the farthest moved first.

    Raises
    ------
    InputError
        If a feature has categories of another type now, so that none can be the same.
    StoreError
        If a stored set is damaged or not there.

    References
    ----------
    Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31, 1966.
    """
    import pandas as pd

    old = old if isinstance(old, EmbeddingSet) else EmbeddingSet.load(old, old_version)
    new = new if isinstance(new, EmbeddingSet) else EmbeddingSet.load(new, new_version)
    features = [*old, *(feature for feature in new if feature not in old)]
    return pd.concat([_compare(old.get(name), new.get(name)) for name in features], ignore_index=True)


def _compare(old: EmbeddingTable | None, new: EmbeddingTable | None) -> "pd.DataFrame":
    """The rows of one feature."""
    import pandas as pd

    if old is None or new is None:
        table, change = (new, "added") if old is None else (old, "gone")
        listed = np.flatnonzero((np.arange(table.num_embeddings) >= FIRST) | (table.counts > 0))
        counts = (None, table.counts) if old is None else (table.counts, None)
        return _rows(table, listed, change, *counts)
    # Where each row of the new table was in the old one; the reserved rows are what they were.
    found = np.concatenate([np.arange(FIRST), old.vocabulary.encode(new.categories)])
    added = np.flatnonzero((found == UNKNOWN) & (np.arange(len(found)) >= FIRST))
    kept = np.setdiff1d(np.arange(len(found)), added)
    kept = kept[(kept >= FIRST) | (new.counts[kept] > 0) | (old.counts[found[kept]] > 0)]
    gone = np.setdiff1d(np.arange(FIRST, old.num_embeddings), found[kept])
    distance = _distances(old, new, found[kept], kept)
    spread = _spread(old)
    rows = _rows(new, kept, "kept", old.counts[found], new.counts).assign(
        distance=distance, moved=distance / spread if spread else np.where(distance > 0, np.inf, 0.0)
    )
    return pd.concat(
        [
            _rows(new, added, "added", None, new.counts),
            _rows(old, gone, "gone", old.counts, None),
            rows.sort_values("distance", ascending=False, kind="stable"),
        ]
    )


def _rows(
    table: EmbeddingTable,
    codes: np.ndarray,
    change: str,
    old_counts: np.ndarray | None,
    new_counts: np.ndarray | None,
) -> "pd.DataFrame":
    import pandas as pd

    labels = table.vocabulary.labels()
    return pd.DataFrame(
        {
            "feature": table.feature,
            "category": pd.Series([labels[code] for code in codes], dtype=str),
            "change": change,
            "old_count": np.nan if old_counts is None else old_counts[codes].astype(np.float64),
            "new_count": np.nan if new_counts is None else new_counts[codes].astype(np.float64),
            "distance": np.nan,
            "moved": np.nan,
        }
    )


def _distances(
    old: EmbeddingTable, new: EmbeddingTable, old_codes: np.ndarray, new_codes: np.ndarray
) -> np.ndarray:
    """How far rows moved, after the best rotation of the new ones."""
    width = max(old.learned_vectors.shape[1], new.learned_vectors.shape[1])
    before, after = (
        np.pad(vectors[codes].astype(np.float64), ((0, 0), (0, width - vectors.shape[1])))
        for vectors, codes in ((old.learned_vectors, old_codes), (new.learned_vectors, new_codes))
    )
    if np.array_equal(before, after):
        return np.zeros(len(before))
    weights = np.minimum(old.counts[old_codes], new.counts[new_codes]).astype(np.float64)
    weights = weights if weights.any() else np.ones(len(weights))
    before -= np.average(before, axis=0, weights=weights)
    after -= np.average(after, axis=0, weights=weights)
    left, _, right = np.linalg.svd(after.T @ (weights[:, None] * before))
    return np.linalg.norm(after @ (left @ right) - before, axis=1)


def _spread(table: EmbeddingTable) -> float:
    vectors, weights = table.learned_vectors.astype(np.float64), table.counts
    weights = weights if weights.any() else np.ones(len(weights))
    centred = vectors - np.average(vectors, axis=0, weights=weights)
    return float(np.sqrt(np.average((centred**2).sum(axis=1), weights=weights)))
