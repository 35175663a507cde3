"""The training loop."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from embedkit.errors import EmbedkitError
from embedkit.learning.data import Rows
from embedkit.learning.gradients import LayerGradients
from embedkit.learning.learned import History
from embedkit.learning.losses import MIN_NOISE, accuracy, output_gradients, row_losses, squared_errors
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.optimizer import AdamW, TableOptimizer
from embedkit.learning.targets import Head

MAX_RESTARTS = 3
# Step of the tables for one of the layers. Long tables need large steps to get where their prior wants them
# within a training; the layers do best with small ones.
TABLE_RATE = 4.0
EVALUATION_BATCH = 16_384


class UnstableTrainingError(EmbedkitError, ArithmeticError):
    """The loss went to infinity or NaN, also at lower rates."""


class Trainer:
    """A network, its optimizers and its position in the data: one step after another.

    Parameters
    ----------
    network : EntityEmbeddingNetwork
    heads : sequence of Head
    rows : Rows
        To learn from, on the network's device.
    priors : sequence of float
        Prior precision of each table; see `TableOptimizer`.
    batch_size : int
        Rows a step.
    weight_decay : float
        Of the layers (AdamW).
    unknown_fraction : float
        Fraction of values that are replaced by unknown.
    generator : torch.Generator
        Draws the order of the rows and the values to replace.
    """

    def __init__(
        self,
        network: EntityEmbeddingNetwork,
        heads: Sequence[Head],
        rows: Rows,
        *,
        priors: Sequence[float],
        batch_size: int,
        weight_decay: float,
        unknown_fraction: float,
        generator: torch.Generator,
    ) -> None:
        self.network, self.heads, self.rows = network, heads, rows
        self.batch_size = min(batch_size, len(rows))
        self.unknown_fraction = unknown_fraction
        self.generator = generator
        self.tables = TableOptimizer(list(network.tables), priors)
        self.gradients = LayerGradients(network)
        self.layers = AdamW(self.gradients.parameters, weight_decay)
        self.noise = torch.ones(len(heads), device=rows.device)  # residual variance of each target
        self.mean_weight = rows.weights.mean()
        self.epoch: Rows | None = None
        self.drawn_from: torch.Tensor | None = None  # state of the generator before the epoch was drawn
        self.position = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data; the few rows that are left over sit out an epoch."""
        return len(self.rows) // self.batch_size

    def next_batch(self) -> Rows:
        """The next rows of a random order that is drawn anew for every epoch."""
        if self.epoch is None or self.position == self.steps_per_epoch:
            self.draw_epoch()
            self.position = 0
        start = self.position * self.batch_size
        self.position += 1
        return self.epoch.take(slice(start, start + self.batch_size))

    def draw_epoch(self) -> None:
        """Draw the order of an epoch's rows; `drawn_from` is all it takes to draw the same again."""
        self.drawn_from = self.generator.get_state()
        self.epoch = self.rows.shuffled(self.generator, self.unknown_fraction, self.batch_size)

    def advance(self, lr: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One step at a rate; loss and accuracy of the batch, left on the device."""
        batch = self.next_batch()
        outputs = self.gradients.forward(self.tables.lookup(batch.codes), batch.numeric)
        weights = batch.weights / self.mean_weight
        slope = output_gradients(self.heads, outputs, batch.targets, self.noise)
        vectors_slope = self.gradients.backward(slope * (weights / len(weights))[:, None])
        self.layers.step(self.gradients.gradient, lr)
        self.tables.step(batch.codes, vectors_slope, TABLE_RATE * lr)
        if any(head.kind == "continuous" for head in self.heads):
            errors = weights @ squared_errors(self.heads, outputs, batch.targets) / len(weights)
            self.noise.lerp_(errors, 0.01).clamp_(min=MIN_NOISE, max=1.0)
        losses = row_losses(self.heads, outputs, batch.targets)
        loss = weights @ losses / len(weights)
        return loss, accuracy(self.heads, outputs, batch.targets, batch.weights)

    def step(self, lr: float) -> tuple[float, float | None]:
        """One step at a rate; loss and accuracy of the batch as numbers (waits for the device)."""
        loss, hits = self.advance(lr)
        return loss.item(), None if hits is None else hits.item()

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite (waits for the device)."""
        return all(bool(part.isfinite().all()) for part in self.network.parameters())

    def measure_batch_norm(self) -> None:
        """Take batch norm's mean and variance from one large batch, with dropout as in training.

        Averages over the steps would trail behind the weights, in a short training by far. Without dropout
        the variance would be too small, and the layers would get larger inputs than they were trained on.
        """
        batch = (self.epoch or self.rows).take(slice(0, EVALUATION_BATCH))
        self.tables.settle()
        self.network.train()
        devices = [batch.codes.device] if batch.codes.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # a look at the network changes no random state
            self.network(self.network.lookup(batch.codes), batch.numeric)

    def evaluate(self, rows: Rows) -> tuple[float, float | None]:
        """Mean loss and accuracy over rows, without dropout."""
        self.measure_batch_norm()
        self.network.eval()
        loss, hits, total = 0.0, None, float(rows.weights.sum())
        with torch.no_grad():
            for batch in rows.batches(EVALUATION_BATCH):
                outputs = self.network(self.network.lookup(batch.codes), batch.numeric)
                loss += float((row_losses(self.heads, outputs, batch.targets) * batch.weights).sum())
                right = accuracy(self.heads, outputs, batch.targets, batch.weights)
                if right is not None:
                    hits = (hits or 0.0) + float(right) * float(batch.weights.sum())
        return loss / total, None if hits is None else hits / total

    def snapshot(self) -> dict[str, Any]:
        """A copy of all that a step changes, random states included."""
        cuda = self.rows.device.type == "cuda"
        return {
            "network": copy.deepcopy(self.network.state_dict()),
            "layers": self.layers.state(),
            "tables": self.tables.state(),
            "noise": self.noise.clone(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.rows.device) if cuda else None,
            "epoch": self.epoch,  # never changed in place once drawn
            "drawn_from": self.drawn_from,
            "position": self.position,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Put everything back, bit for bit."""
        self.network.load_state_dict(snapshot["network"])
        self.layers.load_state(snapshot["layers"])
        self.tables.load_state(snapshot["tables"])
        self.noise.copy_(snapshot["noise"])
        self.generator.set_state(snapshot["generator"])
        torch.set_rng_state(snapshot["torch"])
        if snapshot["cuda"] is not None:
            torch.cuda.set_rng_state(snapshot["cuda"], self.rows.device)
        self.epoch, self.drawn_from = snapshot["epoch"], snapshot["drawn_from"]
        self.position = snapshot["position"]


def train(
    trainer: Trainer,
    schedule: Callable[[int], float],
    max_epochs: int,
    *,
    watch: Rows | None = None,
    n_iter_no_change: int = 5,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
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

    Raises
    ------
    UnstableTrainingError
        If the loss is still not finite after three restarts; the last sound weights are left in place.
    """
    history, rate_factor = History(), 1.0
    best_loss, best_state = float("inf"), None
    bar = iter(progress(range(max_epochs * trainer.steps_per_epoch)))
    for epoch in range(1, max_epochs + 1):
        start = trainer.snapshot()
        while True:
            first = (epoch - 1) * trainer.steps_per_epoch
            lrs = [rate_factor * schedule(first + i) for i in range(trainer.steps_per_epoch)]
            train_loss = _run_epoch(trainer, lrs, bar)
            # The last step's loss does not know yet what that step did to the weights.
            if math.isfinite(train_loss) and trainer.is_finite():
                break
            trainer.restore(start)
            history.restarts += 1
            if history.restarts > MAX_RESTARTS:
                raise UnstableTrainingError(
                    f"the loss is not finite in epoch {epoch}, not even at {rate_factor:g} times the "
                    "learning rate: set a lower max_lr"
                )
            rate_factor /= 10
            warnings.warn(
                f"the loss was not finite in epoch {epoch}: repeating it at {rate_factor:g} times the rate",
                RuntimeWarning,
                stacklevel=2,
            )
        history.lrs += lrs
        watched = trainer.evaluate(watch) if watch is not None else (None, None)
        names = ("epoch", "train_loss", "validation_loss", "validation_accuracy")
        history.epochs.append(dict(zip(names, (epoch, train_loss, *watched), strict=True)))
        if watch is None:
            history.best_epoch = epoch
        elif watched[0] < best_loss:
            best_loss, best_state, history.best_epoch = watched[0], trainer.snapshot(), epoch
        elif epoch - history.best_epoch >= n_iter_no_change:
            break
    if best_state is not None:
        trainer.restore(best_state)
    trainer.measure_batch_norm()
    return history


def _run_epoch(trainer: Trainer, lrs: Sequence[float], bar: Iterator[int]) -> float:
    """One step at each rate; the mean loss."""
    losses = []
    for lr in lrs:
        losses.append(trainer.advance(lr)[0])
        next(bar, None)
    return torch.stack(losses).mean().item()  # the one wait for the device in an epoch
