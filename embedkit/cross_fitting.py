"""Training rows encoded by vectors that were learned without them: the folds, and where it pays.

Vectors know the targets of the rows they were learned from. How much of that is noise that a model should not
see differs from column to column: a category of three rows repeats their targets, one of three thousand does
not, and where the targets have little noise the vectors are right to repeat them. So the choice is measured:
on a fold that is held out of the tables and of the models that are asked.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embedkit.folds import Folds, check_groups, look_up, make_folds, rows_present
from embedkit.tables import EmbeddingSet
from embedkit.vocabulary import UNKNOWN

if TYPE_CHECKING:
    from embedkit.learning.learned import Learned, Settings, Task
    from embedkit.learning.targets import Head

N_FOLDS = 5
# Fewer rows do not tell which choice is better, nor models what unknown means.
MIN_ROWS = 1_000
# Rows that quick models learn from, and that they are judged on: more would take longer and tell the same.
MAX_ROWS = 10_000
# Share of the epochs that the pilot takes: it chooses as well as after all of them.
PILOT_EPOCHS = 2 / 3
# What a choice has to gain, in standard errors: about what the best of three gains by chance, on average.
MIN_GAIN = 0.8
# Vectors of which more than this share is noise have to help the network on held-out rows to be published.
MAX_NOISE = 0.5
# Parts of the held-out rows, each judged by itself, which tell how sure a gain is.
N_BLOCKS = 5
# A few trees tell which encoding is better, and the same every time.
QUICK = {
    "knn": {},
    "forest": {"n_estimators": 20},
    "lightgbm": {"n_estimators": 60, "deterministic": True, "force_col_wise": True},
}
# LightGBM grows so many fewer trees a class where there are more classes than this, but some of each.
FEW_CLASSES, MIN_ROUNDS = 4, 5


def plan_folds(task: "Task", cross_fit: Any, groups: Any) -> tuple[Folds | None, str]:
    """The folds of `cross_fit_rows`; None, and why, where it cannot be measured whether they pay."""
    targets, seed = task.targets, task.settings.seed
    groups = None if groups is None else check_groups(groups, len(targets))
    if not isinstance(cross_fit, str):
        return make_folds(cross_fit, targets, groups, seed), ""
    present = rows_present(task.sample_weight, len(targets))
    n_rows = int(present.sum())
    if n_rows < MIN_ROWS:
        return None, f"{n_rows} rows are too few to measure it, {MIN_ROWS:,} are needed"
    groups = None if groups is None else groups[present]
    n_folds = N_FOLDS if groups is None else min(N_FOLDS, len(np.unique(groups)))
    if n_folds < 2:
        return None, "all rows are of one group, which leaves none to measure it on"
    folds = make_folds(n_folds, targets[present], groups, seed)
    if _fold_to_hold_out(folds, np.ones(n_rows, dtype=bool)) is None:
        return None, "the groups are too unequal to hold some of them out"
    # Nothing is learned from rows of weight 0: any tables may encode them.
    test, cells = np.zeros((2, len(present)), dtype=np.int64)
    test[present], cells[present] = folds.test, folds.cells
    return Folds(test, cells, folds.excluded), ""


def cross_fit_rows(task: "Task", cross_fit: Any, groups: Any) -> tuple["Learned", dict[str, np.ndarray]]:
    """Learn, and encode the rows that were learned from without themselves, where that pays.

    Parameters
    ----------
    task : Task
        Of rows in memory.
    cross_fit : "auto", int or splitter
    groups : array of shape (n_rows,) or None

    Returns
    -------
    learned : Learned
        With a record of what was done; columns of noise that do not help have a table of zeros.
    vectors : dict of str to float32 array of shape (n_rows, width)
        The columns that are cross-fitted, and the crosses, which all are.
    """
    from embedkit.learning.combinations import rows_without_themselves
    from embedkit.learning.fit import learn, progress_bar
    from embedkit.learning.jackknife import alignment_residual, coded_rows, gather_evidence, silence

    settings = task.settings
    folds, why_none = plan_folds(task, cross_fit, groups)
    learned = learn(task)
    features = [part.feature for part in learned.tables]
    if folds is None:
        record = _record(features, (), (), {}, [], why_none)
        return replace(learned, cross_fit=record, crosses=()), {}
    n_cells = folds.excluded.shape[1]
    rows = coded_rows(learned, task)
    evidence = gather_evidence(learned, rows, folds.cells, n_cells, settings.seed)
    codes = rows.codes.numpy()
    found = dict(zip(features, look_up(evidence, codes, folds.test, folds.excluded), strict=True))
    present = rows_present(task.sample_weight, len(codes))
    residuals = {
        part.feature: alignment_residual(
            part.learned_vectors[codes[present, i]], found[part.feature][present]
        )
        for i, part in enumerate(learned.tables)
    }
    chosen, useless, scores, reason = features, [], [], "asked for"
    if isinstance(cross_fit, str):
        # Without one of K folds, vectors of pure noise move by 1 / (K - 1) of their variance.
        limit = (MAX_NOISE / (len(folds.excluded) - 1)) ** 0.5
        noisy = [name for name in features if residuals[name] > limit]
        pilot = Pilot.learn(task, learned.max_lr, folds, _fold_to_hold_out(folds, present), noisy)
        useless = pilot.useless
        bar = progress_bar("choosing what to cross-fit", settings)
        chosen, scores, reason = choose(pilot, residuals, bar)
    record = _record(features, chosen, useless, residuals, scores, reason)
    learned = replace(silence(learned, useless, settings), cross_fit=record)
    crossed = {name: found[name] for name in chosen}
    return learned, crossed | rows_without_themselves(learned, task, folds.test, folds.cells, folds.excluded)


def _fold_to_hold_out(folds: Folds, present: np.ndarray) -> int | None:
    """The first fold that has rows enough to judge, and leaves as many to learn from."""
    sizes = np.bincount(folds.test[present], minlength=len(folds.excluded))
    enough = np.flatnonzero((sizes >= 2 * N_BLOCKS) & (sizes <= sizes.sum() / 2))
    return int(enough[0]) if len(enough) else None


@dataclass(frozen=True)
class Pilot:
    """A training without one fold, which shows what helps on rows that nothing was learned from.

    Attributes
    ----------
    embeddings : EmbeddingSet
        Of the columns that are taken.
    useless : list of str
        The other categorical columns: noise that does not help the network on the held-out rows.
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
    useless: list[str]
    train: np.ndarray
    held_out: np.ndarray
    crossed: dict[str, np.ndarray]
    targets: tuple[np.ndarray, np.ndarray]
    heads: tuple["Head", ...]
    seed: int

    @classmethod
    def learn(cls, task: "Task", max_lr: float, folds: Folds, held_out: int, noisy: Sequence[str]) -> "Pilot":
        """Learn from the rows outside one fold as all rows were learned from, at a known rate but shorter.

        Of the `noisy` columns those are left out that do not help on the held-out rows.
        """
        from embedkit.learning.fit import learn
        from embedkit.learning.jackknife import coded_rows, find_useless, gather_evidence

        table, targets = task.table, task.targets
        present = rows_present(task.sample_weight, table.num_rows)
        train = np.flatnonzero(present & ~folds.excluded[held_out][folds.cells])
        held = np.flatnonzero(present & (folds.test == held_out))
        settings = _pilot_settings(task.settings, max_lr, int(present.sum()))
        pilot = learn(task.take(train, settings))
        rows = coded_rows(pilot, task)
        cells, n_cells = folds.cells[train], folds.excluded.shape[1]
        evidence = gather_evidence(pilot, rows.take(train), cells, n_cells, settings.seed)
        left_out = find_useless(pilot, rows.take(held), noisy)
        # Not all of the models take missing numbers, which "passthrough" hands on.
        numerics = [
            replace(part, fill=mean) if part.fill is None else part
            for part, mean in zip(pilot.numerics, pilot.inputs.means, strict=False)
        ]
        embeddings = EmbeddingSet([part for part in pilot.tables if part.feature not in left_out], numerics)
        # The models see a sample: enough to tell what is better.
        rng = np.random.RandomState(settings.seed)
        train, held = (rng.permutation(part)[:MAX_ROWS] for part in (train, held))
        found = look_up(evidence, rows.codes.numpy()[train], folds.test[train], folds.excluded)
        return cls(
            embeddings=embeddings,
            useless=left_out,
            train=embeddings.transform(table.take(train)),
            held_out=embeddings.transform(table.take(held)),
            crossed=dict(zip(task.roles.categorical, found, strict=True)),
            targets=(targets[train], targets[held]),
            heads=task.heads,
            seed=settings.seed,
        )

    def score(self, name: str, cross_fitted: Collection[str]) -> np.ndarray:
        """R2 or ROC AUC of a quick model on each block of the held-out rows, mean over the targets."""
        from embedkit.models import make_model

        train = self.train.copy()
        put_vectors(train, self.embeddings, {column: self.crossed[column] for column in cross_fitted})
        found = []
        for i, head in enumerate(self.heads):
            kind = "regression" if head.kind == "continuous" else head.kind
            model = make_model(name, kind, scale=False, random_state=self.seed, n_jobs=1)
            model.set_params(**QUICK[name])
            if name == "lightgbm" and kind == "multiclass":  # which grows a tree for every class, every time
                rounds = QUICK[name]["n_estimators"] * FEW_CLASSES // max(len(head.classes), FEW_CLASSES)
                model.set_params(n_estimators=max(rounds, MIN_ROUNDS))
            y_train, y_test = (head.encode(part[:, i]) for part in self.targets)
            found.append(_block_scores(model, kind, (train, y_train), (self.held_out, y_test)))
        return np.mean(found, axis=0)


