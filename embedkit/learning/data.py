"""The rows a network learns from, as compact tensors on its device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from embedkit.errors import InputError
from embedkit.learning.numeric import MAX_SORTED_ROWS
from embedkit.vocabulary import UNKNOWN


@dataclass(frozen=True)
class Rows:
    """Coded rows.

    Attributes
    ----------
    codes : int32 of shape (n_rows, n_features)
    numeric : float32 of shape (n_rows, n_numeric)
    targets : float32 of shape (n_rows, n_heads)
    weights : float32 of shape (n_rows,)
        How many rows of the data each one stands for.
    """

    codes: torch.Tensor
    numeric: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, index: torch.Tensor | slice) -> "Rows":
        """Some of the rows."""
        return Rows(self.codes[index], self.numeric[index], self.targets[index], self.weights[index])

    def repeated(self) -> "Rows":
        """Rows of whole weights, if these add up to no more than 50,000, as that many rows of weight 1."""
        whole = bool((self.weights % 1 == 0).all()) and float(self.weights.double().sum()) <= MAX_SORTED_ROWS
        if not whole:
            return self
        index = torch.arange(len(self), device=self.device).repeat_interleave(self.weights.long())
        return replace(self.take(index), weights=torch.ones(len(index), device=self.device))

    def to(self, device: torch.device) -> "Rows":
        """The rows on another device."""
        parts = (self.codes, self.numeric, self.targets, self.weights)
        return Rows(*(part.to(device) for part in parts))

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.codes.device

    def shuffled(self, generator: torch.Generator, unknown_fraction: float, batch_size: int) -> "Rows":
        """The rows of an epoch: in random order, a fraction of their values replaced by unknown.

        Parameters
        ----------
        generator : torch.Generator
        unknown_fraction : float
            Fraction of values.
        batch_size : int
            Rows that will be taken at a time, from the first on.
        """
        order = torch.randperm(len(self), generator=generator)
        drawn = torch.rand(self.codes.shape, generator=generator)
        epoch = self.take(order.to(self.device))
        epoch.codes.masked_fill_((drawn < unknown_fraction).to(self.device), UNKNOWN)
        return epoch

    def batches(self, batch_size: int) -> Iterator["Rows"]:
        """All rows in order, in batches."""
        for start in range(0, len(self), batch_size):
            yield self.take(slice(start, start + batch_size))


def make_rows(codes: np.ndarray, numeric: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Rows:
    """Rows as tensors, in an order that depends only on what the data say.

    Rows of weight 0 are dropped. Up to 50,000 rows are sorted: the order of the input plays no part, and once
    they are `repeated` a weight of 2 and a row given twice are the same thing to the last bit. Larger data
    keep their rows as they come; there a weight of 2 is a row given twice in the mean.

    Parameters
    ----------
    codes : int32 array of shape (n_rows, n_features)
    numeric : float32 array of shape (n_rows, n_numeric)
    targets : float32 array of shape (n_rows, n_heads)
    weights : float array of shape (n_rows,)
    """
    index = np.flatnonzero(weights > 0)
    if len(index) <= MAX_SORTED_ROWS:
        keys = np.concatenate([weights[:, None], codes, numeric, targets], axis=1, dtype=np.float64)
        index = index[np.lexsort(keys[index].T)]  # by the last column first
    return Rows(
        torch.tensor(codes[index], dtype=torch.int32),
        torch.tensor(numeric[index], dtype=torch.float32),
        torch.tensor(targets[index], dtype=torch.float32),
        torch.tensor(weights[index], dtype=torch.float32),
    )


def hold_out(rows: Rows, fraction: float, generator: torch.Generator) -> tuple[Rows, Rows]:
    """Split rows at random into those to learn from, 2 at least, and those to watch, 1 at least.

    Before they are repeated: copies of one row on both sides would tell of nothing but memory.
    """
    if len(rows) < 3:
        raise InputError(f"early_stopping holds rows out and needs at least 3 rows, found {len(rows)}")
    order = torch.randperm(len(rows), generator=generator)
    n_held = min(max(1, round(fraction * len(rows))), len(rows) - 2)
    return rows.take(order[n_held:]), rows.take(order[:n_held])
