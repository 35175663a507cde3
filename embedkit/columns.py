"""What one column comes out as: the learned vectors of its categories, or a scaled number."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embedkit.errors import InputError, did_you_mean
from embedkit.frames import as_numpy, check_valid, from_numpy, to_column, to_list, type_family
from embedkit.vocabulary import FIRST, UNKNOWN, Vocabulary

if TYPE_CHECKING:
    import pandas as pd

# As an array that is made without pandas, which pa.array would import.
_KINDS = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(np.int32([0, 7, 14, 22])), pa.py_buffer(b"missingunknowncategory")]
)
_FEATURE_KEY = b"embedkit.feature"


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingTable:
    """The vectors of one feature.

    Attributes
    ----------
    vocabulary : Vocabulary
        Which value has which row.
    vectors : float32 array of shape (num_embeddings, embedding_dim)
        Row 0 is for missing, row 1 for unknown values, row ``2 + i`` for ``categories[i]``. Read-only.
    ranked : bool
        Whether the last column is not learned but the rank of the category in sorted order, on a scale that
        distances do not see; see `embedkit.learning.ranks`.

    Raises
    ------
    InputError
        If the vectors do not fit the vocabulary or are not finite.
    """

    vocabulary: Vocabulary
    vectors: np.ndarray
    ranked: bool = False

    def __post_init__(self) -> None:
        vectors = np.array(self.vectors, dtype=np.float32, order="C")
        if vectors.ndim != 2 or len(vectors) != self.num_embeddings or not vectors.shape[1]:
            raise InputError(
                f"vectors of {self.feature!r} must have shape ({self.num_embeddings}, embedding_dim), "
                f"found {vectors.shape}"
            )
        if not np.isfinite(vectors).all():
            raise InputError(f"vectors of {self.feature!r} must be finite, found NaN or infinite ones")
        if self.ranked and vectors.shape[1] < 2:
            raise InputError(f"vectors of {self.feature!r} must have a column beside the ranks, found none")
        vectors.setflags(write=False)
        object.__setattr__(self, "vectors", vectors)

    def __reduce__(self) -> tuple:
        return EmbeddingTable, (self.vocabulary, self.vectors, self.ranked)

    def __repr__(self) -> str:
        return (
            f"EmbeddingTable({self.feature!r}, categories={self.categories.type}, "
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim})"
        )

    @property
    def feature(self) -> str:
        """Name of the column."""
        return self.vocabulary.feature

    @property
    def categories(self) -> pa.Array:
        """The categories, sorted; row ``2 + i`` of `vectors` belongs to ``categories[i]``."""
        return self.vocabulary.categories

    @property
    def counts(self) -> np.ndarray:
        """Rows seen in fit (or their weight) per row of `vectors`; 0 where nothing trained it."""
        return self.vocabulary.counts

    @property
    def num_embeddings(self) -> int:
        """Number of rows of `vectors`."""
        return self.vocabulary.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Number of columns of `vectors`."""
        return self.vectors.shape[1]

    @property
    def learned_vectors(self) -> np.ndarray:
        """`vectors` without the rank."""
        return self.vectors[:, : self.embedding_dim - self.ranked]

    @property
    def feature_names_out(self) -> tuple[str, ...]:
        """Names of the columns of `vectors`: the feature and a zero-padded number, or "rank"."""
        n_axes = self.learned_vectors.shape[1]
        digits = len(str(n_axes - 1))
        names = (f"{self.feature}_{i:0{digits}}" for i in range(n_axes))
        return (*names, f"{self.feature}_rank") if self.ranked else tuple(names)

    def encode(self, column: Any) -> np.ndarray:
        """Codes (rows of `vectors`) of a column of n_rows values, int32 of shape (n_rows,)."""
        as_strings = type_family(self.categories.type) == "string"
        return self.vocabulary.encode(to_column(column, self.feature, as_strings=as_strings))

    def transform(self, column: Any) -> np.ndarray:
        """Look up the vectors of a column.

        Parameters
        ----------
        column : Arrow, pandas or polars column, or sequence, of n_rows values

        Returns
        -------
        float32 array of shape (n_rows, embedding_dim)

        Raises
        ------
        InputError
            If the type of the column is not the one that was learned.
        """
        return self.vectors.take(self.encode(column), axis=0)

    def vector(self, value: Any) -> np.ndarray:
        """Vector of one value, shape (embedding_dim,): that which `transform` gives to a column of it."""
        return self.transform([value])[0]

    def neighbors(self, value: Any, k: int = 5) -> "pd.DataFrame":
        """Find the categories nearest to a category.

        Parameters
        ----------
        value : a category, or None
            None stands for missing.
        k : int
            How many to return at most. The category itself is left out, and so are the rows for missing and
            unknown where nothing trained them.

        Returns
        -------
        pandas.DataFrame with columns category, distance (Euclidean) and count, nearest first

        Raises
        ------
        InputError
            If the value is not a category, or `k` is less than 1.
        """
        import pandas as pd

        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InputError(f"k must be a whole number of at least 1, got {k!r}")
        (code,) = self.encode([value])
        labels = self.vocabulary.labels()
        if code == UNKNOWN:
            hint = did_you_mean([str(value)], labels[FIRST:])
            raise InputError(f"column {self.feature!r} has no category {value!r}{hint}")
        differences = self.learned_vectors.astype(np.float64) - self.learned_vectors[code]
        distances = np.sqrt(np.einsum("ij,ij->i", differences, differences))
        listed = np.ones(self.num_embeddings, dtype=bool)
        listed[:FIRST] = self.counts[:FIRST] > 0
        listed[code] = False
        nearest = np.flatnonzero(listed)[np.argsort(distances[listed], kind="stable")[:k]]
        values = [*labels[:FIRST], *to_list(self.categories)]
        return pd.DataFrame(
            {
                "category": [values[row] for row in nearest],
                "distance": distances[nearest],
                "count": self.counts[nearest],
            }
        )

    def equals(self, other: "EmbeddingTable") -> bool:
        """Whether feature, categories (and their type), counts and vectors are the same."""
        return (
            self.feature == other.feature
            and self.categories.type == other.categories.type
            and self.categories.equals(other.categories)
            and self.counts.dtype == other.counts.dtype
            and np.array_equal(self.counts, other.counts)
            and np.array_equal(self.vectors, other.vectors)
            and self.ranked == other.ranked
        )

    def to_arrow(self) -> pa.Table:
        """Lay the table out in columns: kind (missing, unknown, category), category, count, then the vectors.

        Rows are in the order of their codes; ``category`` is null in the first two. The feature's name is in
        the metadata of the schema, under ``embedkit.feature``.
        """
        columns = {
            "kind": _kinds(self.num_embeddings),
            "category": pa.concat_arrays([pa.nulls(FIRST, self.categories.type), self.categories]),
            "count": from_numpy(self.counts),
        }
        for name, values in zip(self.feature_names_out, self.vectors.T, strict=True):
            columns[name] = from_numpy(np.ascontiguousarray(values))
        return pa.table(columns, metadata={_FEATURE_KEY: self.feature.encode()})

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "EmbeddingTable":
        """Read a table in the layout of `to_arrow`, trusting nothing.

        Parameters
        ----------
        table : pa.Table
            The name of the feature is in the metadata of its schema.

        Raises
        ------
        InputError
            If the table is not in that layout, or its data is not valid.
        """
        check_valid(table)
        feature = (table.schema.metadata or {}).get(_FEATURE_KEY, b"").decode()
        if table.column_names[:3] != ["kind", "category", "count"]:
            raise InputError(f"expected columns kind, category, count, found {table.column_names[:3]}")
        kinds = table["kind"]
        if len(kinds) < FIRST or not kinds.combine_chunks().equals(_kinds(len(kinds))):
            raise InputError(f"rows of {feature!r} must be of kind missing, unknown, then category")
        category, count, *columns = (column.combine_chunks() for column in table.columns[1:])
        if category[:FIRST].null_count != FIRST or count.null_count:
            raise InputError(f"rows of {feature!r}: the first two categories must be null, no count may be")
        if count.type not in (pa.int64(), pa.float64()):
            raise InputError(f"counts of {feature!r} must be int64 or float64, found {count.type}")
        vocabulary = Vocabulary(feature, category[FIRST:], as_numpy(count))
        if not columns or any(column.type != pa.float32() or column.null_count for column in columns):
            raise InputError(f"vectors of {feature!r} must be float32 columns without nulls")
        ranked = table.column_names[-1] == f"{feature}_rank"
        result = cls(vocabulary, np.column_stack([as_numpy(column) for column in columns]), ranked)
        if tuple(table.column_names[3:]) != result.feature_names_out:
            raise InputError(f"vectors of {feature!r} must be in columns {result.feature_names_out}")
        return result


