"""A set of learned tables turns rows into numbers: the lookup that everything else stands on."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from embedkit.columns import EmbeddingTable, NumericColumn
from embedkit.crosses import Cross
from embedkit.errors import InputError, did_you_mean, repeated
from embedkit.frames import from_numpy, is_array, numeric_block, to_table, type_family

__all__ = ["EmbeddingSet", "EmbeddingTable", "NumericColumn"]

# A block of rows stays in the processor's second-level cache while every table adds its columns to it.
_BLOCK_ROWS = 8_192
# Starting threads costs more than it brings below this size.
_THREADED_ROWS = 50_000


class EmbeddingSet(Mapping[str, EmbeddingTable]):
    """All that was learned about the columns of a dataset: turns its rows into numbers, without torch.

    A mapping from feature to `EmbeddingTable`.

    Parameters
    ----------
    tables : iterable of EmbeddingTable
        One per categorical column; their order is the order of the output.
    numerics : iterable of NumericColumn
        One per numeric column that is passed on; they come after the tables.
    metadata : dict, optional
        Anything that JSON can hold: task, class labels, settings, scores, history.
    features_in : sequence of str, optional
        All these columns in the order in which an array holds them. The order of the output by default.
    crosses : iterable of Cross
        Numbers of combinations of categories of two of the features; they come last.

    Attributes
    ----------
    numerics : tuple of NumericColumn
    crosses : tuple of Cross
    metadata : dict
        As JSON gives it back: lists for tuples, text for keys.
    features_in, feature_names_out : tuple of str
        Names of the columns that go in and that come out.

    Raises
    ------
    InputError
        If names repeat, or `metadata` is not JSON.
    """

    def __init__(
        self,
        tables: Iterable[EmbeddingTable],
        numerics: Iterable[NumericColumn] = (),
        metadata: Mapping[str, Any] | None = None,
        *,
        features_in: Sequence[str] | None = None,
        crosses: Iterable[Cross] = (),
    ) -> None:
        tables = tuple(tables)
        self._tables = {table.feature: table for table in tables}
        self.numerics, self.crosses = tuple(numerics), tuple(crosses)
        features = [part.feature for part in (*tables, *self.numerics)]
        self.features_in = tuple(features if features_in is None else features_in)
        self.feature_names_out = tuple(
            name for part in (*tables, *self.numerics, *self.crosses) for name in part.feature_names_out
        )
        for names in (features, self.feature_names_out):
            if twice := repeated(names):
                raise InputError(f"column names must be unique, found more than once: {twice}; rename them")
        if sorted(self.features_in) != sorted(features):
            raise InputError(f"features_in must name {sorted(features)}, got {sorted(self.features_in)}")
        for cross in self.crosses:
            sizes = [len(self._tables[name].vectors) for name in cross.features if name in self._tables]
            if len(sizes) < 2 or (len(cross.pairs) and (cross.pairs.max(axis=0) >= sizes).any()):
                raise InputError(
                    f"{cross} must be of categories of two of the features, which are {features}"
                )
        try:
            self.metadata = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata must be JSON without NaN: {error}") from error

    def __getitem__(self, feature: str) -> EmbeddingTable:
        return self._tables[feature]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __repr__(self) -> str:
        shapes = [
            f"{table.feature}: {table.num_embeddings} x {table.embedding_dim}" for table in self.values()
        ]
        return f"EmbeddingSet({', '.join(shapes + [column.feature for column in self.numerics])})"

    @property
    def starts(self) -> dict[str, int]:
        """Where the columns of each feature, and of each cross by its name, begin in what comes out."""
        parts = [*self.items(), *((part.feature, part) for part in self.numerics)]
        parts += [(cross.name, cross) for cross in self.crosses]
        stops = np.cumsum([0, *(len(part.feature_names_out) for _, part in parts)]).tolist()
        return {name: start for (name, _), start in zip(parts, stops, strict=False)}

    @property
    def width(self) -> int:
        """Number of columns that come out."""
        return len(self.feature_names_out)

    def transform(self, X: Any) -> np.ndarray:
        """Look up every row: the vectors of all features side by side, then numeric columns, then crosses.

        Parameters
        ----------
        X : frame or array of n_rows rows
            A frame has the columns `features_in` in any order, and maybe others; an array has exactly these.

        Returns
        -------
        float32 array of shape (n_rows, width)

        Raises
        ------
        InputError
            If a column is missing, changed its type, or holds infinite numbers.
        """
        return self._lookup(X, order="C")

    def transform_table(self, X: Any) -> pa.Table:
        """Do what `transform` does, column by column: an Arrow table of the float32 columns that come out."""
        out = self._lookup(X, order="F")
        return pa.table([from_numpy(column) for column in out.T], names=list(self.feature_names_out))

    @property
    def text_features(self) -> tuple[str, ...]:
        """Features learned as text: every cell of a column of Python objects becomes one."""
        return tuple(name for name, part in self.items() if type_family(part.categories.type) == "string")

    @property
    def types_in(self) -> dict[str, pa.DataType]:
        """Types of the columns that go in, as they were learned; numbers are float64."""
        types = {feature: table.categories.type for feature, table in self.items()}
        return types | {column.feature: pa.float64() for column in self.numerics}

    def subset(self, features: str | Iterable[str]) -> "EmbeddingSet":
        """Keep one or some of the features, categorical or numeric, in the order of this set.

        Raises
        ------
        InputError
            If a feature is not in the set.
        """
        features = [features] if isinstance(features, str) else list(features)
        missing = [name for name in features if name not in self.features_in]
        if missing:
            hint = did_you_mean(missing, self.features_in)
            raise InputError(f"the set has no feature {missing}{hint}: it has {list(self.features_in)}")
        return EmbeddingSet(
            [table for table in self.values() if table.feature in features],
            [column for column in self.numerics if column.feature in features],
            self.metadata,
            features_in=[name for name in self.features_in if name in features],
            crosses=[cross for cross in self.crosses if {*cross.features} <= {*features}],
        )

    def equals(self, other: "EmbeddingSet") -> bool:
        """Whether tables, numeric columns, order of columns and metadata are the same."""
        return (
            list(self) == list(other)
            and all(self[feature].equals(other[feature]) for feature in self)
            and self.numerics == other.numerics
            and len(self.crosses) == len(other.crosses)
            and all(mine.equals(its) for mine, its in zip(self.crosses, other.crosses, strict=True))
            and self.features_in == other.features_in
            and self.metadata == other.metadata
        )

    def save(self, path: str | os.PathLike, attachments: Mapping[str, bytes] | None = None) -> str:
        """Publish the set as a new version of a stored set; see `embedkit.store.publish`."""
        from embedkit import store

        return store.publish(path, self, attachments=attachments or {})

    @classmethod
    def load(cls, path: str | os.PathLike, version: str | None = None) -> "EmbeddingSet":
        """Load a stored set, its current version by default; see `embedkit.store.load`."""
        from embedkit import store

        return store.load(path, version)

    def _lookup(self, X: Any, order: str) -> np.ndarray:
        """The output of `transform`, in rows (order "C") or in columns (order "F")."""
        names = self.features_in if is_array(X) else None
        table = to_table(X, columns=self.features_in, feature_names=names, as_strings=self.text_features)
        parts = list(self.values())
        codes = _run(lambda part: part.vocabulary.encode(table[part.feature]), parts, table.num_rows)
        out = np.empty((table.num_rows, self.width), dtype=np.float32, order=order)

        def fill(start: int) -> None:
            rows, stop = slice(start, start + _BLOCK_ROWS), 0
            for part, part_codes in zip(parts, codes, strict=True):
                first, stop = stop, stop + part.embedding_dim
                # The codes are valid by construction; "clip" spares numpy a buffer and a check.
                out[rows, first:stop] = part.vectors.take(part_codes[rows], axis=0, mode="clip")

        _run(fill, range(0, table.num_rows, _BLOCK_ROWS), table.num_rows)
        position = sum(part.embedding_dim for part in parts)
        for numeric in self.numerics:
            for values in numeric.transform(numeric_block(table, [numeric.feature])[:, 0]):
                out[:, position] = values
                position += 1
        by_feature = dict(zip(self, codes, strict=True))
        for cross in self.crosses:
            values = cross.transform(*(by_feature[name] for name in cross.features))
            out[:, position : position + values.shape[1]] = values
            position += values.shape[1]
        return out


def _run(function: Callable[[Any], Any], items: Sequence[Any], num_rows: int) -> list[Any]:
    """Apply a function to every item, on threads if there are many rows: numpy and Arrow release the GIL."""
    threads = min(pa.cpu_count(), len(items)) if num_rows >= _THREADED_ROWS else 1
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
