"""Training, step by step."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from embedkit.learning.data import Rows
from embedkit.learning.gradients import LayerGradients
from embedkit.learning.group import Group, SharedGradients
from embedkit.learning.losses import MIN_NOISE, accuracy, output_gradients, row_losses, squared_errors
from embedkit.learning.memory import OutOfMemoryError, Result, TornStepError, attempt, halved
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.optimizer import AdamW, TableOptimizer
from embedkit.learning.targets import Head
from embedkit.learning.threads import ThreadChoice

# Step of the tables for one of the layers. Long tables need large steps to get where their prior wants them
# within a training; the layers do best with small ones.
TABLE_RATE = 4.0
EVALUATION_BATCH = 16_384


class BatchResult(NamedTuple):
    """What a pass over a batch gives besides the gradients of the layers.

    Attributes
    ----------
    slopes : list of tensor of shape (batch, width)
        Of the mean loss by the vectors of each feature.
    squares : tensor of shape (n_heads,) or None
        Mean squared errors; None without a continuous target.
    loss : tensor
        Mean over the batch.
    accuracy : tensor or None
        Share of the rows whose class is right; None without classes.
    """

    slopes: list[torch.Tensor]
    squares: torch.Tensor | None
    loss: torch.Tensor
    accuracy: torch.Tensor | None


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
    precision : {"float32", "bfloat16"}
        See `LayerGradients`.
    generator : torch.Generator
        Draws the order of the rows and the values to replace.
    group : Group, optional
        Processes that share each batch.
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
        precision: str = "float32",
        generator: torch.Generator,
        group: Group | None = None,
    ) -> None:
        self.network, self.heads, self.rows = network, heads, rows
        self.batch_size = self.micro_batch = min(batch_size, len(rows))
        self.evaluation_batch = EVALUATION_BATCH
        self.moving = False  # whether a step is changing the weights
        self.unknown_fraction = unknown_fraction
        self.generator = generator
        self.tables = TableOptimizer(list(network.tables), priors)
        self.group = group
        if group is None:
            self.gradients = LayerGradients(network, precision)
            self.threads = ThreadChoice.for_batches(self.batch_size, rows.device, precision)
        else:
            self.gradients = SharedGradients(network, precision, group)
            self.threads = ThreadChoice(1)
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
        """One step at a rate; loss and accuracy of the batch, left on the device.

        Where memory runs out the step is taken again with half as many rows at a time, `micro_batch`, whose
        gradients add up to those of the batch; batch norm sees these rows only.

        Raises
        ------
        OutOfMemoryError
            If there are few rows at a time already.
        TornStepError
            If the weights were being changed; the next step will take fewer rows at a time.
        """
        batch, enough = attempt(self.next_batch)
        if not enough:
            raise OutOfMemoryError(
                "out of memory in putting the rows of an epoch in order: give them as Parquet files, which "
                "need not fit"
            )
        while True:
            result, enough = attempt(lambda: self.threads.run(lambda: self._take_step(batch, lr)))
            if enough:
                return result
            if self.group is not None:
                raise OutOfMemoryError(
                    f"out of memory in a training step of process {self.group.rank}: set a smaller batch_size"
                )
            torn = self.moving
            self.micro_batch = halved(min(self.micro_batch, len(batch)), "a training step")
            if torn:
                raise TornStepError("out of memory in the middle of a step: set a smaller batch_size")

    def _take_step(self, batch: Rows, lr: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.moving = False
        result = self._gradients(batch)
        self.moving = True  # where memory runs out from here on, the step is torn
        self.layers.step(self.gradients.gradient, lr)
        self.tables.step(batch.codes, result.slopes, TABLE_RATE * lr)
        if result.squares is not None:
            self.noise.lerp_(result.squares, 0.01).clamp_(min=MIN_NOISE, max=1.0)
        self.moving = False
        return result.loss, result.accuracy

    def _gradients(self, batch: Rows) -> BatchResult:
        """As `_pass`, of a whole batch."""
        if self.group is not None:
            return self._shared_pass(batch)
        return self._pass(batch, len(batch)) if self.micro_batch >= len(batch) else self._passes(batch)

    def _shared_pass(self, batch: Rows) -> BatchResult:
        """As `_pass`, of a batch that the processes of the group share."""
        rows, add = self.group.share(batch), self.group.add
        with self.group.own_draws(rows.codes.device):
            own = self._pass(rows, len(batch))
        add(self.gradients.gradient)
        hits = own.accuracy
        if hits is not None:
            hits = add(hits * (rows.weights.sum() / batch.weights.sum()))
        slopes = [self.group.side_by_side(part) for part in own.slopes]
        squares = None if own.squares is None else add(own.squares)
        return BatchResult(slopes, squares, add(own.loss), hits)

    def _pass(self, rows: Rows, batch_size: int) -> BatchResult:
        """Gradients from rows of a batch; those of the layers stay in place."""
        outputs = self.gradients.forward(self.tables.lookup(rows.codes), rows.numeric)
        weights = rows.weights / self.mean_weight
        slope = output_gradients(self.heads, outputs, rows.targets, self.noise)
        slopes = self.gradients.backward(slope * (weights / batch_size)[:, None])
        squares = None
        if any(head.kind == "continuous" for head in self.heads):
            errors = squared_errors(self.heads, outputs, rows.targets)  # (batch, n_heads)
            squares = (errors * weights[:, None]).sum(dim=0) / batch_size
        # Sums, not products of vectors: those come out otherwise on another number of threads.
        loss = (row_losses(self.heads, outputs, rows.targets) * weights).sum() / batch_size
        hits = accuracy(self.heads, outputs, rows.targets, rows.weights)
        return BatchResult(slopes, squares, loss, hits)

    def _passes(self, batch: Rows) -> BatchResult:
        """As `_pass`, a few rows at a time."""
        gradient, results, shares = torch.zeros_like(self.gradients.gradient), [], []
        for rows in batch.batches(self.micro_batch):
            results.append(self._pass(rows, len(batch)))
            shares.append(rows.weights.sum() / batch.weights.sum())
            gradient += self.gradients.gradient
        self.gradients.gradient.copy_(gradient)
        slopes, squares, losses, hits = zip(*results, strict=True)
        return BatchResult(
            [torch.cat(parts) for parts in zip(*slopes, strict=True)],
            None if squares[0] is None else sum(squares),
            sum(losses),
            None if hits[0] is None else sum(h * share for h, share in zip(hits, shares, strict=True)),
        )

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
        self.network.train()
        self._with_enough_memory(self._measure_batch_norm)

    def _measure_batch_norm(self) -> None:
        batch = (self.epoch or self.rows).take(slice(0, self.evaluation_batch))
        devices = [batch.codes.device] if batch.codes.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # a look at the network changes no random state
            self.network(self.tables.lookup(batch.codes), batch.numeric)

    def evaluate(self, rows: Rows) -> tuple[float, float | None]:
        """Mean loss and accuracy over rows, without dropout."""
        self.measure_batch_norm()
        self.network.eval()
        return self._with_enough_memory(lambda: self._evaluate(rows))

    def _evaluate(self, rows: Rows) -> tuple[float, float | None]:
        loss, hits, total = 0.0, None, float(rows.weights.sum())
        with torch.no_grad():
            for batch in rows.batches(self.evaluation_batch):
                outputs = self.network(self.tables.lookup(batch.codes), batch.numeric)
                loss += float((row_losses(self.heads, outputs, batch.targets) * batch.weights).sum())
                right = accuracy(self.heads, outputs, batch.targets, batch.weights)
                if right is not None:
                    hits = (hits or 0.0) + float(right) * float(batch.weights.sum())
        return loss / total, None if hits is None else hits / total

    def _with_enough_memory(self, call: Callable[[], Result]) -> Result:
        """The result of a call, which takes `evaluation_batch` rows at a time."""
        while True:
            result, enough = attempt(call)
            if enough:
                return result
            self.evaluation_batch = halved(self.evaluation_batch, "a look at the rows")

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
        self.epoch, self.drawn_from = snapshot["epoch"], snapshot["drawn_from"]
        self.position = snapshot["position"]
        if self.epoch is None and self.drawn_from is not None:  # from a file, which holds no rows
            self.generator.set_state(self.drawn_from)
            self.draw_epoch()
        self.generator.set_state(snapshot["generator"])
        torch.set_rng_state(snapshot["torch"])
        if snapshot["cuda"] is not None:
            torch.cuda.set_rng_state(snapshot["cuda"], self.rows.device)
