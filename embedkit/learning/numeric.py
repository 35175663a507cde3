"""Numeric side inputs: standardised, missing ones imputed and flagged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedkit.columns import NumericColumn

NUMERIC_OUTPUTS = ("scale", "passthrough", "drop")
# Up to this many rows the order of the input plays no part; sorting more costs more than it saves.
MAX_SORTED_ROWS = 50_000


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
    mean = np.average(values, weights=weights)
    return float(mean), float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))


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
            # A constant column comes out as zero, whatever its rounding error.
            scales.append(scale if scale > 1e-12 * max(abs(mean), 1e-300) else 1.0)
            flagged.append(not known.all())
        return cls(tuple(features), tuple(means), tuple(scales), tuple(flagged))

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
