"""What goes into learning and what comes out of it: plain numbers and arrays, readable without torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from embedkit.columns import EmbeddingTable, NumericColumn
from embedkit.crosses import Cross
from embedkit.errors import InputError
from embedkit.learning.lr_finder import LRFinderResult
from embedkit.learning.numeric import NUMERIC_OUTPUTS, NumericInputs
from embedkit.learning.schedules import SCHEDULES
from embedkit.learning.targets import Head
from embedkit.roles import Roles

if TYPE_CHECKING:
    import pyarrow as pa

    from embedkit.learning.streaming import Stream

PRECISIONS = ("float32", "bfloat16")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"  # an array has no one answer


def _is_options(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(name, str) and _is_number(option) for name, option in value.items())


def _one_of(names: Iterable[str]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


_FRACTION = "at least 0 and less than 1", lambda value: _is_number(value) and 0 <= value < 1
_FINITE = "a finite number of at least 0", lambda value: _is_number(value) and 0 <= value < np.inf
_SWITCH = "True or False", lambda value: isinstance(value, (bool, np.bool_))
_COUNT = "a whole number of at least 1", _is_count
# What each setting must be, in words, and whether a value is; others are checked where they are used.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "numeric": _one_of(NUMERIC_OUTPUTS),
    "hidden_layer_sizes": ("whole numbers of at least 1", lambda sizes: all(map(_is_count, sizes))),
    "dropout": _FRACTION,
    "embedding_dropout": _FRACTION,
    "unknown_fraction": _FRACTION,
    "shrinkage": _FINITE,
    "min_reliability": _FRACTION,
    "ranks": _SWITCH,
    "crosses": (
        "'auto' or a whole number of at least 0",
        lambda value: _is_auto(value) or _is_count(value, least=0),
    ),
    "hidden_fraction": _FRACTION,
    "weight_decay": _FINITE,
    "max_lr": (
        "'auto' or a positive number",
        lambda value: _is_auto(value) or (_is_number(value) and 0 < value < np.inf),
    ),
    "schedule": _one_of(SCHEDULES),
    "schedule_options": ("a dict of names and numbers", _is_options),
    "batch_size": (
        "'auto' or a whole number of at least 2",
        lambda value: _is_auto(value) or _is_count(value, least=2),
    ),
    "precision": _one_of(PRECISIONS),
    "max_epochs": _COUNT,
    "early_stopping": _SWITCH,
    "validation_fraction": ("between 0 and 1", lambda value: _is_number(value) and 0 < value < 1),
    "n_iter_no_change": _COUNT,
}


@dataclass(frozen=True)
class Settings:
    """How to learn; see `embedkit.EntityEmbeddingEncoder` for the meaning of each."""

    embedding_dim: Any = "auto"
    min_frequency: float | None = None
    max_categories: int | None = None
    numeric: str = "scale"
    hidden_layer_sizes: tuple[int, ...] = (200, 100)
    dropout: float = 0.1
    embedding_dropout: float = 0.2
    unknown_fraction: float = 0.03
    shrinkage: float = 0.1
    min_reliability: float = 0.3
    ranks: bool = True
    crosses: int | str = "auto"
    hidden_fraction: float = 0.01
    weight_decay: float = 0.01
    max_lr: float | str = "auto"
    schedule: str = "one_cycle"
    schedule_options: Mapping[str, float] = field(default_factory=dict)
    batch_size: int | str = "auto"
    precision: str = "float32"
    max_epochs: int = 15
    early_stopping: bool = False
    validation_fraction: float = 0.1
    n_iter_no_change: int = 5
    device: str = "auto"
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name, (expected, is_right) in RULES.items():
            value = getattr(self, name)
            if not is_right(value):
                raise InputError(f"{name} must be {expected}, got {value!r}")
        fixed = sorted({"max_lr", "total_steps", "steps_per_epoch"} & self.schedule_options.keys())
        if fixed:
            raise InputError(
                f"schedule_options cannot set {', '.join(fixed)}: use the parameters max_lr and max_epochs"
            )

    @property
    def pairs_asked_for(self) -> int:
        """Most crosses where nothing is measured: "auto" has none there."""
        return 0 if isinstance(self.crosses, str) else self.crosses

    def width_is_chosen(self, feature: str) -> bool:
        """Whether the user said how wide the vectors of a feature are."""
        chosen = self.embedding_dim
        if isinstance(chosen, Mapping):
            chosen = chosen.get(feature, "auto")
        return not isinstance(chosen, str)


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be learned, checked.

    Attributes
    ----------
    table : pa.Table of n_rows rows, or Stream
        A stream has its own targets and weights: `targets` and `sample_weight` are None.
    roles : Roles
        What its columns are for.
    heads : tuple of Head
    targets : ndarray of shape (n_rows, n_heads) or None
        As given.
    sample_weight : float64 array of shape (n_rows,) or None
        How many rows each row stands for.
    settings : Settings
    """

    table: "pa.Table | Stream"
    roles: Roles
    heads: tuple[Head, ...]
    targets: np.ndarray | None
    sample_weight: np.ndarray | None
    settings: Settings

    def take(self, rows: np.ndarray, settings: Settings) -> "Task":
        """To learn from some rows of a table, given by their positions, with other settings."""
        weights = None if self.sample_weight is None else self.sample_weight[rows]
        return replace(
            self,
            table=self.table.take(rows),
            targets=self.targets[rows],
            sample_weight=weights,
            settings=settings,
        )


