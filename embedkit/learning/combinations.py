"""Numbers for combinations of categories: which pairs of columns get them, and what they are.

They are learned beside the vectors; the network knows nothing of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F

from embedkit.crosses import Cross, pair_keys
from embedkit.folds import Folds, blocks_in_order, make_folds, rows_present
from embedkit.learning.data import Rows
from embedkit.learning.jackknife import coded_rows
from embedkit.learning.learned import Learned, Task
from embedkit.learning.losses import output_gradients
from embedkit.learning.network import build, predict
from embedkit.learning.targets import Head

# What a standard deviation of the target is of the spread of the vectors: KNN, which sees it, gains by it as
# a rule. "auto" measures whether it gains more than its error by another; at the first one KNN sees nothing.
VIEW = 0.6
VIEWS = (0.01, VIEW, 1.2, 2.4, 4.8)
# Combinations in fewer rows say too little.
MIN_ROWS = 1_000
# Rows beyond the first of each combination: fewer do not tell what chance does, nor thus what it explains.
MIN_REPEATS = 100
# Rows by which pairs are chosen: more would take longer and tell the same.
MAX_ROWS = 50_000
# Columns whose pairs are looked at, those of the widest spread: of 25 there are 300.
MAX_COLUMNS = 25
N_BLOCKS = 5
# How many pairs "auto" takes where they pay, and how many numbers they have at most.
AUTO_PAIRS, MAX_NUMBERS = 8, 32
# Rows are in the order of a target where blocks of them differ by so much of what they could.
SORTED = 0.5


def with_crosses(learned: Learned, task: Task) -> Learned:
    """Add the numbers of as many pairs as the settings ask for; fewer than 1,000 rows have none."""
    n_pairs = task.settings.pairs_asked_for
    if not n_pairs or task.table.num_rows < MIN_ROWS:
        return learned
    rows, seed = coded_rows(learned, task), task.settings.seed
    return replace(learned, crosses=learn_crosses(learned, rows, n_pairs, blocks_of(task), seed))


def blocks_of(task: Task) -> Folds:
    """Folds that combinations are judged and encoded by: blocks of rows in the order given.

    They are random where the order is that of a target: what a block holds no other one would have learned.
    """
    present = rows_present(task.sample_weight, task.table.num_rows)
    columns = zip(task.heads, task.targets[present].T, strict=True)
    if present.sum() >= MIN_ROWS and any(_goes_with_order(*column) for column in columns):
        return make_folds(N_BLOCKS, task.targets, None, task.settings.seed)
    return blocks_in_order(present, N_BLOCKS)


def _goes_with_order(head: Head, targets: np.ndarray) -> bool:
    """Whether a target differs between blocks of rows by more than half as much as a sorted one would."""
    numbers = head.encode(targets)

    def between(numbers: np.ndarray) -> float:
        is_number = head.kind == "continuous"
        columns = numbers[:, None] if is_number else np.eye(len(head.classes))[numbers.astype(int)]
        means = [part.mean(axis=0) for part in np.array_split(columns, N_BLOCKS)]
        return float(np.var(means, axis=0).sum())

    return between(numbers) > SORTED * between(np.sort(numbers))


def auto_pairs(heads: Sequence[Head]) -> int:
    """How many pairs "auto" takes where they pay: fewer where each has a number for many classes."""
    return min(AUTO_PAIRS, MAX_NUMBERS // sum(head.n_outputs for head in heads))


def learn_crosses(
    learned: Learned, rows: Rows, n_pairs: int, folds: Folds, seed: int, view: float = VIEW
) -> tuple[Cross, ...]:
    """The numbers of at most so many pairs, in the order of `order_pairs`.

    Fewer than 1,000 rows have none. A pair is left out where its column would have the name of another one,
    its combinations hardly repeat, or chance seems to explain all that they differ by; and where there are
    more than 25 columns, unless it is of the 25 whose vectors spread the most.
    """
    codes, outputs, weights = _numbers(learned, rows, view)
    present = np.flatnonzero(weights > 0)
    if len(present) < MIN_ROWS:
        return ()
    sample = np.random.default_rng(seed).permutation(present)[:MAX_ROWS]
    residuals = _residuals(learned, rows.take(torch.as_tensor(sample)))
    features = [part.feature for part in learned.tables]
    taken = {name for part in (*learned.tables, *learned.numerics) for name in part.feature_names_out}
    taken |= {*features, *learned.inputs.features, *(head.name for head in learned.heads)}
    taken = {name.lower() for name in taken}  # where only the case differs, databases see no difference
    spread = [-part.learned_vectors.var(axis=0).sum() for part in learned.tables]
    widest = np.sort(np.argsort(spread, kind="stable")[:MAX_COLUMNS])
    judged = codes[np.ix_(sample, widest)], residuals, weights[sample], folds.take(sample)
    crosses: list[Cross] = []
    for places in order_pairs(*judged):
        if len(crosses) == n_pairs:
            break
        pair = widest[[*places]]
        cross = learn_cross(tuple(features[i] for i in pair), codes[:, pair], outputs, weights)
        names = {name.lower() for name in (cross.name, *cross.feature_names_out)}
        repeats = cross.counts.sum() - len(cross.pairs)
        if repeats >= MIN_REPEATS and cross.effects.any() and not taken & names:
            crosses.append(cross)
            taken |= names
    return tuple(crosses)


def rows_without_themselves(
    learned: Learned, rows: Rows, crosses: Iterable[Cross], folds: Folds, view: float = VIEW
) -> dict[str, np.ndarray]:
    """By the name of each cross its numbers of the rows that it was learned from, without their folds."""
    codes, outputs, weights = _numbers(learned, rows, view)
    places = {part.feature: i for i, part in enumerate(learned.tables)}
    return {
        cross.name: cross_fitted_effects(
            codes[:, [places[name] for name in cross.features]], outputs, weights, folds
        )
        for cross in crosses
    }


def _numbers(learned: Learned, rows: Rows, view: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, targets and weights of rows; of targets a number, or one for every class, as distances see them.

    Of shapes (n_rows, n_features), (n_rows, n_outputs) and (n_rows,).
    """
    weights, columns = rows.weights.double(), []
    unit = view * (_spread(learned) or 1.0)
    for head, column in zip(learned.heads, rows.targets.T, strict=True):
        part = F.one_hot(column.long(), head.n_outputs) if head.kind == "multiclass" else column[:, None]
        part = part.double()
        mean = weights @ part / weights.sum()
        variance = float((weights @ (part - mean).square()).sum() / weights.sum())
        columns.append(part * (unit / (variance**0.5 or 1.0)))
    return rows.codes.numpy(), torch.hstack(columns).numpy(), weights.numpy()


