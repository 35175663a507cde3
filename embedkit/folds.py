"""Folds: which rows each row must not have been learned from, and tables that were learned without some."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embedkit.errors import InputError

if TYPE_CHECKING:
    from embedkit.learning.jackknife import Evidence


@dataclass(frozen=True)
class Folds:
    """Which rows each row must not have been learned from.

    Attributes
    ----------
    test : int array of shape (n_rows,)
        Fold that encodes each row.
    cells : int array of shape (n_rows,)
        Rows of one cell are in the same folds.
    excluded : bool array of shape (n_folds, n_cells)
        Cells that a fold's tables are learned without.
    """

    test: np.ndarray
    cells: np.ndarray
    excluded: np.ndarray

    def take(self, index: np.ndarray) -> "Folds":
        """Those of some of the rows."""
        return Folds(self.test[index], self.cells[index], self.excluded)


def check_cross_fit(cross_fit: Any) -> None:
    """Raise InputError where a parameter `cross_fit` says nothing about folds."""
    if isinstance(cross_fit, (str, bytes, bool)):  # the first two can split, too
        known = cross_fit is False or cross_fit == "auto"
    else:
        known = isinstance(cross_fit, (int, np.integer)) or hasattr(cross_fit, "split")
    if not known:
        raise InputError(f"cross_fit must be 'auto', False, a number or a splitter, got {cross_fit!r}")


def make_folds(cross_fit: Any, y: np.ndarray, groups: Any, seed: int) -> Folds:
    """Folds from a number or a splitter.

    Parameters
    ----------
    cross_fit : int or splitter of scikit-learn
        A number makes random folds, of whole groups where there are groups.
    y : ndarray of shape (n_rows,) or (n_rows, n_targets)
    groups : array of shape (n_rows,) or None
    seed : int

    Raises
    ------
    InputError
        If `cross_fit` is neither, or tests a row twice, or one that it trains on.
    """
    from sklearn.model_selection import GroupKFold, KFold

    n_rows = len(y)
    check_cross_fit(cross_fit)
    if isinstance(cross_fit, (int, np.integer)):
        most, what = (n_rows, "rows") if groups is None else (len(np.unique(groups)), "groups")
        if not 2 <= cross_fit <= most:
            raise InputError(f"cross_fit must be at least 2 and at most {most} {what}, got {cross_fit}")
        kind = KFold if groups is None else GroupKFold
        cross_fit = kind(int(cross_fit), shuffle=True, random_state=seed)
    test = np.full(n_rows, -1)
    learned_from = []
    for fold, (train, held) in enumerate(cross_fit.split(np.empty((n_rows, 1)), y, groups)):
        if (test[held] >= 0).any():
            raise InputError("cross_fit tests a row twice: give a splitter that tests each row once at most")
        test[held] = fold
        learned_from.append(np.isin(np.arange(n_rows), train))
        if learned_from[-1][held].any():
            raise InputError("cross_fit tests rows that it trains on: give a splitter that keeps them apart")
    # Rows that no fold tests, as the oldest of a split by time, are encoded without one another.
    if (test < 0).any():
        learned_from.append(test >= 0)
        test[test < 0] = len(learned_from) - 1
    membership = np.stack(learned_from, axis=1)
    patterns, cells = np.unique(membership, axis=0, return_inverse=True)
    return Folds(test, cells.reshape(-1), ~patterns.T)


def blocks_in_order(present: np.ndarray, n_blocks: int) -> Folds:
    """Folds of rows that come one after another, equal shares of those that are present.

    Where rows come in the order of time, what passes with time tells nothing about a row's own block.
    """
    block = (np.cumsum(present) - 1).clip(min=0) * n_blocks // max(int(present.sum()), 1)
    return Folds(block, block, np.eye(n_blocks, dtype=bool))


def look_up(
    evidence: Sequence["Evidence"], codes: np.ndarray, which: np.ndarray, excluded: np.ndarray
) -> list[np.ndarray]:
    """Vectors of rows from tables that were learned without some cells.

    Parameters
    ----------
    evidence : sequence of Evidence
        One per table.
    codes : int array of shape (n_rows, n_tables)
    which : int array of shape (n_rows,)
        Row of `excluded` that is for each row.
    excluded : bool array of shape (n_choices, n_cells)

    Returns
    -------
    list of float32 array of shape (n_rows, width)
        One per table.
    """
    result = [np.empty((len(codes), part.vectors.shape[1]), dtype=np.float32) for part in evidence]
    for choice in np.unique(which):
        here = np.flatnonzero(which == choice)
        for i, part in enumerate(evidence):
            result[i][here] = part.without(excluded[choice])[codes[here, i]]
    return result


def rows_present(weights: np.ndarray | None, n_rows: int) -> np.ndarray:
    """Which rows exist: those of weight 0 do not."""
    return np.ones(n_rows, dtype=bool) if weights is None else weights > 0


def check_groups(groups: Any, n_rows: int) -> np.ndarray:
    """Groups of shape (n_rows,); objects, which may not be sortable, as numbers.

    Raises
    ------
    InputError
        If there is not one for each row, or they are lists or the like.
    """
    import pandas as pd

    groups = np.asarray(groups)
    if groups.shape != (n_rows,):
        raise InputError(f"groups must have one entry for each of {n_rows} rows, got {groups.shape=}")
    try:
        numbers, _ = pd.factorize(groups, sort=True)
    except TypeError as error:
        raise InputError(f"groups holds what cannot be compared ({error}): give numbers or text") from error
    if (numbers < 0).any():
        raise InputError(f"groups is missing in {(numbers < 0).sum()} row(s): give these rows a group too")
    return numbers if groups.dtype == object else groups
