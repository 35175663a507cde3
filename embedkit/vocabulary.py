"""Category values become codes; what missing, unknown and rare mean is decided here and nowhere else."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedkit.errors import InputError, first_line
from embedkit.frames import as_numpy, from_numpy, is_null, to_list, type_family

#: Code of a missing value.
MISSING = 0
#: Code of a value that is not in the vocabulary: never seen, or too rare.
UNKNOWN = 1
#: Code of the first category.
FIRST = 2
# From here on a float of so many bits stands for several whole numbers.
EXACT_FLOATS = {16: 2**11, 32: 2**24, 64: 2**53}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The categories of one feature, each with its code.

    Code 0 stands for missing, 1 for unknown, and ``2 + i`` for ``categories[i]``. Rare values are not in the
    vocabulary: they are unknown.

    Attributes
    ----------
    feature : str
        Name of the column.
    categories : pa.Array of `cardinality` values
        Sorted and unique, of the column's own type: string, int64, double, bool, decimal, date, time or
        timestamp (narrower types are widened to these).
    counts : int64 array of shape (num_embeddings,), float64 if weighted
        Rows (or their weight) seen in fit: missing, rare values folded into unknown, then each category.

    Raises
    ------
    InputError
        If the categories are not sorted and unique, or the counts do not fit them.
    """

    feature: str
    categories: pa.Array
    counts: np.ndarray

    def __post_init__(self) -> None:
        dtype = self.categories.type
        if type_family(dtype) == "other" or dtype != _canonical_type(dtype):
            raise InputError(f"column {self.feature!r} cannot have categories of type {dtype}")
        if self.categories.null_count or not _is_increasing(self.categories):
            raise InputError(f"categories of column {self.feature!r} must be sorted, unique and not null")
        counts = np.array(self.counts)
        if counts.dtype not in (np.int64, np.float64) or counts.shape != (len(self.categories) + FIRST,):
            raise InputError(
                f"counts of column {self.feature!r} must be int64 or float64 of shape "
                f"({len(self.categories) + FIRST},), found {counts.dtype} of shape {counts.shape}"
            )
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise InputError(f"counts of column {self.feature!r} must be finite and not negative")
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)

    def __reduce__(self) -> tuple:
        # An array in a plain pickle would come back writeable.
        return Vocabulary, (self.feature, self.categories, self.counts)

    @classmethod
    def fit(
        cls,
        column: pa.Array | pa.ChunkedArray,
        feature: str,
        *,
        min_frequency: float | None = None,
        max_categories: int | None = None,
        sample_weight: np.ndarray | None = None,
    ) -> "Vocabulary":
        """Learn the categories of a column. The order of its rows has no influence on the result.

        Parameters
        ----------
        column : Arrow array of n_rows values
            The column, from `embedkit.frames.to_table`.
        feature : str
            Its name.
        min_frequency : int or float, optional
            Categories seen in fewer rows than this number (int), or than this fraction of all rows (float),
            are rare and become unknown; as in scikit-learn's OneHotEncoder.
        max_categories : int, optional
            How many categories to keep at most: the most frequent, of equally frequent ones the first in
            sorted order. Missing and unknown do not count.
        sample_weight : array of shape (n_rows,), optional
            Frequencies are sums of weights. Rows of weight 0 do not exist.

        Returns
        -------
        Vocabulary

        Raises
        ------
        InputError
            If a setting is out of range, or the column holds infinite numbers or values of no usable type.
        """
        _check_limits(min_frequency, max_categories)
        weights = None if sample_weight is None else _check_weights(sample_weight, len(column))
        values, rows = _factorize(column, feature)
        values = _canonical(values, feature)
        present = pc.unique(values.drop_null())
        present = present.take(pc.sort_indices(present))
        slots = _positions(values, present) + 1  # null is -1 in _positions: slot 0
        totals = _sum_by_slot(np.append(slots, 0).take(rows), weights, len(present) + 1)
        frequencies = totals[1:]
        kept = frequencies > 0
        if min_frequency is not None:
            absolute = isinstance(min_frequency, (int, np.integer))
            kept &= frequencies >= (min_frequency if absolute else min_frequency * totals.sum())
        if max_categories is not None:
            by_frequency = np.argsort(np.where(kept, -frequencies, 0), kind="stable")
            kept[by_frequency[max_categories:]] = False
        rare = np.sort(frequencies[~kept]).sum(keepdims=True)
        counts = np.concatenate([totals[:1], rare, frequencies[kept]])
        return cls(feature, present.filter(pa.array(kept)), counts)

    @property
    def cardinality(self) -> int:
        """Number of categories."""
        return len(self.categories)

    @property
    def num_embeddings(self) -> int:
        """Number of codes: the categories, missing and unknown."""
        return len(self.categories) + FIRST

    def encode(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Turn values into codes.

        Parameters
        ----------
        column : Arrow array of n_rows values
            Integers, floats and decimals may stand for one another where no value changes, dates for
            timestamps likewise; any other change of type is an error. A column of nulls is always accepted.
            Integers and decimals too large for what was learned are unknown.

        Returns
        -------
        int32 array of shape (n_rows,)
            0 for missing, 1 for unknown, ``2 + i`` for ``categories[i]``.

        Raises
        ------
        InputError
            If the type of the column is not the one that was learned, or it holds infinite numbers.
        """
        values, rows = _factorize(column, self.feature)
        codes = np.full(len(values) + 1, MISSING, dtype=np.int32)
        if values.null_count < len(values):
            values, categories = self._comparable(values)
            found = _positions(values, categories)
            codes[:-1] = np.where(found < 0, UNKNOWN, found + FIRST)
            codes[:-1][is_null(values)] = MISSING
        return codes.take(rows)

    def decode(self, codes: np.ndarray) -> pa.Array:
        """Turn codes of shape (n_rows,) into categories; missing and unknown become null.

        Raises
        ------
        InputError
            If a code is not in ``[0, num_embeddings)``.
        """
        codes = np.asarray(codes)
        if len(codes) and not 0 <= codes.min() <= codes.max() < self.num_embeddings:
            raise InputError(
                f"codes of column {self.feature!r} must be in [0, {self.num_embeddings}), "
                f"found {codes.min()} to {codes.max()}"
            )
        return self.categories.take(pa.array(codes - FIRST, mask=codes < FIRST))

    def to_numpy(self) -> np.ndarray:
        """The categories as an array; of objects where numpy has no such type."""
        if pa.types.is_time(self.categories.type):
            return np.array(to_list(self.categories), dtype=object)
        return self.categories.to_numpy(zero_copy_only=False)

    def labels(self) -> list[str]:
        """Name every code for display: ``"(missing)"``, ``"(unknown)"``, then the categories as text."""
        return ["(missing)", "(unknown)", *map(str, to_list(self.categories))]

    def _comparable(self, values: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Values and categories in one type, that which was learned if no value changes by it."""
        learned, found = self.categories.type, values.type
        if not len(self.categories):
            return values, self.categories  # an empty vocabulary knows no value, whatever its type
        if (common := _exact_type(found, learned)) is not None:
            try:
                return values.cast(learned), self.categories
            except pa.ArrowException:  # some values do not fit
                with suppress(pa.ArrowException):
                    return values.cast(common), self.categories.cast(common)
        # Arrow reads a time without a zone as UTC, which nobody has said.
        same_clock = (getattr(found, "tz", None) is None) == (getattr(learned, "tz", None) is None)
        detail = ""
        if type_family(found) == type_family(learned) and same_clock:
            try:
                # Floats first lose their NaN, which no other type can hold.
                values = _canonical(values, self.feature)
                self._check_precision(values, found)
                if pa.types.is_floating(values.type) and pa.types.is_decimal(learned):
                    return values, self._as_floats()  # the other way round Arrow rounds
                cast = values.cast(learned)
                # Arrow drops the time of day without a word where a time becomes a date.
                if type_family(learned) != "time" or cast.cast(values.type).equals(values):
                    return _canonical(cast, self.feature), self.categories
                detail = " (the time of day would be lost)"
            except pa.ArrowException as error:
                detail = f" ({first_line(error)})"
        raise InputError(
            f"column {self.feature!r} was {learned} when learned, "
            f"is {found} now{detail}: cast it to {learned}"
        )

    def _as_floats(self) -> pa.Array:
        categories = self.categories.cast(pa.float64())
        if not _is_increasing(categories):
            raise InputError(
                f"column {self.feature!r} was {self.categories.type} when learned, with categories that "
                "floats do not tell apart, and holds floats now: read it as decimals"
            )
        return categories

    def _check_precision(self, values: pa.Array, found: pa.DataType) -> None:
        """Raise InputError where whole numbers arrive as floats that stand for their neighbours too."""
        if not (pa.types.is_floating(found) and pa.types.is_integer(self.categories.type)):
            return
        exact = EXACT_FLOATS[found.bit_width]
        ends = [abs(category.as_py()) for category in (self.categories[0], self.categories[-1])]
        largest = pc.max(pc.abs(values)).as_py()
        if max(ends) >= exact and largest is not None and largest >= exact:
            raise InputError(
                f"column {self.feature!r} was {self.categories.type} when learned, and now is {found} with "
                f"values such as {largest:.17g}, which stand for several whole numbers: read it as integers "
                "(Int64 in pandas, where values are missing)"
            )


def _exact_type(found: pa.DataType, learned: pa.DataType) -> pa.DataType | None:
    """A decimal type that holds all values of two types of integers or decimals; None if there is none."""
    types = pa.types
    if found == learned:
        return None
    if not all(types.is_integer(dtype) or types.is_decimal(dtype) for dtype in (found, learned)):
        return None
    digits = [(20, 0) if types.is_integer(t) else (t.precision - t.scale, t.scale) for t in (found, learned)]
    before, after = (max(part) for part in zip(*digits, strict=True))
    return pa.decimal256(before + after, after) if before + after <= 76 else None


def _factorize(column: pa.Array | pa.ChunkedArray, feature: str) -> tuple[pa.Array, np.ndarray]:
    """Split a column into candidate values and the position of each row's value among them.

    Values may repeat and may be null; a null row has position ``len(values)``.
    """
    if type_family(column.type) == "other":
        raise InputError(
            f"column {feature!r} holds {column.type}: a category argument must be a string or a number; "
            "turn its cells into strings or drop it"
        )
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if pa.types.is_decimal(column.type):
        column = column.cast(_canonical_type(column.type))  # Arrow cannot hash narrow decimals
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    if not column.num_chunks:
        return pa.array([], column.type.value_type), np.empty(0, dtype=np.int32)
    chunks = column.unify_dictionaries().chunks
    values = chunks[0].dictionary
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.string())  # Arrow cannot take from views
    rows = np.concatenate([as_numpy(chunk.indices.cast(pa.int32()), null=len(values)) for chunk in chunks])
    if len(values) > len(rows):  # a few rows of a large category: only their values are worth looking up
        used, rows = np.unique(rows, return_inverse=True)
        values = values.take(from_numpy(used[used < len(values)]))  # null comes last, and stays behind them
    return values, rows


