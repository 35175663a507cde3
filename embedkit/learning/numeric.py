"""Numeric side inputs: standardised, missing ones imputed and flagged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedkit.columns import NumericColumn
from embedkit.errors import InputError

NUMERIC_OUTPUTS = ("scale", "passthrough", "drop")
# Up to this many rows the order of the input plays no part; sorting more costs more than it saves.
MAX_SORTED_ROWS = 50_000
# Inputs of the network are within so many standard deviations.
MAX_DEVIATION = 1e6


def moments(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Weighted mean and standard deviation.

    Up to 50,000 rows neither their order, nor whether a value is given twice or with weight 2, changes a bit.

    Parameters
    ----------
    values : float64 array of shape (n_rows,)
    weights : array of shape (n_rows,)
        Positive.
    """
    if len(values) <= MAX_SORTED_ROWS:
        order = np.lexsort((weights, values))
        values, first = np.unique(values[order], return_index=True)
        weights = np.add.reduceat(weights[order], first)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.average(values, weights=weights)
        return float(mean), float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))


def check_moments(what: str, mean: float, scale: float) -> None:
    """Raise InputError where numbers are so large that their squares overflow."""
    if not np.isfinite([mean, scale]).all():
        raise InputError(f"{what} holds numbers too large to standardise, beyond about 1e150: rescale it")


class RunningMoments:
    """Weighted mean and standard deviation of columns that come batch by batch.

    Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.

    Parameters
    ----------
    width : int
        Number of columns.

    Attributes
    ----------
    means : float array of shape (width,)
        Of the known values; 0 where there are none.
    missing : bool array of shape (width,)
        Whether a column has missing values.
    total : float
        Weight of all rows.
    """

    def __init__(self, width: int) -> None:
        self.means, self.weights, self._squares = np.zeros((3, width))
        self.missing = np.zeros(width, dtype=bool)
        self.total = 0.0

    def add(self, block: np.ndarray, weights: np.ndarray) -> None:
        """Add rows of positive weights: a block of shape (n_rows, width), NaN where missing."""
        self.total += float(weights.sum())
        known = ~np.isnan(block)
        self.missing |= ~known.all(axis=0)
        shares = known * weights[:, None]
        added = shares.sum(axis=0)
        block = np.where(known, block, 0.0)
        weight = self.weights + added
        fraction = added / np.where(weight > 0, weight, 1.0)
        with np.errstate(over="ignore", invalid="ignore"):  # of which `check_moments` tells
            means = (shares * block).sum(axis=0) / np.where(added > 0, added, 1.0)
            shift = np.where(added > 0, means - self.means, 0.0)
            self._squares += (shares * (block - means) ** 2).sum(axis=0) + shift**2 * self.weights * fraction
            self.means += shift * fraction
        self.weights = weight

    def scales(self) -> np.ndarray:
        """Standard deviation of each column, 1 where nothing is known."""
        known = self.weights > 0
        return np.where(known, np.sqrt(self._squares / np.where(known, self.weights, 1.0)), 1.0)


@dataclass(frozen=True)
class NumericInputs:
    """How numeric columns enter the network.

    Attributes
    ----------
    features : tuple of str
    means, scales : tuple of float
        Mean and standard deviation of each column over its known values; the mean stands in for missing ones.
    flagged : tuple of bool
        Whether a column had missing values, which then have an input of their own.
    """

    features: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    flagged: tuple[bool, ...]

    @classmethod
    def fit(cls, block: np.ndarray, features: Sequence[str], weights: np.ndarray) -> "NumericInputs":
        """Measure the columns of a block.

        Parameters
        ----------
        block : float64 array of shape (n_rows, n_features)
            NaN where missing.
        features : sequence of str
        weights : array of shape (n_rows,)
        """
        present = weights > 0
        block, weights = block[present], weights[present]
        means, scales, flagged = [], [], []
        for values in block.T:
            known = ~np.isnan(values)
            mean, scale = 0.0, 1.0
            if known.any():
                mean, scale = moments(values[known], weights[known])
            means.append(mean)
            scales.append(scale)
            flagged.append(not known.all())
        return cls.of_moments(features, means, scales, flagged)

    @classmethod
    def of_moments(
        cls, features: Sequence[str], means: Sequence[float], scales: Sequence[float], flagged: Sequence[bool]
    ) -> "NumericInputs":
        """Inputs of columns whose moments are known; the parameters are the attributes.

        Raises
        ------
        InputError
            If the numbers of a column are too large to be standardised.
        """
        for feature, mean, scale in zip(features, means, scales, strict=True):
            check_moments(f"column {feature!r}", mean, scale)
        # A constant column comes out as zero, whatever its rounding error.
        sound = [
            scale if scale > 1e-12 * max(abs(mean), 1e-300) else 1.0
            for mean, scale in zip(means, scales, strict=True)
        ]
        return cls(tuple(features), tuple(means), tuple(sound), tuple(flagged))

    @property
    def width(self) -> int:
        """Number of inputs: the columns and their flags."""
        return len(self.features) + sum(self.flagged)

    def transform(self, block: np.ndarray) -> np.ndarray:
        """Inputs of the network, float32 of shape (n_rows, width): all columns, then the flags."""
        missing = np.isnan(block)
        scaled = (np.where(missing, np.array(self.means), block) - np.array(self.means)) / np.array(
            self.scales
        )
        # Rows to learn from are not as far out; a later one, such as 1e39 for "none", would overflow.
        scaled = np.clip(scaled, -MAX_DEVIATION, MAX_DEVIATION)
        return np.concatenate(
            [scaled, missing[:, np.array(self.flagged, dtype=bool)]], axis=1, dtype=np.float32
        )

    def columns_out(self, how: str, sensitivity: np.ndarray) -> tuple[NumericColumn, ...]:
        """How the columns come out of the encoder.

        Parameters
        ----------
        how : {"scale", "passthrough", "drop"}
            In units of the network's own sensitivity, as they are, or not at all.
        sensitivity : array of shape (width,)
            Norm of the first layer's weights for each input.
        """
        if how == "drop":
            return ()
        if how == "passthrough":
            return tuple(NumericColumn(feature) for feature in self.features)
        flags = iter(sensitivity[len(self.features) :].tolist())
        return tuple(
            NumericColumn(
                feature,
                fill=mean,
                center=mean,
                scale=float(sensitivity[i]) / scale,
                missing_scale=next(flags) if flagged else None,
            )
            for i, (feature, mean, scale, flagged) in enumerate(
                zip(self.features, self.means, self.scales, self.flagged, strict=True)
            )
        )

    def to_json(self) -> dict[str, Any]:
        """The inputs as JSON can hold them."""
        return {
            "features": list(self.features),
            "means": list(self.means),
            "scales": list(self.scales),
            "flagged": list(self.flagged),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "NumericInputs":
        """The inputs that `to_json` wrote."""
        return cls(**{name: tuple(values) for name, values in content.items()})