def _pilot_settings(settings: "Settings", max_lr: float, n_rows: int) -> "Settings":
    """Those of a training on all rows, for fewer epochs."""
    from embedkit.learning.group import join_group
    from embedkit.learning.prepare import choose_batch_size

    batch_size = settings.batch_size
    if batch_size == "auto":  # of fewer rows it could come out as half of it, which takes longer
        group = join_group(settings.device)
        n_processes = 1 if group is None else group.size
        batch_size = choose_batch_size("auto", n_rows, n_processes) // n_processes
    epochs = max(round(PILOT_EPOCHS * settings.max_epochs), 1)
    return replace(settings, max_lr=max_lr, batch_size=max(batch_size, 2), max_epochs=epochs, crosses=0)


def _block_scores(
    model: Any, kind: str, learned_from: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """R2 or ROC AUC of a model on blocks of test rows that are alike in their targets.

    The squared errors of a block are set against the variance of all test rows: one of their own may have
    none. What tells nothing counts as a guess does.
    """
    from embedkit.models import macro_auc

    (X, y), (X_test, y_test) = learned_from, test
    blocks = np.argsort(np.argsort(y_test, kind="stable")) % N_BLOCKS
    parts = [np.flatnonzero(blocks == block) for block in range(N_BLOCKS)]
    if kind == "regression":
        if not (variance := y_test.var()) > 0:
            return np.zeros(N_BLOCKS)
        squares = np.square(model.fit(X, y).predict(X_test) - y_test)
        return np.array([1 - squares[part].mean() / variance for part in parts])
    scores = np.full(N_BLOCKS, 0.5)
    if len(np.unique(y)) > 1:
        predicted = model.fit(X, y).predict_proba(X_test)
        for block, part in enumerate(parts):
            if len(np.unique(y_test[part])) > 1:
                scores[block] = macro_auc(y_test[part], predicted[part], model.classes_)
    return scores


def choose(
    pilot: Pilot,
    residuals: Mapping[str, float],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[list[str], list[dict[str, Any]], str]:
    """The columns to cross-fit: of none, the most affected ones, and all, what scores best.

    Parameters
    ----------
    pilot : Pilot
    residuals : dict of str to float
        How far cross-fitting moves each column.
    progress : callable
        Wraps the choices, as ``tqdm`` does.

    Returns
    -------
    chosen : list of str
    scores : list of dict
        What was tried: "cross_fitted", a score for each model, and their "mean".
    reason : str
    """
    if not pilot.embeddings:
        return [], [], "no column helps on held-out rows"
    affected = sorted(pilot.embeddings, key=lambda name: (-residuals[name], name))
    n = len(affected)
    tried = [affected[:size] for size in sorted({0, n // 3, 2 * n // 3, n})]
    # Small models side by side are faster than one on all threads, whose sums would depend on their order.
    # But KNN limits the threads of BLAS while it runs, for the whole process: never two at a time.
    # scikit-learn changes the filters of warnings, for the whole process too: they are put back.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(pa.cpu_count(), len(tried))) as pool:
        trees = [
            {model: pool.submit(pilot.score, model, names) for model in QUICK if model != "knn"}
            for names in tried
        ]
        try:
            knn = [pilot.score("knn", names) for names in progress(tried)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = [
        {"knn": first, **{model: future.result() for model, future in others.items()}}
        for first, others in zip(knn, trees, strict=True)
    ]
    blocks = [np.mean(list(models.values()), axis=0) for models in found]  # each (n_blocks,)
    scores = [
        {
            "cross_fitted": names,
            **{model: float(part.mean()) for model, part in models.items()},
            "mean": float(block.mean()),
        }
        for names, models, block in zip(tried, found, blocks, strict=True)
    ]
    best = int(np.argmax([score["mean"] for score in scores]))
    if best == 0:
        return [], scores, "it gains nothing on held-out rows, mean over the models"
    gains = blocks[best] - blocks[0]
    gain, error = gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5
    said = f"gains {gain:.4f} +- {error:.4f} on held-out rows, mean over the models"
    if gain <= MIN_GAIN * error:
        return [], scores, f"{said}: too little"
    return scores[best]["cross_fitted"], scores, said


def put_vectors(out: np.ndarray, embeddings: EmbeddingSet, vectors: Mapping[str, np.ndarray]) -> None:
    """Put other vectors of some columns into what a set has put out, (n_rows, width); ranks stay."""
    starts = _starts(embeddings)
    for name, part in vectors.items():
        out[:, starts[name] : starts[name] + part.shape[1]] = part


def hide_values(out: np.ndarray, embeddings: EmbeddingSet, task: "Task") -> None:
    """Put unknown for a fraction of the values in what a set has put out for a task's rows, (n_rows, width).

    A model that has never seen unknown places it by chance: at the wrong end of a column it is cut along.
    """
    rows = np.flatnonzero(rows_present(task.sample_weight, len(out)))
    if len(rows) < MIN_ROWS:
        return
    rng = np.random.default_rng(task.settings.seed)
    starts = _starts(embeddings)
    hidden = {}
    for name, table in embeddings.items():
        hidden[name] = rows[rng.random(len(rows)) < task.settings.hidden_fraction]
        out[hidden[name], starts[name] : starts[name] + table.vectors.shape[1]] = table.vectors[UNKNOWN]
    for cross in embeddings.crosses:
        codes = np.stack([embeddings[name].encode(task.table[name]) for name in cross.features], axis=1)
        masked = codes.copy()
        for i, name in enumerate(cross.features):
            masked[hidden[name], i] = UNKNOWN
        changed = np.flatnonzero((masked != codes).any(axis=1))
        start = starts[cross.feature_names_out[0]]
        out[changed, start : start + cross.effects.shape[1]] = cross.transform(*masked[changed].T)


def _starts(embeddings: EmbeddingSet) -> dict[str, int]:
    """Where the columns of each feature, and of each cross by its first one, begin in what a set puts out."""
    places = {name: i for i, name in enumerate(embeddings.feature_names_out)}
    crosses = [cross.feature_names_out[0] for cross in embeddings.crosses]
    firsts = {name: table.feature_names_out[0] for name, table in embeddings.items()}
    return {
        name: places[first] for name, first in (firsts | dict(zip(crosses, crosses, strict=True))).items()
    }


def _record(
    features: Sequence[str],
    chosen: Sequence[str],
    useless: Sequence[str],
    residuals: Mapping[str, float],
    scores: list[dict[str, Any]],
    reason: str,
) -> dict[str, Any]:
    content = {
        name: {
            "cross_fitted": name in chosen and name not in useless,
            "helps": name not in useless,
            "alignment_residual": residuals.get(name),
        }
        for name in features
    }
    return {"features": content, "scores": scores, "reason": reason}
