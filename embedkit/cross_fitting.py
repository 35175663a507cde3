"""Training rows encoded by vectors that were learned without them: the folds, and where it pays.

Vectors know the targets of the rows they were learned from. How much of that is noise that a model should not
see differs from column to column: a category of three rows repeats their targets, one of three thousand does
not, and where the targets have little noise the vectors are right to repeat them. So the choice is measured:
on a fold that is held out of the tables and of the models that are asked.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embedkit.errors import InputError
from embedkit.tables import EmbeddingSet

if TYPE_CHECKING:
    from embedkit.learning.cross_fit import Evidence
    from embedkit.learning.learned import Learned
    from embedkit.learning.targets import Head

N_FOLDS = 5
# Fewer rows do not tell which choice is better; more would take longer and tell the same. With not so many,
# several folds are held out in turn.
MIN_ROWS, MAX_ROWS, ENOUGH_ROWS = 1_000, 12_000, 20_000
# What a choice has to gain, in standard errors: the best of three tries gains so much by chance.
MIN_GAIN = 0.8
# Parts of the held-out rows, each judged by itself, which tell how sure a gain is.
N_BLOCKS = 5
N_TREES = {"forest": 20, "lightgbm": 60}


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
    if isinstance(cross_fit, (int, np.integer)) and not isinstance(cross_fit, bool):
        most, what = (n_rows, "rows") if groups is None else (len(np.unique(groups)), "groups")
        if not 2 <= cross_fit <= most:
            raise InputError(f"cross_fit must be at least 2 and at most {most} {what}, got {cross_fit}")
        kind = KFold if groups is None else GroupKFold
        cross_fit = kind(int(cross_fit), shuffle=True, random_state=seed)
    if not hasattr(cross_fit, "split"):
        raise InputError(
            "cross_fit must be 'auto', False, a number of folds or a splitter of scikit-learn, "
            f"got {cross_fit!r}"
        )
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


def plan_folds(inputs: tuple[Any, ...], cross_fit: Any, groups: Any) -> Folds | str:
    """The folds of `cross_fit_rows`, or why it cannot be measured whether they pay."""
    _, _, _, targets, weights, settings = inputs
    groups = None if groups is None else np.asarray(groups)
    if groups is not None and groups.shape != (len(targets),):
        raise InputError(f"groups must have one entry for each of {len(targets)} rows, got {groups.shape=}")
    if not isinstance(cross_fit, str):
        return make_folds(cross_fit, targets, groups, settings.seed)
    if cross_fit != "auto":
        raise InputError(f"cross_fit must be 'auto', False, a number or a splitter, got {cross_fit!r}")
    present = _present(weights, len(targets))
    n_rows = int(present.sum())
    if n_rows < MIN_ROWS:
        return f"{n_rows} rows are too few to measure it, {MIN_ROWS:,} are needed"
    groups = None if groups is None else groups[present]
    n_folds = N_FOLDS if groups is None else min(N_FOLDS, len(np.unique(groups)))
    if n_folds < 2:
        return "all rows are of one group, which leaves none to measure it on"
    folds = make_folds(n_folds, targets[present], groups, settings.seed)
    # Nothing is learned from rows of weight 0: any tables may encode them.
    test, cells = np.zeros((2, len(present)), dtype=np.int64)
    test[present], cells[present] = folds.test, folds.cells
    return Folds(test, cells, folds.excluded)


def cross_fit_rows(
    inputs: tuple[Any, ...], cross_fit: Any, groups: Any
) -> tuple["Learned", dict[str, np.ndarray]]:
    """Learn, and encode the rows that were learned from without themselves, where that pays.

    Parameters
    ----------
    inputs : tuple
        The arguments of `embedkit.learning.fit.learn`.
    cross_fit : "auto", int or splitter
    groups : array of shape (n_rows,) or None

    Returns
    -------
    learned : Learned
        With a record of what was done; columns that do harm have a table of zeros.
    vectors : dict of str to float32 array of shape (n_rows, width)
        The columns that are cross-fitted.
    """
    from embedkit.learning.cross_fit import alignment_residual, coded_rows, gather_evidence, silence
    from embedkit.learning.fit import learn, progress_bar

    table, _, _, targets, weights, settings = inputs
    folds = plan_folds(inputs, cross_fit, groups)
    learned = learn(*inputs)
    features = [part.feature for part in learned.tables]
    if isinstance(folds, str):
        return replace(learned, cross_fit=_record(features, (), (), {}, [], folds)), {}
    n_cells = folds.excluded.shape[1]
    rows = coded_rows(learned, table, targets, weights)
    evidence = gather_evidence(learned, rows, folds.cells, n_cells, settings.seed)
    codes = rows.codes.numpy()
    found = dict(zip(features, look_up(evidence, codes, folds.test, folds.excluded), strict=True))
    present = _present(weights, table.num_rows)
    residuals = {
        part.feature: alignment_residual(part.vectors[codes[present, i]], found[part.feature][present])
        for i, part in enumerate(learned.tables)
    }
    chosen, harmful, scores, reason = features, [], [], "asked for"
    if isinstance(cross_fit, str):
        n_pilots = min(max(ENOUGH_ROWS // int(present.sum()), 1), len(folds.excluded))
        pilots = [Pilot.learn(inputs, learned.max_lr, folds, held_out) for held_out in range(n_pilots)]
        harmful = [name for name in features if all(name in pilot.harmful for pilot in pilots)]
        bar = progress_bar("choosing what to cross-fit", settings)
        chosen, scores, reason = choose(pilots, residuals, bar)
    record = _record(features, chosen, harmful, residuals, scores, reason)
    learned = replace(silence(learned, harmful, settings), cross_fit=record)
    return learned, {name: found[name] for name in chosen}


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


@dataclass(frozen=True)
class Pilot:
    """A training without one fold, which shows what helps and what harms on rows not learned from.

    Attributes
    ----------
    embeddings : EmbeddingSet
        Of the columns that do the network no harm on the held-out rows.
    harmful : list of str
        The other categorical columns.
    train, held_out : float32 array of shape (n_rows, width)
        Rows as the set encodes them.
    crossed : dict of str to float32 array of shape (n_train, width of the column)
        Vectors of the training rows, by column, that were learned without each row's fold.
    targets : pair of ndarray of shape (n_rows, n_heads)
        Of the training rows and the held-out ones.
    heads : tuple of Head
    seed : int
    """

    embeddings: EmbeddingSet
    harmful: list[str]
    train: np.ndarray
    held_out: np.ndarray
    crossed: dict[str, np.ndarray]
    targets: tuple[np.ndarray, np.ndarray]
    heads: tuple["Head", ...]
    seed: int

    @classmethod
    def learn(cls, inputs: tuple[Any, ...], max_lr: float, folds: Folds, held_out: int) -> "Pilot":
        """Learn from the rows outside one fold as all rows were learned from, at a known rate."""
        from embedkit.learning.cross_fit import coded_rows, gather_evidence, spoils
        from embedkit.learning.fit import learn

        table, roles, heads, targets, weights, settings = inputs
        present = _present(weights, table.num_rows)
        train = np.flatnonzero(present & ~folds.excluded[held_out][folds.cells])
        held = np.flatnonzero(present & (folds.test == held_out))
        train_weights = None if weights is None else weights[train]
        settings = replace(settings, max_lr=max_lr)
        pilot = learn(table.take(train), roles, heads, targets[train], train_weights, settings)
        rows = coded_rows(pilot, table, targets, weights)
        cells, n_cells = folds.cells[train], folds.excluded.shape[1]
        evidence = gather_evidence(pilot, rows.take(train), cells, n_cells, settings.seed)
        harms = dict(zip(roles.categorical, spoils(pilot, rows.take(held)), strict=True))
        # Not all of the models take missing numbers, which "passthrough" hands on.
        numerics = [
            replace(part, fill=mean) if part.fill is None else part
            for part, mean in zip(pilot.numerics, pilot.inputs.means, strict=False)
        ]
        embeddings = EmbeddingSet([part for part in pilot.tables if not harms[part.feature]], numerics)
        # The models see a sample: enough to tell what is better.
        rng = np.random.RandomState(settings.seed)
        share = min(1.0, MAX_ROWS / (len(train) + len(held)))
        train, held = (rng.permutation(part)[: max(1, round(share * len(part)))] for part in (train, held))
        found = look_up(evidence, rows.codes.numpy()[train], folds.test[train], folds.excluded)
        return cls(
            embeddings,
            [name for name, flag in harms.items() if flag],
            embeddings.transform(table.take(train)),
            embeddings.transform(table.take(held)),
            dict(zip(roles.categorical, found, strict=True)),
            (targets[train], targets[held]),
            tuple(heads),
            settings.seed,
        )

    def scores(self, cross_fitted: Collection[str]) -> dict[str, np.ndarray]:
        """R2 or ROC AUC of quick models on each block of the held-out rows, mean over the targets."""
        from embedkit.models import MODELS, make_model

        places, train = column_slices(self.embeddings), self.train.copy()
        for name in self.embeddings:
            if name in cross_fitted:
                train[:, places[name]] = self.crossed[name]
        scores = {}
        for name in MODELS:
            found = []
            for i, head in enumerate(self.heads):
                kind = "regression" if head.kind == "continuous" else head.kind
                model = make_model(name, kind, scale=False, random_state=self.seed, n_jobs=1)
                if name in N_TREES:
                    model.set_params(n_estimators=N_TREES[name])
                y_train, y_test = (head.encode(part[:, i]) for part in self.targets)
                found.append(_block_scores(model, train, y_train, self.held_out, y_test))
            scores[name] = np.mean(found, axis=0)
        return scores


def _block_scores(
    model: Any, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray
) -> np.ndarray:
    """R2 or ROC AUC of a model on blocks of test rows that are alike in their targets."""
    from sklearn.base import is_classifier
    from sklearn.metrics import r2_score

    from embedkit.models import macro_auc

    blocks = np.argsort(np.argsort(y_test, kind="stable")) % N_BLOCKS
    parts = [np.flatnonzero(blocks == block) for block in range(N_BLOCKS)]
    if not is_classifier(model):
        predicted = model.fit(X, y).predict(X_test)
        return np.array([r2_score(y_test[part], predicted[part]) for part in parts])
    if len(np.unique(y)) < 2:
        return np.full(N_BLOCKS, 0.5)  # of one class there is nothing to tell
    predicted = model.fit(X, y).predict_proba(X_test)
    scores = np.full(N_BLOCKS, 0.5)
    for block, part in enumerate(parts):
        if len(np.unique(y_test[part])) > 1:
            scores[block] = macro_auc(y_test[part], predicted[part], model.classes_)
    return scores


def choose(
    pilots: Sequence[Pilot],
    residuals: Mapping[str, float],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[list[str], list[dict[str, Any]], str]:
    """The columns to cross-fit: of none, the most affected ones, and all, what scores best.

    Parameters
    ----------
    pilots : sequence of Pilot
    residuals : dict of str to float
        How far cross-fitting moves each column.
    progress : callable
        Wraps the iterable of choices, as ``tqdm`` does.

    Returns
    -------
    chosen : list of str
    scores : list of dict
        What was tried: "cross_fitted", a score for each model, and their "mean".
    reason : str
    """
    pilots = [pilot for pilot in pilots if pilot.embeddings]
    useful = {name for pilot in pilots for name in pilot.embeddings}
    if not useful:
        return [], [], "every column does harm on held-out rows"
    ranked = sorted(useful, key=lambda name: (-residuals[name], name))
    scores, blocks = [], []
    sizes = sorted({0, len(ranked) // 3, 2 * len(ranked) // 3, len(ranked)})
    for size in progress(sizes):
        parts = [pilot.scores(ranked[:size]) for pilot in pilots]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        blocks.append(np.mean(list(found.values()), axis=0))  # (n_blocks of all pilots,)
        means = {name: float(values.mean()) for name, values in found.items()}
        scores.append({"cross_fitted": ranked[:size], **means, "mean": float(blocks[-1].mean())})
    best = int(np.argmax([score["mean"] for score in scores]))
    gains = blocks[best] - blocks[0]
    gain, error = gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5
    found = f"gains {gain:.4f} +- {error:.4f} on held-out rows, mean over the models"
    if gain <= MIN_GAIN * error:
        return [], scores, f"{found}: too little"
    return scores[best]["cross_fitted"], scores, found


def column_slices(embeddings: EmbeddingSet) -> dict[str, slice]:
    """The columns of each table in what a set puts out."""
    starts = {name: i for i, name in enumerate(embeddings.feature_names_out)}
    firsts = {name: starts[part.feature_names_out[0]] for name, part in embeddings.items()}
    return {name: slice(first, first + embeddings[name].embedding_dim) for name, first in firsts.items()}


def _present(weights: np.ndarray | None, n_rows: int) -> np.ndarray:
    """Which rows exist: those of weight 0 do not."""
    return np.ones(n_rows, dtype=bool) if weights is None else weights > 0


def _record(
    features: Sequence[str],
    chosen: Sequence[str],
    harmful: Sequence[str],
    residuals: Mapping[str, float],
    scores: list[dict[str, Any]],
    reason: str,
) -> dict[str, Any]:
    content = {
        name: {
            "cross_fitted": name in chosen and name not in harmful,
            "helps": name not in harmful,
            "alignment_residual": residuals.get(name),
        }
        for name in features
    }
    return {"features": content, "scores": scores, "reason": reason}