def _canonical_type(dtype: pa.DataType) -> pa.DataType:
    """The one type that stands for all that hold the same values, so that the width never matters.

    Parquet gives each of these back as it was; it has no unit above milliseconds, for one.
    """
    types = pa.types
    if types.is_null(dtype) or type_family(dtype) == "string":
        return pa.string()
    if types.is_integer(dtype):
        return pa.int64()
    if types.is_floating(dtype):
        return pa.float64()
    if types.is_decimal(dtype) and dtype.bit_width < 128:
        return pa.decimal128(dtype.precision, dtype.scale)
    if types.is_date(dtype):
        return pa.date32()
    if types.is_timestamp(dtype) and dtype.unit == "s":
        return pa.timestamp("ms", dtype.tz)
    if types.is_time(dtype) and dtype.unit == "s":
        return pa.time32("ms")
    return dtype


def _canonical(values: pa.Array, feature: str) -> pa.Array:
    """Cast values to their canonical type; NaN becomes null and -0.0 becomes 0.0."""
    try:
        values = values.cast(_canonical_type(values.type))
    except pa.ArrowException as error:
        raise InputError(f"column {feature!r} does not fit ({error}): cast it to string") from error
    if not pa.types.is_floating(values.type):
        return values
    if pc.any(pc.is_inf(values)).as_py():
        raise InputError(f"column {feature!r} holds infinite values: replace them by NaN or a finite number")
    return pc.if_else(pc.is_nan(values), None, pc.add(values, 0.0))


