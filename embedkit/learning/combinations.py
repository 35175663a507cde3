"""Numbers for combinations of categories: which pairs of columns get them, and what they are.

They are learned beside the vectors; the network knows nothing of them.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F

from embedkit.crosses import Cross, pair_keys
from embedkit.learning.data import Rows
from embedkit.learning.jackknife import coded_rows
from embedkit.learning.learned import Learned, Task
from embedkit.learning.losses import output_gradients
from embedkit.learning.network import build, predict

# Of a standard deviation of the target: trees see it, distances do not, as with ranks.
SCALE = 0.01
# Combinations in fewer rows say too little.
MIN_ROWS = 1_000
# Rows beyond the first of each combination: fewer do not tell what chance does, nor thus what it explains.
MIN_REPEATS = 100
# Rows by which pairs are chosen: more would take longer and tell the same.
MAX_ROWS = 50_000
CHOOSING_FOLDS = 5


def with_crosses(learned: Learned, task: Task) -> Learned:
    """Add the numbers of as many pairs as the settings ask for, in the order of `order_pairs`.

    Fewer than 1,000 rows have none. A pair is left out where its column would have the name of another one,
    its combinations hardly repeat, or chance seems to explain all that they differ by.
    """
    rows = coded_rows(learned, task)
    codes, outputs, weights = _numbers(learned, rows)
    present = np.flatnonzero(weights > 0)
    if len(present) < MIN_ROWS:
        return learned
    sample = np.random.default_rng(task.settings.seed).permutation(present)[:MAX_ROWS]
    residuals = _residuals(learned, rows.take(torch.as_tensor(sample)))
    features = [part.feature for part in learned.tables]
    taken = {name for part in (*learned.tables, *learned.numerics) for name in part.feature_names_out}
    taken |= {*features, *learned.inputs.features, *(head.name for head in learned.heads)}
    crosses: list[Cross] = []
    for pair in order_pairs(codes[sample], residuals, weights[sample]):
        if len(crosses) == task.settings.crosses:
            break
        cross = learn_cross(tuple(features[i] for i in pair), codes[:, pair], outputs, weights)
        repeats = cross.counts.sum() - len(cross.pairs)
        if repeats >= MIN_REPEATS and cross.effects.any() and not taken & {*cross.feature_names_out}:
            crosses.append(cross)
            taken |= {*cross.feature_names_out}
    return replace(learned, crosses=tuple(crosses))


def rows_without_themselves(
    learned: Learned, task: Task, test: np.ndarray, cells: np.ndarray, excluded: np.ndarray
) -> dict[str, np.ndarray]:
    """The numbers of a task's rows learned without their folds, by the first column of each cross.

    For the folds see `embedkit.folds.Folds`.
    """
    if not learned.crosses:
        return {}
    codes, outputs, weights = _numbers(learned, coded_rows(learned, task))
    places = {part.feature: i for i, part in enumerate(learned.tables)}
    return {
        cross.feature_names_out[0]: cross_fitted_effects(
            codes[:, [places[name] for name in cross.features]], outputs, weights, test, cells, excluded
        )
        for cross in learned.crosses
    }


def _numbers(learned: Learned, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, targets and weights of rows; of targets standardised numbers, or a column for every class.

    Of shapes (n_rows, n_features), (n_rows, n_outputs) and (n_rows,).
    """
    columns = [
        F.one_hot(column.long(), head.n_outputs) if head.kind == "multiclass" else column[:, None]
        for head, column in zip(learned.heads, rows.targets.T, strict=True)
    ]
    return rows.codes.numpy(), torch.hstack(columns).double().numpy(), rows.weights.double().numpy()


def _residuals(learned: Learned, rows: Rows) -> np.ndarray:
    """The numbers of the targets less what the network makes of the rows, (n_rows, n_outputs)."""
    outputs = predict(build(learned.shape, learned.weights), rows.codes.numpy(), rows.numeric.numpy())
    noise = torch.ones(len(learned.heads))
    return -output_gradients(learned.heads, torch.as_tensor(outputs), rows.targets, noise).numpy()


