"""What the network predicts: one head per target column, from labels to numbers and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from embedkit.errors import InputError, repeated
from embedkit.learning.numeric import check_moments, moments

TARGET_TYPES = ("auto", "continuous", "binary", "multiclass")
# A numeric target with more distinct values than this is continuous under "auto": ratings, miles per gallon.
MAX_AUTO_CLASSES = 20


@dataclass(frozen=True)
class Head:
    """One target.

    Attributes
    ----------
    name : str
        Name of the target column.
    kind : {"continuous", "binary", "multiclass"}
        What is predicted: a number, one of two classes, one of several classes.
    classes : ndarray of shape (n_classes,) or None
        Sorted class labels; None for a continuous target.
    center, scale : float
        Mean and standard deviation (units of the target) of a continuous target: the network sees
        ``(y - center) / scale``.
    """

    name: str
    kind: str
    classes: np.ndarray | None = None
    center: float = 0.0
    scale: float = 1.0

    @property
    def n_outputs(self) -> int:
        """Units in the network's last layer."""
        return len(self.classes) if self.kind == "multiclass" else 1

    def encode(self, y: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """What the network sees: standardised numbers or class indices, float32 of shape (n_rows,).

        `rows` are the numbers of the rows, for errors.

        Raises
        ------
        InputError
            If a label is not among the classes, or a continuous target holds no numbers.
        """
        if self.kind == "continuous":
            return self._standardise(y).astype(np.float32)
        try:
            labels = y.astype(str) if self.classes.dtype.kind == "U" else y.astype(self.classes.dtype)
            codes = np.searchsorted(self.classes, labels).clip(max=len(self.classes) - 1)
            strange = np.flatnonzero(self.classes[codes] != y)
        except (TypeError, ValueError):  # text that is no number
            strange = np.arange(len(y))
        if len(strange):
            row = strange[0] if rows is None else rows[strange[0]]
            raise InputError(
                f"target {self.name!r} has the class {str(y[strange[0]])!r} in row {row}, which was "
                f"not learned: the classes are {self.classes.tolist()}"
            )
        return codes.astype(np.float32)

    def _standardise(self, y: np.ndarray) -> np.ndarray:
        try:
            return (y.astype(np.float64) - self.center) / self.scale
        except (TypeError, ValueError):
            raise InputError(f"target {self.name!r} must hold numbers, found {y.dtype}: cast it") from None

    def decode(self, outputs: np.ndarray) -> np.ndarray:
        """Network outputs, shape (n_rows, n_outputs), as predicted numbers or labels, shape (n_rows,)."""
        if self.kind == "continuous":
            return outputs[:, 0] * self.scale + self.center
        if self.kind == "binary":
            return self.classes[(outputs[:, 0] > 0).astype(int)]
        return self.classes[outputs.argmax(axis=1)]

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Probability of each class in the order of `classes`, float64 of shape (n_rows, n_classes)."""
        if self.kind == "binary":
            outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
        odds = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def losses(self, outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Loss of each row, float64 of shape (n_rows,): half the squared error of the standardised number, or
        the cross-entropy in nats. `outputs` are those of the network, `y` the target as given.
        """
        if self.kind == "continuous":
            return 0.5 * (outputs[:, 0] - self._standardise(y)) ** 2
        chosen = self.encode(y).astype(np.int64)
        if self.kind == "binary":
            return np.logaddexp(0.0, np.where(chosen == 1, -1.0, 1.0) * outputs[:, 0].astype(np.float64))
        logits = outputs.astype(np.float64)
        return np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), chosen]

    def to_json(self) -> dict[str, Any]:
        """The head as JSON can hold it."""
        classes = None if self.classes is None else self.classes.tolist()
        dtype = None if self.classes is None else self.classes.dtype.str
        return {
            "name": self.name,
            "kind": self.kind,
            "classes": classes,
            "classes_dtype": dtype,
            "center": self.center,
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Head":
        """The head that `to_json` wrote."""
        dtype = content["classes_dtype"]
        classes = None
        if dtype is not None:
            classes = np.array(content["classes"], dtype=object if dtype == "|O" else np.dtype(dtype))
        return cls(content["name"], content["kind"], classes, content["center"], content["scale"])


def encode_targets(heads: Sequence[Head], y: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Targets as the network sees them, float32 of shape (n_rows, n_heads); 0 where a row is not present.

    Parameters
    ----------
    heads : sequence of Head
    y : ndarray of shape (n_rows, n_heads)
        Targets as given.
    present : bool array of shape (n_rows,)
    """
    targets = np.zeros((len(y), len(heads)), dtype=np.float32)
    for i, head in enumerate(heads):
        targets[present, i] = head.encode(y[present, i], np.flatnonzero(present))
    return targets


def make_heads(
    y: np.ndarray, names: Sequence[str], target_type: str, sample_weight: np.ndarray | None = None
) -> tuple[Head, ...]:
    """Decide what each target column is and measure what its head needs.

    Parameters
    ----------
    y : ndarray of shape (n_rows, n_targets)
        The targets; see `as_targets`.
    names : sequence of str
        Names of the targets.
    target_type : {"auto", "continuous", "binary", "multiclass"}
        "auto" takes numbers with a fraction, and numbers of more than 20 distinct values, as continuous,
        all else as classes.
    sample_weight : ndarray of shape (n_rows,), optional
        Rows of weight 0 do not exist.

    Returns
    -------
    tuple of Head

    Raises
    ------
    InputError
        If a target is missing somewhere, infinite, all one value, or does not fit `target_type`.
    """
    if not isinstance(target_type, str) or target_type not in TARGET_TYPES:
        raise InputError(f"target_type must be one of {', '.join(TARGET_TYPES)}, got {target_type=}")
    if twice := repeated(names):
        raise InputError(f"targets must have names of their own, found more than once: {twice}")
    if sample_weight is None:
        sample_weight = np.ones(len(y))
    return tuple(_make_head(y[:, i], name, target_type, sample_weight) for i, name in enumerate(names))


def _make_head(y: np.ndarray, name: str, target_type: str, sample_weight: np.ndarray) -> Head:
    rows = np.flatnonzero(sample_weight > 0)
    y, sample_weight = y[rows], sample_weight[rows]
    y = _narrow(y) if y.dtype == object else y  # one of several columns of different kinds
    numeric = y.dtype.kind in "iuf"
    if numeric and not np.isfinite(y).all():
        bad = np.flatnonzero(~np.isfinite(y))
        what = "missing" if np.isnan(y[bad]).all() else "NaN or infinity"
        raise InputError(
            f"target {name!r} is {what} in {len(bad)} row(s), the first is row {rows[bad[0]]}: "
            "input y contains NaN or infinity; drop these rows"
        )
    if not numeric:
        missing = np.flatnonzero(pd.isna(y))
        if len(missing):
            raise InputError(
                f"target {name!r} is missing in {len(missing)} row(s), the first is row {rows[missing[0]]}: "
                "input y contains NaN; drop these rows"
            )
    try:
        distinct = np.unique(y)
    except TypeError:
        raise InputError(f"target {name!r} mixes types that cannot be sorted: cast it to one type") from None
    if len(distinct) < 2:
        found = f"{distinct.tolist()[0]!r}" if len(distinct) else "no value"
        raise InputError(
            f"target {name!r} holds one class or value only ({found} in all {len(y)} row(s)): "
            "at least 2 classes or values are needed to learn from"
        )
    kind = target_type if target_type != "auto" else _kind(y, distinct)
    if kind == "continuous":
        if not numeric and y.dtype.kind != "b":
            raise InputError(f"target {name!r} must hold numbers, found {y.dtype}: cast it, or learn classes")
        return number_head(name, *moments(y.astype(np.float64), sample_weight))
    if kind == "binary" and len(distinct) != 2:
        raise InputError(f"target {name!r} must hold 2 classes, found {len(distinct)}: use 'multiclass'")
    if numeric and y.dtype.kind == "f" and (distinct % 1 != 0).any():
        raise InputError(
            f"Unknown label type: target {name!r} holds numbers with a fraction, which are not classes: "
            "learn it as 'continuous'"
        )
    if not all(isinstance(label, (bool, int, float, str)) for label in distinct.tolist()):
        found = ", ".join(sorted({type(label).__name__ for label in distinct.tolist()}))
        raise InputError(
            f"target {name!r} holds values of type {found}: cast it to text, or to a number if it is one"
        )
    return Head(name, "binary" if len(distinct) == 2 else kind, distinct)


def number_head(name: str, mean: float, scale: float) -> Head:
    """The head of a continuous target of known mean and standard deviation.

    Raises
    ------
    InputError
        If it cannot be standardised.
    """
    check_moments(f"target {name!r}", mean, scale)
    if scale == 0:
        raise InputError(
            f"target {name!r} holds numbers too close to one another to standardise, such as within 1e-160: "
            "rescale it"
        )
    return Head(name, "continuous", None, mean, scale)


def _kind(y: np.ndarray, distinct: np.ndarray) -> str:
    fraction = y.dtype.kind == "f" and (distinct % 1 != 0).any()
    many = y.dtype.kind in "iuf" and len(distinct) > MAX_AUTO_CLASSES
    if fraction or many:
        return "continuous"
    return "binary" if len(distinct) == 2 else "multiclass"


def as_targets(y: Any) -> tuple[np.ndarray, list[str], bool]:
    """Bring targets into columns.

    Parameters
    ----------
    y : array, Series or frame of shape (n_rows,) or (n_rows, n_targets)
        The targets.

    Returns
    -------
    columns : ndarray of shape (n_rows, n_targets)
    names : list of str
        Column names of a frame, the name of a Series, or "y", "y0", "y1", ...
    single : bool
        Whether `y` was one-dimensional.
    """
    y = y.to_pandas() if isinstance(y, (pa.Table, pa.RecordBatch)) else y
    name = getattr(y, "name", None)
    columns = getattr(y, "columns", None)
    if columns is not None and hasattr(y, "to_numpy"):
        names = [str(column) for column in columns]
        parts = [np.asarray(y.iloc[:, i] if hasattr(y, "iloc") else y[columns[i]]) for i in range(len(names))]
        values = _side_by_side(parts) if parts else np.empty((len(y), 0))
    else:
        if isinstance(y, pa.Array):
            y = y.to_numpy(zero_copy_only=False)
        values = np.asarray(y.to_numpy()) if hasattr(y, "to_numpy") else np.asarray(y)
        if values.ndim not in (1, 2):
            raise InputError(
                f"target must have one dimension, or two for several targets, found {values.ndim}"
            )
        width = 1 if values.ndim == 1 else values.shape[1]
        names = [str(name) if name is not None else "y"] if width == 1 else [f"y{i}" for i in range(width)]
    single = values.ndim == 1
    values = values[:, None] if single else values
    if values.dtype == object or values.dtype.kind == "T":
        values = _side_by_side(list(values.astype(object).T))
    if values.dtype.kind in "SUO" or values.dtype.kind in "biuf":
        return values, names, single
    raise InputError(f"target must hold numbers, booleans or strings, found {values.dtype}: cast it")


def _side_by_side(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Targets of shape (n_rows, n_targets); of objects where the columns are not of one kind."""
    columns = [_narrow(column) if column.dtype == object else column for column in columns]
    if len({column.dtype.kind for column in columns}) > 1:
        columns = [column.astype(object) for column in columns]
    return np.stack(columns, axis=1)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Objects that are all numbers, booleans or strings become an array of these."""
    kinds = {type(value) for value in values}
    if kinds and all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        try:
            return values.astype(np.int64)
        except OverflowError:
            raise InputError("target holds whole numbers of more than 64 bits: cast it to text") from None
    if all(issubclass(kind, (int, float, Decimal, np.number)) and kind is not bool for kind in kinds):
        return values.astype(np.float64)
    if kinds <= {bool, np.bool_}:
        return values.astype(bool)
    return values.astype(str) if kinds <= {str, np.str_} else values
