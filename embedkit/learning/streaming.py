"""Rows in files, learned from without holding them: what their columns contain, and their codes.

Batches are counted one by one and the counts added up, so that vocabularies are those of the whole table held
at once. Sums of weights that are no whole numbers may differ from those in the last digits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow.dataset import Dataset

from embedkit.errors import InputError, first_line
from embedkit.frames import as_numpy, numeric_block, to_table, type_family, weight_column
from embedkit.learning.data import Rows
from embedkit.learning.learned import Settings
from embedkit.learning.numeric import NumericInputs, RunningMoments
from embedkit.learning.stored_rows import RowWriter
from embedkit.learning.targets import Head, as_targets, make_heads, number_head
from embedkit.roles import Roles
from embedkit.vocabulary import FIRST, MISSING, Vocabulary, encode_columns

BATCH_ROWS = 1 << 17
# A target with more distinct values than this can only be a number.
MAX_CLASSES = 65_536
# So many values are counted before they are merged, so that a merge has something to do.
MIN_MERGE = 1 << 20


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows in files.

    Attributes
    ----------
    dataset : pyarrow.dataset.Dataset
        With the columns to learn from, the targets and the weights.
    targets : tuple of str
        Columns to be predicted.
    weight : str or None
        Column that says how many rows each row stands for. Rows of weight 0 do not exist.
    cache_dir : str or None
        Where coded rows are kept while they are learned from.
    """

    dataset: Dataset
    targets: tuple[str, ...]
    weight: str | None = None
    cache_dir: str | None = None

    @property
    def empty(self) -> pa.Table:
        """The columns to learn from, without rows."""
        others = (*self.targets, self.weight)
        return to_table(self.dataset.schema.empty_table().drop_columns([n for n in others if n is not None]))

    def each(self, columns: Sequence[str], visit: Callable[[pa.Table, np.ndarray], None]) -> None:
        """Go through the rows: `visit` gets batches of columns, and the weights of their rows.

        Raises
        ------
        InputError
            If the files cannot be read, a weight is no weight, or `visit` raises it.
        """
        first = 0
        weights_of = [] if self.weight is None else [self.weight]
        for table in self._tables([*columns, *weights_of]):
            n_read, left_out = table.num_rows, ""
            try:
                weights = np.ones(table.num_rows)
                if self.weight is not None:
                    weights = weight_column(table, self.weight)
                    if (weights == 0).any():
                        left_out = ", without those of weight 0"
                        table, weights = table.filter(pa.array(weights > 0)), weights[weights > 0]
                visit(table.select(columns), weights)
            except InputError as error:
                where = f" (rows are counted from row {first}{left_out})" if first or left_out else ""
                raise InputError(f"{error}{where}") from error
            first += n_read

    def _tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        try:
            scanner = self.dataset.scanner(
                columns=list(columns), batch_size=BATCH_ROWS, batch_readahead=4, fragment_readahead=1
            )
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield to_table(pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError) as error:
            reason = first_line(error)
            raise InputError(f"the rows cannot be read ({reason}): repair or convert the files") from error


class ValueCounts:
    """Counts of the values of a column, added up batch by batch.

    Parameters
    ----------
    feature : str
        Name of the column.
    whole : bool
        Whether rows are counted, not their weights.
    """

    def __init__(self, feature: str, whole: bool) -> None:
        self.feature, self.whole = feature, whole
        self.parts: list[Vocabulary] = []
        self.pending = 0  # values that were counted since the last merge

    def add(self, column: pa.ChunkedArray, weights: np.ndarray) -> None:
        """Count a batch."""
        self.parts.append(Vocabulary.fit(column, self.feature, sample_weight=None if self.whole else weights))
        self.pending += self.parts[-1].cardinality
        if self.pending > max(MIN_MERGE, self.parts[0].cardinality):
            self.parts, self.pending = [self.vocabulary()], 0

    def vocabulary(self, min_frequency: float | None = None, max_categories: int | None = None) -> Vocabulary:
        """The vocabulary of all that was counted; see `Vocabulary.fit`."""
        values, counts = self._merged()
        missing = np.array([sum(part.counts[MISSING] for part in self.parts)], dtype=counts.dtype)
        if min_frequency is None and max_categories is None:
            return Vocabulary(
                self.feature, values, np.concatenate([missing, [0], counts]).astype(counts.dtype)
            )
        found = Vocabulary.fit(
            pa.chunked_array([pa.nulls(1, values.type), values]),
            self.feature,
            min_frequency=min_frequency,
            max_categories=max_categories,
            sample_weight=np.concatenate([missing, counts]),
        )
        return Vocabulary(self.feature, found.categories, found.counts.astype(counts.dtype))

    def _merged(self) -> tuple[pa.Array, np.ndarray]:
        """The distinct values in order, and how often each was counted."""
        values = pa.concat_arrays([part.categories for part in self.parts])
        counts = np.concatenate([part.counts[FIRST:] for part in self.parts])
        if not len(values):
            return values, counts
        order = pc.sort_indices(values)
        values, counts = values.take(order), counts[as_numpy(order)]
        differs = as_numpy(pc.not_equal(values[1:], values[:-1]).cast(pa.uint8()))
        starts = np.flatnonzero(np.append(np.uint8(1), differs))
        return values.take(pa.array(starts)), np.add.reduceat(counts, starts)


