"""The training loop: epochs, what is taken back, what is kept, where to go on from."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from embedkit.errors import EmbedkitError
from embedkit.learning.checkpoint import Checkpoint
from embedkit.learning.data import Rows
from embedkit.learning.learned import History, Learned
from embedkit.learning.memory import TornStepError
from embedkit.learning.training import Trainer

MAX_RESTARTS = 3


class UnstableTrainingError(EmbedkitError, ArithmeticError):
    """The loss went to infinity or NaN, also at lower rates.

    Attributes
    ----------
    history : History
        Of the epochs before.
    learned : Learned or None
        What the best weights hold, if there was a sound epoch.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history
        self.learned: Learned | None = None


@dataclass
class _Position:
    """Where a training is, beside what the trainer itself keeps.

    Attributes
    ----------
    epoch : int
        The one under way, counted from 1.
    stopped : bool
        Whether the watched rows got no better for too long.
    rate_factor : float
        What the schedule's rates are multiplied by.
    losses : list of tensor
        Of the steps of this epoch.
    start : dict or None
        The trainer at the start of this epoch.
    best_loss : float
        The lowest on the watched rows.
    best : dict or None
        The trainer as it was then.
    history : History
    """

    epoch: int = 1
    stopped: bool = False
    rate_factor: float = 1.0
    losses: list[torch.Tensor] = field(default_factory=list)
    start: dict[str, Any] | None = None
    best_loss: float = math.inf
    best: dict[str, Any] | None = None
    history: History = field(default_factory=History)


def train(
    trainer: Trainer,
    schedule: Callable[[int], float],
    max_epochs: int,
    *,
    watch: Rows | None = None,
    n_iter_no_change: int = 5,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train to the end of the schedule, or until the watched rows get no better; keep the best weights.

    An epoch whose loss is not finite is taken back and repeated at a tenth of the rate, at most three times
    in all.

    Parameters
    ----------
    trainer : Trainer
    schedule : callable
        Step, counted from 0, to learning rate.
    max_epochs : int
        Passes over the data.
    watch : Rows, optional
        Held-out rows. With them, the weights of the epoch with their lowest loss are kept.
    n_iter_no_change : int
        Epochs without a lower loss on the watched rows after which training stops.
    progress : callable
        Wraps the iterable of steps, as ``tqdm`` does.
    checkpoint : Checkpoint, optional
        Where to write, from time to time, and to go on from, bit for bit.

    Raises
    ------
    UnstableTrainingError
        If the loss is still not finite after three restarts; the best weights so far are left in place.
    OutOfMemoryError
        If not even a few rows at a time fit into memory.
    """
    position = _Position()
    if checkpoint is not None and (state := checkpoint.read()) is not None:
        position = _resume(trainer, state)
    if trainer.group is not None:
        steps = len(position.history.lrs) + len(position.losses)
        trainer.group.check_same(steps, "the checkpoint they go on from")
    history = position.history
    bar = iter(progress(range(max_epochs * trainer.steps_per_epoch)))
    for _ in range(len(history.lrs) + len(position.losses)):
        next(bar, None)
    while position.epoch <= max_epochs and not position.stopped:
        lrs, train_loss = _sound_epoch(trainer, schedule, position, bar, checkpoint)
        history.lrs += lrs
        watched = trainer.evaluate(watch) if watch is not None else (None, None)
        names = ("epoch", "train_loss", "validation_loss", "validation_accuracy")
        history.epochs.append(dict(zip(names, (position.epoch, train_loss, *watched), strict=True)))
        if watch is None:
            history.best_epoch = position.epoch
        elif watched[0] < position.best_loss:
            position.best_loss, position.best = watched[0], _snapshot(trainer)
            history.best_epoch = position.epoch
        elif position.epoch - history.best_epoch >= n_iter_no_change:
            position.stopped = True
        position.epoch, position.losses, position.start = position.epoch + 1, [], None
    _keep_best(trainer, position)
    return history


def _sound_epoch(
    trainer: Trainer,
    schedule: Callable[[int], float],
    position: _Position,
    bar: Iterator[int],
    checkpoint: Checkpoint | None,
) -> tuple[list[float], float]:
    """An epoch that ends with finite weights: the rates of its steps, and their mean loss."""
    history, epoch = position.history, position.epoch
    if position.start is None:
        position.start = _snapshot(trainer)
    while True:
        first = (epoch - 1) * trainer.steps_per_epoch
        lrs = [position.rate_factor * schedule(first + i) for i in range(trainer.steps_per_epoch)]
        try:
            _run_steps(trainer, lrs, position, bar, checkpoint)
        except TornStepError:  # the warning is out, and the next try takes fewer rows at a time
            trainer.restore(position.start)
            position.losses = []
            continue
        train_loss = torch.stack(position.losses).mean().item()  # the one wait for the device in an epoch
        # The last step's loss does not know yet what that step did to the weights.
        if math.isfinite(train_loss) and trainer.is_finite():
            return lrs, train_loss
        trainer.restore(position.start)
        position.losses = []
        history.restarts += 1
        if history.restarts > MAX_RESTARTS:
            _keep_best(trainer, position)
            raise UnstableTrainingError(
                f"the loss is not finite in epoch {epoch}, not even at {position.rate_factor:g} times the "
                "learning rate: set a lower max_lr",
                history,
            )
        position.rate_factor /= 10
        warnings.warn(
            f"the loss was not finite in epoch {epoch}: repeating it at {position.rate_factor:g} times the "
            "rate",
            RuntimeWarning,
            stacklevel=3,
        )


def _run_steps(
    trainer: Trainer,
    lrs: Sequence[float],
    position: _Position,
    bar: Iterator[int],
    checkpoint: Checkpoint | None,
) -> None:
    """One step at each rate that is still to come in this epoch."""
    if trainer.group is not None and trainer.group.rank > 0:
        checkpoint = None  # one writes, all can go on from it
    for lr in lrs[len(position.losses) :]:
        position.losses.append(trainer.advance(lr)[0])
        next(bar, None)
        if checkpoint is not None and checkpoint.due():
            checkpoint.write(_state(trainer, position))


def _keep_best(trainer: Trainer, position: _Position) -> None:
    if position.best is not None:
        trainer.restore(position.best)
    if position.history.epochs:
        trainer.tables.settle()
        trainer.measure_batch_norm()


def _state(trainer: Trainer, position: _Position) -> dict[str, Any]:
    """All it takes to go on, as a checkpoint can hold it."""
    kept = {name.name: getattr(position, name.name) for name in fields(position)}
    kept |= {"history": asdict(position.history), "losses": torch.stack(position.losses)}
    return {"position": kept, "trainer": _snapshot(trainer), "micro_batch": trainer.micro_batch}


def _snapshot(trainer: Trainer) -> dict[str, Any]:
    """The trainer's state without the rows in their order, another copy of all: they are drawn again."""
    return trainer.snapshot() | {"epoch": None}


def _resume(trainer: Trainer, state: dict[str, Any]) -> _Position:
    trainer.restore(state["trainer"])
    trainer.micro_batch = state["micro_batch"]
    kept = state["position"]
    losses = list(kept["losses"].to(trainer.rows.device))
    return _Position(**kept | {"history": History(**kept["history"]), "losses": losses})
