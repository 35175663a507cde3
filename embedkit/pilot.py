"""A training without some of the rows, which shows which columns to cross-fit and whether crosses pay.

How much of a vector is noise that a model should not see differs from column to column: a category of three
rows repeats their targets, one of three thousand does not, and where the targets have little noise the
vectors are right to repeat them. So it is measured, on a fold that is held out of the tables and of the
models that are asked.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embedkit.folds import Folds, look_up, rows_present
from embedkit.tables import EmbeddingSet

if TYPE_CHECKING:
    from embedkit.learning.data import Rows
    from embedkit.learning.learned import Learned, Settings, Task
    from embedkit.learning.targets import Head

# Rows that quick models learn from, and that they are judged on: more would take longer and tell the same.
MAX_ROWS = 10_000
# Share of the epochs that the pilot takes: it chooses as well as after all of them.
PILOT_EPOCHS = 2 / 3
# What a choice has to gain over the usual one, in standard errors between blocks: these do not know what
# another fold, or another training, would have said.
MIN_GAIN = 1.5
# What LightGBM has to gain by crosses: where they do not pay, such columns cost it and forests about as much.
MIN_CROSSES_GAIN = 0.004
# Parts of the rows that a model is judged on, each by itself, which tell how sure a gain is.
N_PARTS = 5
# A few trees tell which encoding is better, and the same every time.
QUICK = {
    "knn": {},
    "forest": {"n_estimators": 20},
    "lightgbm": {"n_estimators": 60, "deterministic": True, "force_col_wise": True},
}
# LightGBM grows so many fewer trees a class where there are more classes than this, but some of each.
FEW_CLASSES, MIN_ROUNDS = 4, 5


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
    pairs : pair of float32 array of shape (n_rows, n_numbers)
        Numbers of combinations, of the training rows and the held-out ones, that were learned from other
        blocks of training rows, at the spread of the vectors; of shape (n_rows, 0) where there is nothing to
        ask.
    blocks : pair of int array of shape (n_rows,)
        Block of each of these rows.
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
    pairs: tuple[np.ndarray, np.ndarray]
    blocks: tuple[np.ndarray, np.ndarray]
    targets: tuple[np.ndarray, np.ndarray]
    heads: tuple["Head", ...]
    seed: int

    @classmethod
    def learn(
        cls,
        task: "Task",
        max_lr: float,
        folds: Folds,
        held_out: int,
        columns: Sequence[str],
        noisy: Sequence[str],
        blocks: Folds,
        ask_of_crosses: bool,
    ) -> "Pilot":
        """Learn from the rows outside one fold as all rows were learned from, at a known rate but shorter.

        The columns in question are given; those of the `noisy` ones that do not help on the held-out rows are
        left out. The blocks are the folds of crosses, and it may be asked whether these pay.
        """
        from embedkit.learning.fit import learn
        from embedkit.learning.jackknife import coded_rows, find_useless, gather_evidence

        table, targets = task.table, task.targets
        present = rows_present(task.sample_weight, table.num_rows)
        train = np.flatnonzero(present & ~folds.excluded[held_out][folds.cells])
        held = np.flatnonzero(present & (folds.test == held_out))
        settings = _pilot_settings(task.settings, max_lr, int(present.sum()))
        pilot = learn(task.take(train, settings))
        rows, own = coded_rows(pilot, task), folds.take(train)
        evidence = gather_evidence(pilot, rows.take(train), own.cells, folds.excluded.shape[1], settings.seed)
        left_out = find_useless(pilot, rows.take(held), noisy)
        # Not all of the models take missing numbers, which "passthrough" hands on.
        numerics = [
            replace(part, fill=mean) if part.fill is None else part
            for part, mean in zip(pilot.numerics, pilot.inputs.means, strict=False)
        ]
        taken = {*columns} - {*left_out}
        embeddings = EmbeddingSet([part for part in pilot.tables if part.feature in taken], numerics)
        # The models see a sample: enough to tell what is better.
        rng = np.random.RandomState(settings.seed)
        seen, held = rng.permutation(len(train))[:MAX_ROWS], rng.permutation(held)[:MAX_ROWS]
        found = look_up(evidence, rows.codes.numpy()[train[seen]], own.test[seen], own.excluded)
        pairs = np.zeros((len(train) + len(held), 0), dtype=np.float32)
        if ask_of_crosses:
            pairs = numbers_of_pairs(pilot, rows, blocks, train, held, settings.seed)
        return cls(
            embeddings=embeddings,
            useless=left_out,
            train=embeddings.transform(table.take(train[seen])),
            held_out=embeddings.transform(table.take(held)),
            crossed=dict(zip(task.roles.categorical, found, strict=True)),
            pairs=(pairs[seen], pairs[len(train) :]),
            blocks=(blocks.test[train[seen]], blocks.test[held]),
            targets=(targets[train[seen]], targets[held]),
            heads=task.heads,
            seed=settings.seed,
        )

    def score(
        self, name: str, cross_fitted: Collection[str], *, view: float = 0.0, block: int | None = None
    ) -> np.ndarray:
        """R2 or ROC AUC of a quick model on parts of the held-out rows, mean over the targets.

        With the numbers of combinations at so much of the vectors' spread, or without; on the rows of a
        block, learned from those of the others, or on all.
        """
        from embedkit.models import make_model

        train, held_out = self.train.copy(), self.held_out
        put_vectors(train, self.embeddings, {column: self.crossed[column] for column in cross_fitted})
        if view:
            both = zip((train, held_out), self.pairs, strict=True)
            train, held_out = (np.hstack([part, pairs * view]) for part, pairs in both)
        found = []
        for i, head in enumerate(self.heads):
            kind = "regression" if head.kind == "continuous" else head.kind
            model = make_model(name, kind, scale=False, random_state=self.seed, n_jobs=1)
            model.set_params(**QUICK[name])
            if name == "lightgbm" and kind == "multiclass":  # which grows a tree for every class, every time
                rounds = QUICK[name]["n_estimators"] * FEW_CLASSES // max(len(head.classes), FEW_CLASSES)
                model.set_params(n_estimators=max(rounds, MIN_ROUNDS))
            y_train, y_test = (head.encode(part[:, i]) for part in self.targets)
            learned_from, test, variance = (train, y_train), (held_out, y_test), y_test.var()
            if block is not None:
                learned_from = tuple(part[self.blocks[0] != block] for part in learned_from)
                test = tuple(part[self.blocks[1] == block] for part in test)
            found.append(_part_scores(model, kind, learned_from, test, variance))
        return np.mean(found, axis=0)


def numbers_of_pairs(
    pilot: "Learned", rows: "Rows", blocks: Folds, train: np.ndarray, held_out: np.ndarray, seed: int
) -> np.ndarray:
    """Numbers of combinations of training rows, then held-out ones, each learned without its block."""
    from embedkit.learning.combinations import auto_pairs, learn_crosses, rows_without_themselves

    n_pairs = auto_pairs(pilot.heads)
    crosses = learn_crosses(pilot, rows.take(train), n_pairs, blocks.take(train), seed, view=1)
    both = np.concatenate([train, held_out])
    asked = rows.take(both)
    asked.weights[len(train) :] = 0  # nothing is learned from them
    found = rows_without_themselves(pilot, asked, crosses, blocks.take(both), view=1)
    return np.hstack([np.zeros((len(both), 0), dtype=np.float32), *found.values()])


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
    return replace(settings, max_lr=max_lr, batch_size=max(batch_size, 2), max_epochs=epochs)


def _part_scores(
    model: Any,
    kind: str,
    learned_from: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    variance: float,
) -> np.ndarray:
    """R2 or ROC AUC of a model on parts of test rows that are alike in their targets.

    Squared errors are set against the variance of all held-out rows: a part of them may have none. What tells
    nothing counts as a guess does.
    """
    from embedkit.models import macro_auc

    (X, y), (X_test, y_test) = learned_from, test
    number = np.argsort(np.argsort(y_test, kind="stable")) % N_PARTS
    parts = [np.flatnonzero(number == i) for i in range(N_PARTS)]
    if kind == "regression":
        if not variance > 0:
            return np.zeros(N_PARTS)
        squares = np.square(model.fit(X, y).predict(X_test) - y_test)
        return np.array([1 - squares[part].mean() / variance for part in parts])
    scores = np.full(N_PARTS, 0.5)
    if len(np.unique(y)) > 1:
        predicted = model.fit(X, y).predict_proba(X_test)
        for i, part in enumerate(parts):
            if len(np.unique(y_test[part])) > 1:
                scores[i] = macro_auc(y_test[part], predicted[part], model.classes_)
    return scores


@dataclass(frozen=True)
class Choice:
    """What to cross-fit, and why.

    Attributes
    ----------
    columns : list of str
    scores : list of dict
        What was tried: "cross_fitted", a score for each model, and their "mean".
    reason : str
    """

    columns: list[str]
    scores: list[dict[str, Any]]
    reason: str


def choose(
    pilot: Pilot,
    residuals: Mapping[str, float],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Choice:
    """The columns to cross-fit: the most affected third, unless none, two thirds or all score better.

    One fold is a noisy judge. On tables of many kinds the third was often best and seldom far from it.

    Parameters
    ----------
    pilot : Pilot
    residuals : dict of str to float
        How far cross-fitting moves each column.
    progress : callable
        Wraps the choices, as ``tqdm`` does.
    """
    if not pilot.embeddings:
        return Choice([], [], "no column helps on held-out rows")
    affected = sorted(pilot.embeddings, key=lambda name: (-residuals[name], name))
    n = len(affected)
    third = max(round(n / 3), 1)
    sizes = sorted({0, third, max(round(2 * n / 3), 1), n})
    tried = [affected[:size] for size in sizes]
    found = _judge(pilot, tried, progress)
    blocks = [np.mean(list(models.values()), axis=0) for models in found]  # each (n_blocks,)
    scores = [
        {
            "cross_fitted": names,
            **{model: float(part.mean()) for model, part in models.items()},
            "mean": float(block.mean()),
        }
        for names, models, block in zip(tried, found, blocks, strict=True)
    ]
    usual, means = sizes.index(third), [score["mean"] for score in scores]
    gains = [_gain(block, blocks[usual]) for block in blocks]
    surely = [i for i, (gain, error) in enumerate(gains) if gain > MIN_GAIN * error]
    taken = max(surely, key=means.__getitem__, default=usual)
    best = taken if surely else int(np.argmax(means))
    other = 0 if best == usual else usual
    gain, error = _gain(blocks[best], blocks[other])
    what, than = _in_words(sizes[best], n), _in_words(sizes[other], n)
    reason = f"cross-fitting {what} gains {gain:.4f} +- {error:.4f} over {than} on held-out rows"
    return Choice(tried[taken], scores, reason if best == taken else f"{reason}: too little")


def view_of_crosses(pilot: Pilot, choice: Choice) -> tuple[float, str]:
    """How much of the vectors' spread numbers of combinations get, 0 where they do not pay, and why.

    They pay where LightGBM gets better by them, beside the chosen columns. It learns without the block that
    it is judged on, as from what was before: where new rows are later ones, what holds within a block says
    little. It tells more than a forest, as so few trees differ more by chance. The spread is the one that KNN
    is best with; trees do not see it.
    """
    from embedkit.learning.combinations import VIEW, VIEWS

    if not choice.scores:
        return 0.0, choice.reason
    if not pilot.pairs[0].shape[1]:
        return 0.0, "no combinations to ask about: too few rows, or none that repeat"
    if len(np.unique(pilot.blocks[0])) < 2:
        return 0.0, "cannot be measured with two groups"

    blocks = np.unique(pilot.blocks[1])

    def score(name: str, view: float, block: int) -> np.ndarray:
        return pilot.score(name, choice.columns, view=view, block=block)

    asked = [("lightgbm", view, block) for view in (VIEW, 0.0) for block in blocks]
    with ThreadPoolExecutor(min(pa.cpu_count(), len(asked))) as pool:
        found = pool.map(lambda one: score(*one), asked)
        gain, error = _gain(*np.split(np.concatenate([*found]), 2))
    reason = f"LightGBM gains {gain:.4f} +- {error:.4f} by crosses on held-out rows"
    if gain < max(MIN_CROSSES_GAIN, error):
        return 0.0, f"{reason}: too little"
    scores = {view: np.concatenate([score("knn", view, block) for block in blocks]) for view in VIEWS}
    gains = {view: _gain(scores[view], scores[VIEW]) for view in VIEWS}
    surely = [view for view, (gain, error) in gains.items() if gain > error]
    view = max(surely, key=lambda view: scores[view].mean(), default=VIEW)
    gain, error = gains[view]
    by = "" if view == VIEW else f", which gains {gain:.4f} +- {error:.4f}"
    return view, f"{reason}; KNN sees them at {view:g} of the vectors' spread{by}"


def _gain(new: np.ndarray, old: np.ndarray) -> tuple[float, float]:
    """Mean over blocks, and its standard error."""
    gains = new - old
    return float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5)


def _in_words(size: int, n: int) -> str:
    return {0: "none", n: "all"}.get(size, f"{size} of {n}")


def _judge(
    pilot: Pilot, tried: Sequence[list[str]], progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> list[dict[str, np.ndarray]]:
    """By model the scores on every block, for each choice of columns to cross-fit."""
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
    return [
        {"knn": first, **{model: future.result() for model, future in others.items()}}
        for first, others in zip(knn, trees, strict=True)
    ]


def put_vectors(
    out: np.ndarray,
    embeddings: EmbeddingSet,
    vectors: Mapping[str, np.ndarray],
    rows: np.ndarray | slice = slice(None),
) -> None:
    """Put other vectors, or numbers of crosses, into rows as a set puts them out; ranks stay."""
    starts = embeddings.starts
    for name, part in vectors.items():
        out[rows, starts[name] : starts[name] + part.shape[1]] = part