def order_pairs(codes: np.ndarray, residuals: np.ndarray, weights: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of columns, first those whose combinations tell most of what the network leaves unexplained.

    Judged by how much of it their numbers explain on rows that they were learned without.

    Parameters
    ----------
    codes : int array of shape (n_rows, n_features)
    residuals : float64 array of shape (n_rows, n_outputs)
    weights : float64 array of shape (n_rows,)
    """
    test, excluded = np.arange(len(codes)) % CHOOSING_FOLDS, np.eye(CHOOSING_FOLDS, dtype=bool)

    def left(i: int, j: int) -> float:
        keys = pair_keys(codes[:, i], codes[:, j])
        found = _cross_fitted(keys, residuals, weights, test, test, excluded)
        return float((weights @ (residuals - found) ** 2).sum())

    pairs = list(combinations(range(codes.shape[1]), 2))
    return [pairs[i] for i in np.argsort([left(*pair) for pair in pairs], kind="stable")]


def learn_cross(
    features: tuple[str, str], codes: np.ndarray, outputs: np.ndarray, weights: np.ndarray
) -> Cross:
    """The numbers of all combinations in the rows; for the parameters see `order_pairs`, of two columns."""
    keys, place = np.unique(pair_keys(*codes.T), return_inverse=True)
    counts, sums, squares = _sums(place, np.zeros_like(place), (len(keys), 1), outputs, weights)
    effects = _shrunk(counts, sums, squares)[:, 0] * SCALE
    kept = counts[:, 0] > 0
    pairs = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
    return Cross(features, pairs[kept], counts[kept, 0], effects[kept])


def cross_fitted_effects(
    codes: np.ndarray,
    outputs: np.ndarray,
    weights: np.ndarray,
    test: np.ndarray,
    cells: np.ndarray,
    excluded: np.ndarray,
) -> np.ndarray:
    """What `learn_cross` gives to rows of combinations learned without them, (n_rows, n_outputs)."""
    found = _cross_fitted(pair_keys(*codes.T), outputs, weights, test, cells, excluded)
    return (found * SCALE).astype(np.float32)


def _cross_fitted(
    keys: np.ndarray,
    outputs: np.ndarray,
    weights: np.ndarray,
    test: np.ndarray,
    cells: np.ndarray,
    excluded: np.ndarray,
) -> np.ndarray:
    keys, place = np.unique(keys, return_inverse=True)
    counts, sums, squares = _sums(place, cells, (len(keys), excluded.shape[1]), outputs, weights)
    kept = (~excluded).T.astype(np.float64)  # (n_cells, n_choices)
    effects = _shrunk(counts @ kept, np.einsum("pco,cf->pfo", sums, kept), kept.T @ squares)
    return effects[place, test]


def _sums(
    place: np.ndarray, cells: np.ndarray, shape: tuple[int, int], outputs: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights and weighted outputs by combination and cell, and weighted squares by cell."""
    slots = place * shape[1] + cells
    counts = np.bincount(slots, weights, shape[0] * shape[1]).reshape(shape)
    sums = [np.bincount(slots, weights * part, counts.size).reshape(shape) for part in outputs.T]
    squares = [np.bincount(cells, weights * part**2, shape[1]) for part in outputs.T]
    return counts, np.stack(sums, axis=2), np.stack(squares, axis=1)


def _shrunk(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Means of combinations less that of all rows, as far as chance does not explain them.

    The best linear prediction of a random effect; its variance and that of the rows follow from sums of
    squares (Searle, Casella & McCulloch, Variance Components, 1992, section 3.6).

    Parameters
    ----------
    counts : array of shape (n_pairs, n_choices)
    sums : array of shape (n_pairs, n_choices, n_outputs)
    squares : array of shape (n_choices, n_outputs)

    Returns
    -------
    float64 array of shape (n_pairs, n_choices, n_outputs)
    """
    counts = counts[:, :, None]
    least = np.finfo(float).tiny
    total, n_found = np.maximum(counts.sum(axis=0), least), (counts > 0).sum(axis=0)  # (n_choices, 1)
    mean = sums.sum(axis=0) / total
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    means = np.where(counts > 0, means - mean, 0.0)
    between = (counts * means**2).sum(axis=0)  # (n_choices, n_outputs)
    noise = np.maximum(squares - total * mean**2 - between, 0) / np.maximum(total - n_found, 1)
    freedom = np.maximum(total - (counts**2).sum(axis=0) / total, least)
    spread = np.maximum(between - (n_found - 1) * noise, 0) / freedom
    return means * counts * spread / np.maximum(counts * spread + noise, least)