def _kinds(num_embeddings: int) -> pa.Array:
    """What each row of a table stands for."""
    return _KINDS.take(from_numpy(np.arange(num_embeddings).clip(max=FIRST)))


@dataclass(frozen=True)
class NumericColumn:
    """How a numeric column comes out: ``(x - center) * scale``, in a column of the same name.

    Attributes
    ----------
    feature : str
        Name of the column.
    fill : float or None
        Stands in for a missing value; None leaves it NaN.
    center, scale : float
        Shift (in units of the column) and factor (units of output per unit of the column).
    missing_scale : float or None
        If given, a second column ``{feature}_missing`` holds this number where the value is missing, else 0.
    """

    feature: str
    fill: float | None = None
    center: float = 0.0
    scale: float = 1.0
    missing_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("fill", "center", "scale", "missing_scale"):
            number = getattr(self, name)
            if number is None and name in ("fill", "missing_scale"):
                continue
            if not np.isfinite(number):
                raise InputError(f"{name} of numeric column {self.feature!r} must be finite, got {number}")
            object.__setattr__(self, name, float(number))

    @property
    def feature_names_out(self) -> tuple[str, ...]:
        """Names of the one or two columns that come out."""
        return (self.feature,) if self.missing_scale is None else (self.feature, f"{self.feature}_missing")

    def transform(self, values: np.ndarray) -> list[np.ndarray]:
        """Scale float64 values of shape (n_rows,); one float32 array per name in `feature_names_out`."""
        missing = np.isnan(values)
        filled = values if self.fill is None else np.where(missing, self.fill, values)
        limit = np.finfo(np.float32).max  # an overflow would turn a finite number into an infinite one
        columns = [np.clip((filled - self.center) * self.scale, -limit, limit).astype(np.float32)]
        if self.missing_scale is not None:
            columns.append(np.float32(self.missing_scale) * missing.astype(np.float32))
        return columns
