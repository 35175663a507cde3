"""Learn a table: from columns and targets to vectors, in one pass that reads from top to bottom."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from embedkit.columns import EmbeddingTable
from embedkit.learning.axes import canonical_tables, fill_untrained, first_layer_blocks
from embedkit.learning.checkpoint import Checkpoint, fingerprint_of
from embedkit.learning.learned import History, Learned, Projection, Settings, Task
from embedkit.learning.loop import UnstableTrainingError, train
from embedkit.learning.lr_finder import LRFinderResult, find_lr
from embedkit.learning.network import weights_of
from embedkit.learning.prepare import Preparation, prepare
from embedkit.learning.ranks import ranks
from embedkit.learning.schedules import make_schedule
from embedkit.vocabulary import Vocabulary

# An automatic rate stays within these bounds: where the finder's curve is misleading, it misleads no further.
AUTO_LR_BOUNDS = (1e-3, 1e-2)
# A weight moves by about the rate in a step. To cover this distance, a short training needs larger steps.
AUTO_LR_DISTANCE = 2.0
AUTO_LR_ITERATIONS = 200
AUTO_LR_RULE = "fall"
# Of all rates for every table the best one.
AUTO_LR_FALLBACK = 4e-3
# A shorter training takes the fallback: a range test would cost it a quarter of its steps or more, and on
# fourteen tables found nothing better.
AUTO_LR_MIN_STEPS = 4 * AUTO_LR_ITERATIONS
# torch's random numbers are the process' own: trainings side by side would draw them from each other.
_LEARNING = threading.Lock()


def learn(
    task: Task, *, checkpoint: str | os.PathLike | None = None, checkpoint_seconds: float = 60.0
) -> Learned:
    """Learn vectors for the categorical columns of a table.

    Parameters
    ----------
    task : Task
    checkpoint : path, optional
        Directory to write checkpoints to; if it holds one of this training, it goes on from there.
    checkpoint_seconds : float, default=60.0
        How often, at most.

    Returns
    -------
    Learned

    Raises
    ------
    InputError
        If data or settings cannot be learned from, or the checkpoint is of another training.
    UnstableTrainingError
        If the loss goes to infinity at every rate tried; its `learned` is what the best weights hold.
    OutOfMemoryError
        If not even a few rows at a time fit into memory.
    """
    settings = task.settings
    with _own_random_state(settings.seed):
        preparation = prepare(task)
        saved, finder, max_lr = None, None, settings.max_lr
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, fingerprint_of(preparation, settings), checkpoint_seconds)
        if max_lr == "auto":
            if _num_steps(preparation, settings) < AUTO_LR_MIN_STEPS:
                max_lr = float(np.clip(AUTO_LR_FALLBACK, *_rate_bounds(preparation, settings)))
            else:
                finder = range_test(preparation, settings)
                max_lr = finder.suggestion
        try:
            history = _train(preparation, max_lr, settings, saved)
        except UnstableTrainingError as error:
            if error.history.epochs:
                error.learned = _harvest(preparation, error.history, finder, max_lr, settings)
            raise
        learned = _harvest(preparation, history, finder, max_lr, settings)
    return learned


def find_learning_rate(task: Task, **sweep: Any) -> LRFinderResult:
    """Run the range test on the training that `learn` would do; `sweep` goes to `find_lr`."""
    with _own_random_state(task.settings.seed):
        return range_test(prepare(task), task.settings, **sweep)


def range_test(preparation: Preparation, settings: Settings, **sweep: Any) -> LRFinderResult:
    """The learning-rate range test; leaves the trainer as it was."""
    options = {
        "num_iter": AUTO_LR_ITERATIONS,
        "rule": AUTO_LR_RULE,
        "fallback": AUTO_LR_FALLBACK,
        "bounds": _rate_bounds(preparation, settings),
    }
    bar = progress_bar("finding the learning rate", settings)
    return find_lr(preparation.trainer, progress=bar, **options | sweep)


def _rate_bounds(preparation: Preparation, settings: Settings) -> tuple[float, float]:
    """The least and the greatest automatic rate."""
    low = AUTO_LR_DISTANCE / _num_steps(preparation, settings)
    return float(np.clip(low, *AUTO_LR_BOUNDS)), AUTO_LR_BOUNDS[1]


def _num_steps(preparation: Preparation, settings: Settings) -> int:
    """Steps of the whole training."""
    return settings.max_epochs * preparation.trainer.steps_per_epoch


def _train(
    preparation: Preparation, max_lr: float, settings: Settings, checkpoint: Checkpoint | None
) -> History:
    trainer = preparation.trainer
    schedule = make_schedule(
        settings.schedule,
        max_lr=max_lr,
        total_steps=max(_num_steps(preparation, settings), 2),
        steps_per_epoch=trainer.steps_per_epoch,
        **settings.schedule_options,
    )
    return train(
        trainer,
        schedule,
        settings.max_epochs,
        watch=preparation.watch,
        n_iter_no_change=settings.n_iter_no_change,
        progress=progress_bar("learning", settings),
        checkpoint=checkpoint,
    )


def _harvest(
    preparation: Preparation,
    history: History,
    finder: LRFinderResult | None,
    max_lr: float,
    settings: Settings,
) -> Learned:
    """Vectors out of the trained network."""
    trainer = preparation.trainer
    network = trainer.network
    seen = [vocabulary.counts for vocabulary in preparation.vocabularies]
    fill_untrained(network, seen, preparation.counts)
    # What a training had no time to learn it had no time to learn wrong either. Gradient flow of time t goes
    # 1 - exp(-k t) of its way along curvature k, close to the k / (k + 1 / 2t) of a prior of precision 1 / 2t
    # (Ali, Kolter & Tibshirani, AISTATS 2019).
    priors = [
        prior + 0.5 / time for prior, time in zip(preparation.priors, trainer.tables.times, strict=True)
    ]
    canonical = canonical_tables(
        network,
        preparation.heads,
        trainer.rows,
        counts=seen,
        priors=priors,
        noise=trainer.noise,
        generator=preparation.generator,
    )
    tables, axes, projections = [], {}, []
    with_rank = _features_with_rank(preparation, settings)
    total = float(trainer.rows.weights.sum())
    for vocabulary, table, counts, prior in zip(
        preparation.vocabularies, canonical, preparation.counts, preparation.priors, strict=True
    ):
        axes[vocabulary.feature] = {"reliability": table.reliability, "share": table.share}
        kept = _kept_axes(vocabulary.feature, table.reliability, settings)
        vectors, rotation = table.vectors[:, kept], table.rotation[:, kept]
        if not kept.any():  # nothing that holds up was learned of this column, and that is what it says
            vectors, rotation = np.zeros_like(table.vectors[:, :1]), np.zeros_like(table.rotation[:, :1])
        projections.append(Projection(table.center, rotation, prior * total))
        counted = Vocabulary(vocabulary.feature, vocabulary.categories, counts)
        ranked = vocabulary.feature in with_rank and bool(kept.any())
        if ranked:
            vectors = np.hstack([vectors, ranks(len(vectors))])
        tables.append(EmbeddingTable(counted, vectors, ranked))
    sensitivity = first_layer_blocks(network)[-1].norm(dim=0).numpy()
    return Learned(
        tables=tuple(tables),
        numerics=preparation.inputs.columns_out(settings.numeric, sensitivity),
        heads=preparation.heads,
        inputs=preparation.inputs,
        shape=network.shape,
        weights=weights_of(network),
        axes=axes,
        projections=tuple(projections),
        noise=tuple(trainer.noise.tolist()),
        history=history,
        lr_finder=finder,
        max_lr=max_lr,
    )


def _kept_axes(feature: str, reliability: np.ndarray, settings: Settings) -> np.ndarray:
    """Which axes are published: all of a width that the user chose, else those that are mostly signal."""
    chosen = settings.width_is_chosen(feature)
    return np.full(len(reliability), True) if chosen else reliability >= settings.min_reliability


def _features_with_rank(preparation: Preparation, settings: Settings) -> set[str]:
    """Features whose width is free, unless an input or a target has the name that the rank would get."""
    features = [vocabulary.feature for vocabulary in preparation.vocabularies]
    taken = {*features, *preparation.inputs.features, *(head.name for head in preparation.heads)}
    return {
        name
        for name in features
        if settings.ranks and not settings.width_is_chosen(name) and f"{name}_rank" not in taken
    }


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it comes: float32, with gradients and nothing rounded, whatever a program has set."""
    dtype = torch.get_default_dtype()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """torch's global random state, seeded within and untouched after; for one thread at a time."""
    with _LEARNING, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def progress_bar(what: str, settings: Settings) -> Callable[[Iterable[int]], Iterable[int]]:
    """A progress bar on a terminal, after two seconds; nothing elsewhere."""
    from tqdm import tqdm

    silent = not settings.progress or not sys.stderr.isatty()
    return lambda steps: tqdm(steps, desc=what, delay=2, disable=silent, unit="step", leave=False)