def _spread(learned: Learned) -> float:
    """Root mean squared distance of the rows' vectors from their mean."""
    variance = 0.0
    for part in learned.tables:
        share = part.counts / part.counts.sum()
        variance += share @ np.square(part.learned_vectors - share @ part.learned_vectors).sum(axis=1)
    return float(variance**0.5)


def _residuals(learned: Learned, rows: Rows) -> np.ndarray:
    """The numbers of the targets less what the network makes of the rows, (n_rows, n_outputs)."""
    outputs = predict(build(learned.shape, learned.weights), rows.codes.numpy(), rows.numeric.numpy())
    noise = torch.ones(len(learned.heads))
    return -output_gradients(learned.heads, torch.as_tensor(outputs), rows.targets, noise).numpy()


def order_pairs(
    codes: np.ndarray, residuals: np.ndarray, weights: np.ndarray, folds: Folds
) -> list[tuple[int, int]]:
    """Pairs of columns, first those whose combinations tell most of what the network leaves unexplained.

    Judged by how much of it their numbers explain on rows that they were learned without.

    Parameters
    ----------
    codes : int array of shape (n_rows, n_features)
    residuals : float64 array of shape (n_rows, n_outputs)
    weights : float64 array of shape (n_rows,)
    folds : Folds
    """

    def left(i: int, j: int) -> float:
        found = _cross_fitted(pair_keys(codes[:, i], codes[:, j]), residuals, weights, folds)
        return float((weights @ (residuals - found) ** 2).sum())

    pairs = list(combinations(range(codes.shape[1]), 2))
    return [pairs[i] for i in np.argsort([left(*pair) for pair in pairs], kind="stable")]