def scan_heads(stream: Stream, target_type: str) -> tuple[Head, ...]:
    """Decide what each target is, as `make_heads` does, in one pass over the targets.

    Raises
    ------
    InputError
        As `make_heads`; also where there are more than 65,536 classes.
    """
    scans = [_TargetScan(name, stream.weight is None) for name in stream.targets]

    def visit(table: pa.Table, weights: np.ndarray) -> None:
        for scan in scans:
            scan.add(target_column(table, scan.name), weights)

    stream.each(stream.targets, visit)
    return tuple(scan.head(target_type) for scan in scans)


class _TargetScan:
    def __init__(self, name: str, whole: bool) -> None:
        self.name = name
        self.counts, self.moments = ValueCounts(name, whole), RunningMoments(1)
        self.type: pa.DataType = pa.null()
        self.many = False  # more distinct values than classes may be

    def add(self, column: pa.ChunkedArray, weights: np.ndarray) -> None:
        self.type = column.type
        missing = pc.sum(pc.is_null(column, nan_is_null=True)).as_py()
        if missing:
            raise InputError(
                f"target {self.name!r} is missing in at least {missing} row(s): "
                "input y contains NaN; drop these rows"
            )
        if type_family(column.type) in ("number", "bool"):
            self.moments.add(numeric_block(pa.table({self.name: column}), [self.name]), weights)
        if not self.many:
            self.counts.add(column, weights)
            if len(self.counts.parts) > 1:
                self.counts.parts, self.counts.pending = [self.counts.vocabulary()], 0
            self.many = self.counts.parts[0].cardinality > MAX_CLASSES

    def head(self, target_type: str) -> Head:
        if not self.counts.parts:
            raise InputError("Found array with 0 sample(s) (rows): at least 2 rows are needed to learn from")
        found = self.counts.parts[0]
        distinct = pa.table({self.name: found.categories.cast(self.type)})
        (head,) = make_heads(as_targets(distinct)[0], [self.name], target_type, found.counts[FIRST:])
        if head.kind == "continuous":
            return number_head(self.name, self.moments.means.item(), self.moments.scales().item())
        if self.many:
            raise InputError(
                f"target {self.name!r} has more than {MAX_CLASSES:,} distinct values, too many for classes: "
                "learn it as 'continuous', or group them"
            )
        return head


def scan_columns(
    stream: Stream, roles: Roles, settings: Settings
) -> tuple[tuple[Vocabulary, ...], NumericInputs, float]:
    """Vocabularies, how numbers enter the network, and the weight of all rows, in one pass.

    Raises
    ------
    InputError
        If a column cannot be learned from.
    """
    counts = [ValueCounts(name, stream.weight is None) for name in roles.categorical]
    moments = RunningMoments(len(roles.numeric))

    def visit(table: pa.Table, weights: np.ndarray) -> None:
        for count in counts:
            count.add(table[count.feature], weights)
        moments.add(numeric_block(table, roles.numeric), weights)

    stream.each([*roles.categorical, *roles.numeric], visit)
    inputs = NumericInputs.of_moments(
        roles.numeric, moments.means.tolist(), moments.scales().tolist(), moments.missing.tolist()
    )
    vocabularies = []
    for i, count in enumerate(counts):
        vocabularies.append(count.vocabulary(settings.min_frequency, settings.max_categories))
        counts[i] = None  # two of a large column would be too many
    return tuple(vocabularies), inputs, moments.total


def store_rows(
    stream: Stream,
    vocabularies: Sequence[Vocabulary],
    inputs: NumericInputs,
    heads: Sequence[Head],
    device: torch.device,
    held_out: float,
    generator: torch.Generator,
) -> tuple[Rows, Rows | None]:
    """Write the rows to a cache, in codes, in one pass.

    Parameters
    ----------
    held_out : float
        Fraction of rows, each drawn for itself, that are not learned from.
    generator : torch.Generator
        Draws them.

    Returns
    -------
    rows, watch : StoredRows
        To learn from, and those held out; None if none are.

    Raises
    ------
    InputError
        If there are none of the one kind or the other.
    """
    widths = (len(vocabularies), inputs.width, len(heads))
    writers = [RowWriter(stream.cache_dir, *widths) for _ in range(2 if held_out else 1)]

    def visit(table: pa.Table, weights: np.ndarray) -> None:
        codes = encode_columns(vocabularies, table)
        numeric = inputs.transform(numeric_block(table, inputs.features))
        columns = [as_targets(pa.table({head.name: target_column(table, head.name)}))[0] for head in heads]
        pairs = zip(heads, columns, strict=True)
        targets = np.stack([head.encode(column[:, 0]) for head, column in pairs], axis=1)
        if len(writers) == 1:
            writers[0].add(codes, numeric, targets, weights)
            return
        held = (torch.rand(len(codes), generator=generator) < held_out).numpy()
        for writer, chosen in zip(writers, (~held, held), strict=True):
            writer.add(codes[chosen], numeric[chosen], targets[chosen], weights[chosen])

    try:
        features = [*(part.feature for part in vocabularies), *inputs.features]
        stream.each([*features, *(head.name for head in heads)], visit)
        n_rows = [writer.num_rows for writer in writers]
        if held_out and (n_rows[0] < 2 or n_rows[1] < 1):
            raise InputError(
                f"validation_fraction {held_out} of {sum(n_rows):,} rows holds out {n_rows[1]:,} and leaves "
                f"{n_rows[0]:,}: early_stopping needs rows to learn from and rows to watch"
            )
        stored = [writer.rows(device) for writer in writers]
    finally:
        for writer in writers:
            writer.close()
    return stored[0], (stored[1] if held_out else None)


def target_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column as a target may be: plain numbers, booleans or text."""
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if type_family(column.type) not in ("number", "bool", "string", "null"):
        raise InputError(f"target {name!r} is {column.type}: turn it into numbers (such as days), or text")
    return column
