"""What goes into learning and what comes out of it: plain numbers and arrays, readable without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from embedkit.columns import EmbeddingTable, NumericColumn
from embedkit.errors import InputError
from embedkit.learning.lr_finder import LRFinderResult
from embedkit.learning.numeric import NUMERIC_OUTPUTS, NumericInputs
from embedkit.learning.targets import Head
from embedkit.roles import Roles

if TYPE_CHECKING:
    import pyarrow as pa

    from embedkit.learning.streaming import Stream

PRECISIONS = ("float32", "bfloat16")


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
        fractions = ("dropout", "embedding_dropout", "unknown_fraction", "min_reliability", "hidden_fraction")
        for name in fractions:
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)!r}")
        if self.numeric not in NUMERIC_OUTPUTS:
            raise InputError(f"numeric must be one of {', '.join(NUMERIC_OUTPUTS)}, got {self.numeric!r}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("shrinkage", "weight_decay"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < np.inf:
                raise InputError(f"{name} must be a finite number of at least 0, got {getattr(self, name)!r}")
        if not _is_number(self.validation_fraction) or not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction!r}")
        for name in ("max_epochs", "n_iter_no_change"):
            _check_count(name, getattr(self, name))
        if self.batch_size != "auto":
            _check_count("batch_size", self.batch_size, least=2)
        if self.max_lr != "auto" and not (_is_number(self.max_lr) and 0 < self.max_lr < np.inf):
            raise InputError(f"max_lr must be 'auto' or a positive number, got {self.max_lr!r}")
        for units in self.hidden_layer_sizes:
            _check_count("hidden_layer_sizes", units)

        fixed = sorted({"max_lr", "total_steps", "steps_per_epoch"} & self.schedule_options.keys())
        if fixed:
            raise InputError(
                f"schedule_options cannot set {', '.join(fixed)}: use the parameters max_lr and max_epochs"
            )

    def width_is_chosen(self, feature: str) -> bool:
        """Whether the user said how wide the vectors of a feature are."""
        chosen = self.embedding_dim
        if isinstance(chosen, Mapping):
            chosen = chosen.get(feature, "auto")
        return not isinstance(chosen, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


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
