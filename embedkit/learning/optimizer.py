"""The optimizer of the embedding tables: shrinkage that knows the counts.

Adam divides each element's gradient by that element's own history, so a category seen three times takes steps
as large as one seen 3,000 times, and memorises noise. Here a table has one second moment, a scalar over the
rows of the batch, and a Gaussian prior on its vectors (an L2 penalty on their sum of squares, once per row of
the table): a vector moves from zero only as far as the rows of its category carry it, as random effects do in
a mixed model (Simchoni & Rosset, LMMNN, NeurIPS 2021).

Only the rows of a batch are touched. What the prior does to the others in the meantime is one common factor
per step; its logarithm is summed up and applied when a row is next looked up, which is exact.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch


class TableOptimizer:
    """Moves the vectors of a batch.

    Parameters
    ----------
    tables : sequence of tensor of shape (num_embeddings, embedding_dim)
        Changed in place.
    priors : sequence of float
        Precision of the prior of each table, per row of the data: the penalty is
        ``prior / 2 * sum of squares``, added to the mean loss.
    beta : float, default=0.99
        Decay of the second moment, per step.
    """

    def __init__(self, tables: Sequence[torch.Tensor], priors: Sequence[float], beta: float = 0.99) -> None:
        self.tables, self.priors, self.beta = list(tables), list(priors), beta
        device = self.tables[0].device
        sizes = [len(table) for table in self.tables]
        self.dims = [table.shape[1] for table in self.tables]
        self.offsets = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=device)
        self.sums = [torch.zeros_like(table) for table in self.tables]  # gradients, zero between steps
        self.hits = torch.zeros(sum(sizes), device=device)  # zero between steps
        self.second_moments = torch.zeros(len(sizes), device=device)
        self.shrunk = torch.zeros(len(sizes), dtype=torch.float64, device=device)  # log factor so far
        self.applied = torch.zeros(sum(sizes), dtype=torch.float64, device=device)  # of it, per table row
        self.times = [0.0] * len(sizes)  # sum of the rates taken so far: how far gradient flow has come
        self.num_steps = 0

    def catch_up(self, codes: torch.Tensor) -> None:
        """Bring the vectors of a batch up to date; call before they are looked up."""
        columns = codes.T.long()  # (n_features, batch)
        rows = columns + self.offsets[:, None]
        factors = torch.exp(self.shrunk[:, None] - self.applied[rows]).float()
        for table, column, factor in zip(self.tables, columns, factors, strict=True):
            table.index_copy_(0, column, table.index_select(0, column).mul_(factor[:, None]))
        self.applied[rows] = self.shrunk[:, None].expand(rows.shape)

    def catch_up_all(self) -> None:
        """Bring all vectors up to date; call before the tables are read as a whole."""
        for i, table in enumerate(self.tables):
            start = int(self.offsets[i])
            applied = self.applied[start : start + len(table)]
            table.mul_(torch.exp(self.shrunk[i] - applied).float()[:, None])
            applied.copy_(self.shrunk[i].expand(len(table)))

    def step(self, codes: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """Take one step.

        Parameters
        ----------
        codes : tensor of shape (batch, n_features)
            The rows of the tables that were looked up.
        gradient : tensor of shape (batch, sum of embedding_dims)
            Of the mean loss by the looked-up vectors.
        lr : float
            Learning rate.
        """
        self.num_steps += 1
        columns = codes.T.long()  # (n_features, batch)
        rows = columns + self.offsets[:, None]
        flat = rows.flatten()
        self.hits.index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
        share = 1 / self.hits[rows]  # of its category's entry that a row of the batch stands for
        self.hits.index_fill_(0, flat, 0)
        summed = []
        parts = gradient.split(self.dims, dim=1)
        for sums, column, part in zip(self.sums, columns, parts, strict=True):
            sums.index_add_(0, column, part)
            summed.append(sums.index_select(0, column))  # (batch, dim), the same for rows of one category
            sums.index_fill_(0, column, 0)
        squares = torch.stack([part.square().mean(dim=1) for part in summed])  # (n_features, batch)
        moment = (squares * share).sum(dim=1) / share.sum(dim=1)
        self.second_moments.lerp_(moment, 1 - self.beta)
        unbiased = self.second_moments / (1 - self.beta**self.num_steps)
        rates = (lr / (unbiased.sqrt() + 1e-12)).tolist()
        self.times = [time + rate for time, rate in zip(self.times, rates, strict=True)]
        # Past one half a step of the prior would overshoot; then it only halves.
        decays = [min(rate * prior, 0.5) for rate, prior in zip(rates, self.priors, strict=True)]
        for i, (table, column) in enumerate(zip(self.tables, columns, strict=True)):
            vectors = table.index_select(0, column).mul_(1 - decays[i]).sub_(summed[i], alpha=rates[i])
            # Rows of one category write the same value: the order of the writes does not matter.
            table.index_copy_(0, column, vectors)
        self.shrunk += self.shrunk.new_tensor([math.log1p(-decay) for decay in decays])
        self.applied[rows] = self.shrunk[:, None].expand(rows.shape)

    def state(self) -> dict[str, Any]:
        """A copy of all that a step changes, the tables apart."""
        return {
            "second_moments": self.second_moments.clone(),
            "shrunk": self.shrunk.clone(),
            "applied": self.applied.clone(),
            "times": self.times,
            "num_steps": self.num_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` copied; a step that was cut short leaves nothing behind."""
        for scratch in (*self.sums, self.hits):
            scratch.zero_()
        self.second_moments.copy_(state["second_moments"])
        self.shrunk.copy_(state["shrunk"])
        self.applied.copy_(state["applied"])
        self.times, self.num_steps = state["times"], state["num_steps"]