def _positions(values: pa.Array, categories: pa.Array) -> np.ndarray:
    """Position of each value among the sorted categories, -1 for null and where there is none."""
    if len(categories) <= 4 * len(values):
        if not len(categories):
            return np.full(len(values), -1)
        return as_numpy(pc.index_in(values, value_set=categories, skip_nulls=True), null=-1)
    # index_in hashes all categories in every call: seconds, for ten million of them. A search for sorted
    # values finds each near the one before, in memory that the cache still holds.
    order = pc.sort_indices(values)
    values = values.take(order)
    places = _bisect(categories[:-1], values)
    hits = as_numpy(pc.equal(categories.take(places), values).cast(pa.uint8()))
    found = np.empty(len(values), dtype=np.int64)
    found[as_numpy(order)] = np.where(hits, as_numpy(places.cast(pa.int64())), -1)
    return found


def _bisect(ordered: pa.Array, values: pa.Array) -> pa.Array:
    """For each value, how many of the ordered ones are below it; any number for null."""
    if hasattr(pc, "search_sorted") and not pa.types.is_decimal(values.type):
        return pc.search_sorted(ordered, values)
    low = np.zeros(len(values), dtype=np.int64)
    high = np.full(len(values), len(ordered))
    while (low < high).any():
        middle = (low + high) // 2
        below = pc.less(ordered.take(pa.array(np.minimum(middle, len(ordered) - 1))), values)
        below = as_numpy(below.cast(pa.uint8())).view(np.bool_)
        low, high = np.where(below & (low < high), middle + 1, low), np.where(below, high, middle)
    return pa.array(low)


