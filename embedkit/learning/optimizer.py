"""The optimizers: of the embedding tables, with shrinkage that knows the counts, and of the layers.

Adam divides each element's gradient by that element's own history, so a category seen three times takes steps
as large as one seen 3,000 times, and memorises noise. Here a table has one second moment, a scalar over the
rows of the batch, and a Gaussian prior on its vectors (an L2 penalty on their sum of squares, once per row of
the table): a vector moves from zero only as far as the rows of its category carry it, as random effects do in
a mixed model (Simchoni & Rosset, LMMNN, NeurIPS 2021).

Only the rows of a batch are touched. What the prior does to all others is one common factor per step: it is
kept beside the table, and multiplied in when a row is looked up. That is exact.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

# A common factor is multiplied into its table before the stored numbers could get out of float32's range: it
# at most halves in a step.
SETTLE_STEPS = 32


class TableOptimizer:
    """Moves the vectors of a batch.

    Parameters
    ----------
    tables : sequence of tensor of shape (num_embeddings, embedding_dim)
        Changed in place. Until `settle` a vector is a row of its table times the common factor.
    priors : sequence of float
        Precision of the prior of each table, per row of the data: the penalty is
        ``prior / 2 * sum of squares``, added to the mean loss.
    beta : float, default=0.99
        Decay of the second moment, per step.
    """

    def __init__(self, tables: Sequence[torch.Tensor], priors: Sequence[float], beta: float = 0.99) -> None:
        self.tables, self.beta = list(tables), beta
        device = self.tables[0].device
        sizes = [len(table) for table in self.tables]
        self.dims = [table.shape[1] for table in self.tables]
        self.widths = torch.tensor(self.dims, device=device)
        self.priors = torch.tensor(priors, dtype=torch.float64, device=device)
        self.offsets = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=device)[:, None]
        self.places = torch.zeros(sum(sizes), dtype=torch.int64, device=device)  # scratch
        self.second_moments = torch.zeros(len(sizes), dtype=torch.float64, device=device)
        self.log_factors = torch.zeros(len(sizes), dtype=torch.float64, device=device)
        self.travelled = torch.zeros(len(sizes), dtype=torch.float64, device=device)
        self.num_steps = 0

    @property
    def times(self) -> list[float]:
        """Sum of the rates taken so far, of each table: how far gradient flow has come."""
        return self.travelled.tolist()

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors of all features side by side, up to date."""
        stored = torch.cat([table.index_select(0, codes[:, i]) for i, table in enumerate(self.tables)], dim=1)
        factors = self.log_factors.exp().to(stored.dtype)
        return stored.mul_(factors.repeat_interleave(self.widths, output_size=sum(self.dims)))

    def settle(self) -> None:
        """Multiply the common factors in; call before the tables are read as a whole."""
        for table, factor in zip(self.tables, self.log_factors.exp(), strict=True):
            table.mul_(factor)
        self.log_factors.zero_()

    def step(self, codes: torch.Tensor, gradients: Sequence[torch.Tensor], lr: float) -> None:
        """Take one step.

        Parameters
        ----------
        codes : tensor of shape (batch, n_features)
            The rows of the tables that were looked up.
        gradients : sequence of tensor of shape (batch, embedding_dim)
            Of the mean loss by the looked-up vectors of each feature.
        lr : float
            Learning rate.
        """
        self.num_steps += 1
        columns = codes.T.long()  # (n_features, batch)
        groups, sizes = self._groups(columns)
        # Summed up over the rows of a category: as long as the table, or at one of the category's rows.
        is_short = [len(table) <= len(codes) for table in self.tables]
        sums = []
        for table, short, column, group, part in zip(
            self.tables, is_short, columns, groups, gradients, strict=True
        ):
            total = part.new_zeros(len(table) if short else len(codes), part.shape[1])
            sums.append(total.index_add_(0, column if short else group, part))
        squares = torch.stack([part.square().sum(dim=0).sum() for part in sums])  # (n_features,)
        self.second_moments.lerp_(squares.double() / (sizes * self.widths), 1 - self.beta)
        unbiased = self.second_moments / (1 - self.beta**self.num_steps)
        rates = lr / (unbiased.sqrt() + 1e-12)
        self.travelled += rates
        # Past one half a step of the prior would overshoot; then it only halves.
        self.log_factors += torch.log1p(-(rates * self.priors).clamp(max=0.5))
        scales = (-rates / self.log_factors.exp()).to(gradients[0].dtype)
        for table, short, column, part, scale in zip(
            self.tables, is_short, columns, sums, scales, strict=True
        ):
            part.mul_(scale)
            table.add_(part) if short else table.index_add_(0, column, part)
        if self.num_steps % SETTLE_STEPS == 0 and float(self.log_factors.min()) < -SETTLE_STEPS * math.log(2):
            self.settle()

    def _groups(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row of a batch the one that stands for its category, shape (n_features, batch), and how
        many categories there are, shape (n_features,)."""
        own = torch.arange(columns.shape[1], device=columns.device).expand(columns.shape)
        places = (columns + self.offsets).flatten()
        self.places.scatter_(0, places, own.flatten())  # of the rows of a category one has the last word
        groups = self.places.index_select(0, places).view(columns.shape)
        return groups, (groups == own).sum(dim=1)

    def state(self) -> dict[str, Any]:
        """A copy of all that a step changes, the tables apart."""
        return {
            "second_moments": self.second_moments.clone(),
            "log_factors": self.log_factors.clone(),
            "travelled": self.travelled.clone(),
            "num_steps": self.num_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` copied."""
        self.second_moments.copy_(state["second_moments"])
        self.log_factors.copy_(state["log_factors"])
        self.travelled.copy_(state["travelled"])
        self.num_steps = state["num_steps"]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019), on one tensor.

    The same as `torch.optim.AdamW`, which takes a second to import.

    Parameters
    ----------
    parameters : tensor of shape (n,)
        Changed in place.
    weight_decay : float
    betas : tuple of float, default=(0.9, 0.99)
        Decay of the first and second moments, per step.
    """

    def __init__(
        self, parameters: torch.Tensor, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        self.parameters, self.weight_decay, self.betas = parameters, weight_decay, betas
        self.mean, self.square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.num_steps = 0

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        """Take one step at a learning rate."""
        self.num_steps += 1
        first, second = self.betas
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        unbiased = (1 - second**self.num_steps) ** 0.5
        size = self.square.sqrt().add_(1e-8 * unbiased)
        self.parameters.mul_(1 - lr * self.weight_decay)
        self.parameters.addcdiv_(self.mean, size, value=-lr * unbiased / (1 - first**self.num_steps))

    def state(self) -> dict[str, Any]:
        """A copy of all that a step changes, the parameters apart."""
        return {"mean": self.mean.clone(), "square": self.square.clone(), "num_steps": self.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` copied."""
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.num_steps = state["num_steps"]