def learn_cross(
    features: tuple[str, str], codes: np.ndarray, outputs: np.ndarray, weights: np.ndarray
) -> Cross:
    """The numbers of all combinations in the rows; for the parameters see `order_pairs`, of two columns."""
    keys, place = np.unique(pair_keys(*codes.T), return_inverse=True)
    together = np.zeros_like(place)
    counts = _by_cell(place, together, (len(keys), 1), weights)
    effects = [
        _shrunk(counts, _by_cell(place, together, counts.shape, weights * part), weights @ part**2)
        for part in outputs.T
    ]
    kept = counts[:, 0] > 0
    pairs = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
    return Cross(features, pairs[kept], counts[kept, 0], np.hstack(effects)[kept])


def cross_fitted_effects(
    codes: np.ndarray, outputs: np.ndarray, weights: np.ndarray, folds: Folds
) -> np.ndarray:
    """What `learn_cross` gives to rows of combinations learned without them, (n_rows, n_outputs)."""
    return _cross_fitted(pair_keys(*codes.T), outputs, weights, folds).astype(np.float32)


def _cross_fitted(keys: np.ndarray, outputs: np.ndarray, weights: np.ndarray, folds: Folds) -> np.ndarray:
    keys, place = np.unique(keys, return_inverse=True)
    kept = (~folds.excluded).T.astype(np.float64)  # (n_cells, n_folds)
    shape = len(keys), len(kept)
    counts = _by_cell(place, folds.cells, shape, weights) @ kept
    found = np.empty(outputs.shape)
    for i, part in enumerate(outputs.T):  # side by side they would take too much memory
        sums = _by_cell(place, folds.cells, shape, weights * part) @ kept
        squares = np.bincount(folds.cells, weights * part**2, len(kept)) @ kept
        found[:, i] = _shrunk(counts, sums, squares)[place, folds.test]
    return found


def _by_cell(place: np.ndarray, cells: np.ndarray, shape: tuple[int, int], values: np.ndarray) -> np.ndarray:
    """Sums of values by combination and cell."""
    return np.bincount(place * shape[1] + cells, values, shape[0] * shape[1]).reshape(shape)


def _shrunk(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Means of combinations less that of all rows, as far as chance does not explain them.

    The best linear prediction of a random effect; its variance and that of the rows follow from sums of
    squares (Searle, Casella & McCulloch, Variance Components, 1992, section 3.6).

    Parameters
    ----------
    counts, sums : array of shape (n_pairs, n_folds)
        Weights, and weighted outputs.
    squares : array of shape (n_folds,), or a number
        Sums of weighted squares.

    Returns
    -------
    float64 array of shape (n_pairs, n_folds)
    """
    least = np.finfo(float).tiny
    total, n_found = np.maximum(counts.sum(axis=0), least), (counts > 0).sum(axis=0)  # (n_folds,)
    mean = sums.sum(axis=0) / total
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    means = np.where(counts > 0, means - mean, 0.0)
    between = (counts * means**2).sum(axis=0)
    noise = np.maximum(squares - total * mean**2 - between, 0) / np.maximum(total - n_found, 1)
    freedom = np.maximum(total - (counts**2).sum(axis=0) / total, least)
    spread = np.maximum(between - (n_found - 1) * noise, 0) / freedom
    spread *= total > n_found  # nothing repeats: what chance does is not known
    return means * counts * spread / np.maximum(counts * spread + noise, least)
