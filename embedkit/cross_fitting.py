"""Training rows encoded by vectors that were learned without them: the folds, and where it pays.

Vectors know the targets of the rows they were learned from. How much of that is noise that a model should not
see differs from column to column, so the choice is measured; see `embedkit.pilot`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from embedkit.folds import Folds, check_groups, look_up, make_folds, rows_present
from embedkit.pilot import N_PARTS, Choice, Pilot, choose, put_vectors, view_of_crosses
from embedkit.tables import EmbeddingSet
from embedkit.vocabulary import UNKNOWN

if TYPE_CHECKING:
    from embedkit.learning.learned import Learned, Task

N_FOLDS = 5
# Fewer rows do not tell which choice is better, nor models what unknown means.
MIN_ROWS = 1_000
# Vectors of which more than this share is noise have to help the network on held-out rows to be published.
MAX_NOISE = 0.5


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


def cross_fit_rows(
    task: "Task", cross_fit: Any, groups: Any, **saving: Any
) -> tuple["Learned", dict[str, np.ndarray]]:
    """Learn, and encode the rows that were learned from without themselves, where that pays.

    Parameters
    ----------
    task : Task
        Of rows in memory.
    cross_fit : "auto", int or splitter
    groups : array of shape (n_rows,) or None
    **saving
        ``checkpoint, checkpoint_seconds`` of `embedkit.learning.fit.learn`.

    Returns
    -------
    learned : Learned
        With a record of what was done; columns of noise that do not help have a table of zeros.
    vectors : dict of str to float32 array of shape (n_rows, width)
        The columns that are cross-fitted, and the crosses, which all are.
    """
    from embedkit.learning.combinations import (
        VIEW,
        auto_pairs,
        blocks_of,
        learn_crosses,
        rows_without_themselves,
    )
    from embedkit.learning.fit import learn, progress_bar
    from embedkit.learning.jackknife import alignment_residual, coded_rows, gather_evidence, silence

    settings = task.settings
    folds, why_none = plan_folds(task, cross_fit, groups)
    learned = learn(task, **saving)
    features = [part.feature for part in learned.tables]
    if folds is None:
        return replace(learned, cross_fit=_record(features, Choice([], [], why_none))), {}
    rows = coded_rows(learned, task)
    codes = rows.codes.numpy()
    present = rows_present(task.sample_weight, len(codes))
    cells, n_cells = folds.cells[present], folds.excluded.shape[1]
    evidence = gather_evidence(learned, rows.take(present), cells, n_cells, settings.seed)
    found = dict(zip(features, look_up(evidence, codes, folds.test, folds.excluded), strict=True))
    residuals = {
        part.feature: alignment_residual(
            part.learned_vectors[codes[present, i]], found[part.feature][present]
        )
        for i, part in enumerate(learned.tables)
    }
    published = [part.feature for part in learned.tables if part.learned_vectors.any()]
    # Rows of one group, and of a splitter's fold, belong together for a reason.
    auto = isinstance(cross_fit, str)
    blocks = blocks_of(task) if auto and groups is None else folds
    choice, useless = Choice(published, [], "asked for"), []
    n_pairs, view, why = settings.pairs_asked_for, VIEW, "not measured"
    if auto and not published:
        choice = Choice([], [], "no column has vectors to cross-fit")
    elif auto:
        # Without one of K folds, vectors of pure noise move by 1 / (K - 1) of their variance.
        limit = (MAX_NOISE / (len(folds.excluded) - 1)) ** 0.5
        noisy = [name for name in published if residuals[name] > limit]
        held_out = _fold_to_hold_out(folds, present)
        ask = isinstance(settings.crosses, str) and auto_pairs(learned.heads) > 0
        pilot = Pilot.learn(
            task,
            learned.max_lr,
            folds,
            held_out,
            columns=published,
            noisy=noisy,
            blocks=blocks,
            ask_of_crosses=ask,
        )
        useless = pilot.useless
        bar = progress_bar("choosing what to cross-fit", settings)
        choice = choose(pilot, residuals, bar)
        if ask:
            view, why = view_of_crosses(pilot, choice)
            n_pairs = auto_pairs(learned.heads) if view else 0
    crossed = {name: found[name] for name in choice.columns}
    learned = silence(learned, useless, settings)
    if n_pairs:
        crosses = learn_crosses(learned, rows, n_pairs, blocks, settings.seed, view)
        learned = replace(learned, crosses=crosses)
        crossed |= rows_without_themselves(learned, rows, crosses, blocks, view)
    record = _record(features, choice, useless, residuals, why)
    return replace(learned, cross_fit=record), crossed


def _fold_to_hold_out(folds: Folds, present: np.ndarray) -> int | None:
    """The first fold that has rows enough to judge, and leaves as many to learn from."""
    sizes = np.bincount(folds.test[present], minlength=len(folds.excluded))
    enough = np.flatnonzero((sizes >= 2 * N_PARTS) & (sizes <= sizes.sum() / 2))
    return int(enough[0]) if len(enough) else None


def encode_rows(embeddings: EmbeddingSet, task: "Task", vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A task's rows as models are to learn from them, float32 of shape (n_rows, width).

    With the vectors of `cross_fit_rows`, and unknown in place of a fraction of the values: a model that has
    never seen unknown places it by chance, at the wrong end of a column it is cut along. Rows of weight 0 are
    encoded like any others that nothing was learned from.
    """
    out = embeddings.transform(task.table)
    rows = np.flatnonzero(rows_present(task.sample_weight, len(out)))
    put_vectors(out, embeddings, {name: part[rows] for name, part in vectors.items()}, rows)
    if len(rows) < MIN_ROWS:
        return out
    rng = np.random.default_rng(task.settings.seed)
    hidden = {name: rows[rng.random(len(rows)) < task.settings.hidden_fraction] for name in embeddings}
    for name, table in embeddings.items():
        put_vectors(out, embeddings, {name: table.vectors[UNKNOWN, None]}, hidden[name])
    for cross in embeddings.crosses:
        codes = np.stack([embeddings[name].encode(task.table[name]) for name in cross.features], axis=1)
        masked = codes.copy()
        for i, name in enumerate(cross.features):
            masked[hidden[name], i] = UNKNOWN
        changed = np.flatnonzero((masked != codes).any(axis=1))
        put_vectors(out, embeddings, {cross.name: cross.transform(*masked[changed].T)}, changed)
    return out


def _record(
    features: Sequence[str],
    choice: Choice,
    useless: Sequence[str] = (),
    residuals: Mapping[str, float] = MappingProxyType({}),
    crosses: str = "not measured",
) -> dict[str, Any]:
    content = {
        name: {
            "cross_fitted": name in choice.columns,
            "helps": name not in useless,
            "alignment_residual": residuals.get(name),
        }
        for name in features
    }
    return {"features": content, "scores": choice.scores, "reason": choice.reason, "crosses": crosses}
