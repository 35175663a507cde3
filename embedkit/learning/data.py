"""The rows a network learns from, as compact tensors on its device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

# Repeated rows are folded into one weighted row up to this many rows; sorting more costs more than it saves.
MAX_FOLDED_ROWS = 50_000


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

    def to(self, device: torch.device) -> "Rows":
        """The rows on another device."""
        parts = (self.codes, self.numeric, self.targets, self.weights)
        return Rows(*(part.to(device) for part in parts))

    def batches(self, batch_size: int) -> Iterator["Rows"]:
        """All rows in order, in batches."""
        for start in range(0, len(self), batch_size):
            yield self.take(slice(start, start + batch_size))


def make_rows(codes: np.ndarray, numeric: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Rows:
    """Rows as tensors, in an order and with weights that depend only on what the data say.

    Rows of weight 0 are dropped. In data of up to 50,000 rows equal rows become one, their weights added up, and the
    rows are sorted: a weight of 2 and a row given twice are then the same thing to the last bit, and the order of the
    input plays no part. Larger data keep their rows as they come; there a weight of 2 is a row given twice in the mean.

    Parameters
    ----------
    codes : int32 array of shape (n_rows, n_features)
    numeric : float32 array of shape (n_rows, n_numeric)
    targets : float32 array of shape (n_rows, n_heads)
    weights : float array of shape (n_rows,)
    """
    present = weights > 0
    if not present.all():
        codes, numeric, targets, weights = (
            codes[present],
            numeric[present],
            targets[present],
            weights[present],
        )
    if len(codes) <= MAX_FOLDED_ROWS:
        keys = np.concatenate([codes.astype(np.float64), numeric, targets], axis=1)
        _, first, groups = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        codes, numeric, targets = codes[first], numeric[first], targets[first]
        weights = np.bincount(groups.ravel(), weights)
    return Rows(
        torch.tensor(codes, dtype=torch.int32),
        torch.tensor(numeric, dtype=torch.float32),
        torch.tensor(targets, dtype=torch.float32),
        torch.tensor(weights, dtype=torch.float32),
    )


def hold_out(rows: Rows, fraction: float, generator: torch.Generator) -> tuple[Rows, Rows]:
    """Split rows at random into those to learn from and those to watch."""
    order = torch.randperm(len(rows), generator=generator)
    n_held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    return rows.take(order[n_held:]), rows.take(order[:n_held])
