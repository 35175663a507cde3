"""Learn a table: from columns and targets to vectors, in one pass that reads from top to bottom."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from embedkit.columns import EmbeddingTable
from embedkit.errors import InputError
from embedkit.frames import Roles, numeric_block
from embedkit.learning.axes import canonical_tables, fill_untrained, first_layer_blocks
from embedkit.learning.data import Rows, hold_out, make_rows
from embedkit.learning.learned import History, Learned, NetworkShape, Projection, Settings
from embedkit.learning.lr_finder import LRFinderResult, find_lr
from embedkit.learning.network import EntityEmbeddingNetwork, embedding_dims, weights_of
from embedkit.learning.numeric import NumericInputs
from embedkit.learning.schedules import make_schedule
from embedkit.learning.targets import Head
from embedkit.learning.training import Trainer, train
from embedkit.vocabulary import UNKNOWN, Vocabulary

# An automatic rate stays within these bounds: where the finder's curve is misleading, it misleads no further.
AUTO_LR_BOUNDS = (1.5e-3, 3e-3)
AUTO_LR_ITERATIONS = 200


def learn(
    table: pa.Table,
    roles: Roles,
    heads: Sequence[Head],
    y: np.ndarray,
    sample_weight: np.ndarray | None,
    settings: Settings,
) -> Learned:
    """Learn vectors for the categorical columns of a table.

    Parameters
    ----------
    table : pa.Table of n_rows rows
    roles : Roles
        What its columns are for.
    heads : sequence of Head
    y : ndarray of shape (n_rows, n_heads)
        Targets as given.
    sample_weight : ndarray of shape (n_rows,) or None
        How many rows each row stands for.
    settings : Settings

    Returns
    -------
    Learned

    Raises
    ------
    InputError
        If data or settings cannot be learned from.
    UnstableTrainingError
        If the loss goes to infinity at every rate tried.
    """
    with _own_random_state(settings.seed):
        preparation = prepare(table, roles, heads, y, sample_weight, settings)
        finder = None
        max_lr = settings.max_lr
        if max_lr == "auto":
            finder = range_test(preparation, settings)
            max_lr = float(np.clip(finder.suggestion, *AUTO_LR_BOUNDS))
        history = _train(preparation, max_lr, settings)
        return _harvest(preparation, history, finder, max_lr, settings)


def find_learning_rate(
    table: pa.Table,
    roles: Roles,
    heads: Sequence[Head],
    y: np.ndarray,
    sample_weight: np.ndarray | None,
    settings: Settings,
    **sweep: Any,
) -> LRFinderResult:
    """Run the range test on the training that `learn` would do; `sweep` goes to `find_lr`."""
    with _own_random_state(settings.seed):
        preparation = prepare(table, roles, heads, y, sample_weight, settings)
        return range_test(preparation, settings, **sweep)


@dataclass(frozen=True)
class Preparation:
    """A trainer and what was decided on the way to it."""

    vocabularies: tuple[Vocabulary, ...]
    inputs: NumericInputs
    heads: tuple[Head, ...]
    counts: tuple[np.ndarray, ...]
    priors: tuple[float, ...]
    trainer: Trainer
    watch: Rows | None
    generator: torch.Generator


def prepare(
    table: pa.Table,
    roles: Roles,
    heads: Sequence[Head],
    y: np.ndarray,
    sample_weight: np.ndarray | None,
    settings: Settings,
) -> Preparation:
    """Vocabularies, codes, network and optimizers, ready for the first step."""
    weights = np.ones(table.num_rows) if sample_weight is None else sample_weight
    vocabularies = tuple(
        Vocabulary.fit(
            table[name],
            name,
            min_frequency=settings.min_frequency,
            max_categories=settings.max_categories,
            sample_weight=sample_weight,
        )
        for name in roles.categorical
    )
    codes = np.empty((table.num_rows, len(vocabularies)), dtype=np.int32)
    for i, vocabulary in enumerate(vocabularies):
        codes[:, i] = vocabulary.encode(table[vocabulary.feature])
    block = numeric_block(table, roles.numeric)
    inputs = NumericInputs.fit(block, roles.numeric, weights)
    targets = np.empty((table.num_rows, len(heads)), dtype=np.float32)
    present = weights > 0
    for i, head in enumerate(heads):
        targets[present, i] = head.encode(y[present, i])

    generator = torch.Generator().manual_seed(settings.seed)
    device = choose_device(settings.device)
    rows = make_rows(codes, inputs.transform(block), targets, weights).to(device)
    watch = None
    if settings.early_stopping:
        rows, watch = hold_out(rows, settings.validation_fraction, generator)
    total = float(weights.sum())
    sizes = [vocabulary.num_embeddings for vocabulary in vocabularies]
    shape = NetworkShape(
        num_embeddings=tuple(sizes),
        embedding_dims=embedding_dims(roles.categorical, sizes, settings.embedding_dim),
        n_numeric=inputs.width,
        hidden_layer_sizes=tuple(settings.hidden_layer_sizes),
        n_outputs=sum(head.n_outputs for head in heads),
    )
    network = EntityEmbeddingNetwork(shape, settings.dropout, settings.embedding_dropout).to(device)
    priors = tuple(float(settings.shrinkage) * vocabulary.cardinality / total for vocabulary in vocabularies)
    trainer = Trainer(
        network,
        heads,
        rows,
        priors=priors,
        batch_size=choose_batch_size(settings.batch_size, len(rows)),
        weight_decay=settings.weight_decay,
        unknown_fraction=settings.unknown_fraction,
        generator=generator,
    )
    counts = tuple(_trained_counts(vocabulary, total, settings) for vocabulary in vocabularies)
    return Preparation(vocabularies, inputs, tuple(heads), counts, priors, trainer, watch, generator)


def range_test(preparation: Preparation, settings: Settings, **sweep: Any) -> LRFinderResult:
    """The learning-rate range test; leaves the trainer as it was."""
    options = {"num_iter": AUTO_LR_ITERATIONS, "rule": "balanced", **sweep}
    return find_lr(preparation.trainer, progress=_bar("finding the learning rate", settings), **options)


def choose_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be 'auto' or a torch device such as 'cpu', got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch finds no GPU: use 'auto' or 'cpu'")
    return chosen


def choose_batch_size(batch_size: int | str, n_rows: int) -> int:
    """ "auto" is a power of two that makes 128 to 256 steps an epoch, within 32 and 1,024."""
    if batch_size == "auto":
        return int(np.clip(2 ** int(math.log2(max(n_rows / 128, 1))), 32, 1024))
    return int(batch_size)


def _train(preparation: Preparation, max_lr: float, settings: Settings) -> History:
    trainer = preparation.trainer
    schedule = make_schedule(
        settings.schedule,
        max_lr=max_lr,
        total_steps=max(settings.max_epochs * trainer.steps_per_epoch, 2),
        steps_per_epoch=trainer.steps_per_epoch,
        **settings.schedule_options,
    )
    return train(
        trainer,
        schedule,
        settings.max_epochs,
        watch=preparation.watch,
        n_iter_no_change=settings.n_iter_no_change,
        progress=_bar("learning", settings),
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
        tables.append(EmbeddingTable(counted, np.ascontiguousarray(vectors)))
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
    chosen = settings.embedding_dim
    if isinstance(chosen, Mapping):
        chosen = chosen.get(feature, "auto")
    sound = reliability >= settings.min_reliability
    return sound if isinstance(chosen, str) else np.ones(len(reliability), dtype=bool)


def _trained_counts(vocabulary: Vocabulary, total: float, settings: Settings) -> np.ndarray:
    """Counts of the vocabulary, where unknown also counts the values that are replaced by it in an epoch."""
    counts = vocabulary.counts.astype(np.float64)
    counts[UNKNOWN] += round(settings.unknown_fraction * total)
    whole = vocabulary.counts.dtype == np.int64
    return counts.astype(np.int64) if whole else counts


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """torch's global random state, seeded within and untouched after."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _bar(what: str, settings: Settings) -> Callable[[Iterable[int]], Iterable[int]]:
    """A progress bar on a terminal, after two seconds; nothing elsewhere."""
    from tqdm import tqdm

    silent = not settings.progress or not sys.stderr.isatty()
    return lambda steps: tqdm(steps, desc=what, delay=2, disable=silent, unit="step", leave=False)