@dataclass(frozen=True)
class NetworkShape:
    """The sizes of a network: all that is needed to build it again.

    Attributes
    ----------
    num_embeddings, embedding_dims : tuple of int
        Rows and width of each table.
    n_numeric : int
        Numeric inputs, flags for missing values included.
    hidden_layer_sizes : tuple of int
        Units of each ReLU layer.
    n_outputs : int
        Units of the last layer.
    """

    num_embeddings: tuple[int, ...]
    embedding_dims: tuple[int, ...]
    n_numeric: int
    hidden_layer_sizes: tuple[int, ...]
    n_outputs: int

    def to_json(self) -> dict[str, Any]:
        """The shape as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "NetworkShape":
        """The shape that `to_json` wrote."""
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in content.items()})


@dataclass(frozen=True, eq=False)
class Projection:
    """From a table of the network to its published vectors: ``(table - center) @ rotation``.

    Attributes
    ----------
    center : float64 array of shape (embedding_dim,)
    rotation : float64 array of shape (embedding_dim, published width)
    precision : float
        Of the prior: ``precision / 2 * sum of squares`` of a vector of the table stands beside the summed
        losses of its rows.
    """

    center: np.ndarray
    rotation: np.ndarray
    precision: float


@dataclass
class History:
    """What a training was like.

    Attributes
    ----------
    epochs : list of dict
        ``epoch, train_loss, validation_loss, validation_accuracy`` (the last two None where there is none),
        of each epoch.
    lrs : list of float
        Learning rate of each step.
    best_epoch : int
        Epoch whose weights were kept.
    restarts : int
        How often an unstable epoch was taken back.
    """

    epochs: list[dict[str, float | None]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    best_epoch: int = 0
    restarts: int = 0


@dataclass(frozen=True, eq=False)
class Learned:
    """What learning leaves behind: nothing in it needs torch.

    Attributes
    ----------
    tables : tuple of EmbeddingTable
    numerics : tuple of NumericColumn
    heads : tuple of Head
    inputs : NumericInputs
        How the numeric columns enter the network.
    shape : NetworkShape
    weights : dict of str to ndarray
        All numbers of the network.
    axes : dict of str to dict of str to ndarray of shape (embedding_dim,)
        Per feature the "reliability" of every axis that was learned, the dropped ones included, and its
        "share" of the table's variance; see `embedkit.learning.axes`.
    projections : tuple of Projection
        One per table.
    noise : tuple of float
        Residual variance of each standardised target, 1 for classes; see `embedkit.learning.losses`.
    history : History
    lr_finder : LRFinderResult or None
        The range test behind an automatic rate.
    max_lr : float
        Peak learning rate used.
    cross_fit : dict or None
        What `fit_transform` did; see `embedkit.cross_fitting`.
    crosses : tuple of Cross
        Numbers of combinations of categories; the network knows nothing of them.
    """

    tables: tuple[EmbeddingTable, ...]
    numerics: tuple[NumericColumn, ...]
    heads: tuple[Head, ...]
    inputs: NumericInputs
    shape: NetworkShape
    weights: dict[str, np.ndarray]
    axes: dict[str, dict[str, np.ndarray]]
    projections: tuple[Projection, ...]
    noise: tuple[float, ...]
    history: History
    lr_finder: LRFinderResult | None
    max_lr: float
    cross_fit: Mapping[str, Any] | None = None
    crosses: tuple[Cross, ...] = ()