def _is_increasing(categories: pa.Array) -> bool:
    return pc.all(pc.less(categories[:-1], categories[1:])).as_py() is not False


def _sum_by_slot(slots: np.ndarray, weights: np.ndarray | None, num_slots: int) -> np.ndarray:
    if weights is None:
        return np.bincount(slots, minlength=num_slots)
    # Floating-point sums depend on the order of their terms: sorted, they do not depend on the order of rows.
    order = np.lexsort((weights, slots))
    return np.bincount(slots[order], weights=weights[order], minlength=num_slots).astype(np.float64)


def _check_limits(min_frequency: float | None, max_categories: int | None) -> None:
    if min_frequency is not None:
        absolute = isinstance(min_frequency, (int, np.integer)) and not isinstance(min_frequency, bool)
        fraction = isinstance(min_frequency, (float, np.floating)) and 0 < min_frequency < 1
        if not (fraction or (absolute and min_frequency >= 1)):
            raise InputError(
                f"min_frequency must be an int >= 1 or a fraction in (0, 1), got {min_frequency=}"
            )
    if max_categories is not None:
        absolute = isinstance(max_categories, (int, np.integer)) and not isinstance(max_categories, bool)
        if not (absolute and max_categories >= 1):
            raise InputError(f"max_categories must be an int >= 1, got {max_categories=}")


def _check_weights(sample_weight: np.ndarray, num_rows: int) -> np.ndarray:
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (num_rows,):
        raise InputError(f"sample_weight must have shape ({num_rows},), found {weights.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise InputError("sample_weight must be finite and not negative: drop or replace such rows")
    return weights


def encode_columns(vocabularies: Sequence[Vocabulary], table: pa.Table) -> np.ndarray:
    """Codes of a table's columns side by side, int32 of shape (n_rows, n_vocabularies)."""
    codes = np.empty((table.num_rows, len(vocabularies)), dtype=np.int32)
    for i, vocabulary in enumerate(vocabularies):
        codes[:, i] = vocabulary.encode(table[vocabulary.feature])
    return codes
