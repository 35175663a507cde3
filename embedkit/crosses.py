"""Pairs of columns: what rows with a combination of two categories have in common.

Vectors are one column's; a model puts them together as well as its rows tell it to. Where single categories
are rare and their combinations tell (who asks for which resource), a number for the combination tells it
more directly: the mean of the target over its rows, shrunk to the mean of all as far as chance explains the
difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from embedkit.errors import InputError
from embedkit.frames import as_numpy, check_valid, from_numpy

_COLUMNS = ["first", "second", "count"]


@dataclass(frozen=True, eq=False, repr=False)
class Cross:
    """The numbers of the combinations of two features' categories.

    Attributes
    ----------
    features : tuple of two str
    pairs : int32 array of shape (n_pairs, 2)
        Codes of the combinations that were learned, sorted: rows of the tables of the two features.
    counts : float64 array of shape (n_pairs,)
        Rows (or their weight) behind each.
    effects : float32 array of shape (n_pairs, n_outputs)
        How far the target of such rows lies from the mean, a number for a target or for each class, shrunk,
        on the scale of the vectors. Other combinations have 0.

    Raises
    ------
    InputError
        If the parts do not fit one another.
    """

    features: tuple[str, str]
    pairs: np.ndarray
    counts: np.ndarray
    effects: np.ndarray

    def __post_init__(self) -> None:
        pairs = np.array(self.pairs, dtype=np.int32)
        counts, effects = np.array(self.counts, np.float64), np.array(self.effects, np.float32)
        fits = effects.ndim == 2 and effects.shape[1] and pairs.shape == (len(effects), 2)
        if len(self.features) != 2 or not fits or counts.shape != (len(effects),):
            raise InputError(
                f"a cross must be of two features, with pairs, counts and effects of as many rows, found "
                f"{self.features}, {pairs.shape}, {counts.shape}, {effects.shape}"
            )
        keys = pair_keys(*pairs.T)
        if not (np.isfinite(effects).all() and (pairs >= 0).all() and (np.diff(keys) > 0).all()):
            raise InputError(f"pairs of {self.features} must be sorted and unique, their effects finite")
        for name, value in {"pairs": pairs, "counts": counts, "effects": effects, "_keys": keys}.items():
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple:
        return Cross, (self.features, self.pairs, self.counts, self.effects)

    def __repr__(self) -> str:
        return f"Cross({self.features[0]!r}, {self.features[1]!r}, n_pairs={len(self.pairs)})"

    @property
    def name(self) -> str:
        """The two features, as one name."""
        return "_x_".join(self.features)

    @property
    def feature_names_out(self) -> tuple[str, ...]:
        """Names of the columns: that of the cross, and a number where there are several outputs."""
        n_outputs = self.effects.shape[1]
        return (self.name,) if n_outputs == 1 else tuple(f"{self.name}_{i}" for i in range(n_outputs))

    def transform(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The numbers of rows given by their codes, float32 of shape (n_rows, n_outputs)."""
        if not len(self.pairs):
            return np.zeros((len(first), self.effects.shape[1]), dtype=np.float32)
        keys = pair_keys(first, second)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where((self._keys[places] == keys)[:, None], self.effects[places], np.float32(0))

    def recoded(self, first: np.ndarray, second: np.ndarray) -> "Cross":
        """The same combinations where codes have become others: the new code of each old one."""
        pairs = np.stack([first[self.pairs[:, 0]], second[self.pairs[:, 1]]], axis=1)
        order = np.argsort(pair_keys(*pairs.T))
        return Cross(self.features, pairs[order], self.counts[order], self.effects[order])

    def equals(self, other: "Cross") -> bool:
        """Whether features, combinations, counts and effects are the same."""
        mine, its = ((part.pairs, part.counts, part.effects) for part in (self, other))
        return self.features == other.features and all(map(np.array_equal, mine, its))

    def to_arrow(self) -> pa.Table:
        """Columns first, second (codes), count, then the numbers."""
        columns = dict(zip(_COLUMNS, (*self.pairs.T, self.counts), strict=True))
        columns |= dict(zip(self.feature_names_out, self.effects.T, strict=True))
        return pa.table({name: from_numpy(np.ascontiguousarray(part)) for name, part in columns.items()})

    @classmethod
    def from_arrow(cls, features: Sequence[str], table: pa.Table) -> "Cross":
        """Read a table in the layout of `to_arrow`, trusting nothing.

        Raises
        ------
        InputError
            If the table is not in that layout, or its data is not valid.
        """
        check_valid(table)
        types = [pa.int32(), pa.int32(), pa.float64(), *[pa.float32()] * (table.num_columns - 3)]
        if table.schema.types != types or any(column.null_count for column in table.columns):
            raise InputError(f"pairs of {list(features)} must be in columns {_COLUMNS}, then numbers")
        first, second, counts, *effects = (as_numpy(part.combine_chunks()) for part in table.columns)
        if not effects:
            raise InputError(f"pairs of {list(features)} have no numbers")
        result = cls(tuple(features), np.stack([first, second], axis=1), counts, np.stack(effects, axis=1))
        if table.column_names != [*_COLUMNS, *result.feature_names_out]:
            raise InputError(f"pairs of {list(features)} must be in columns {result.feature_names_out}")
        return result


def pair_keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One number for every combination of two codes, in the order of the first, then the second."""
    return first.astype(np.int64) << 32 | second.astype(np.int64)
