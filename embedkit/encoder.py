"""The scikit-learn transformers: learn vectors for categorical columns, or use vectors learned before."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import (
    _check_feature_names,
    _check_n_features,
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from embedkit.errors import InputError, require
from embedkit.frames import Roles, column_roles, is_array, to_table
from embedkit.tables import EmbeddingSet

if TYPE_CHECKING:
    from embedkit.learning.learned import Settings
    from embedkit.learning.lr_finder import LRFinderResult


class _FrameMixin:
    """What all estimators here do with X: any frame, or an array whose columns are all categorical."""

    def _read(self, X: Any, *, reset: bool) -> pa.Table:
        """X as an Arrow table; checks names and number of columns, or takes note of them (`reset`)."""
        if hasattr(X, "columns") or isinstance(X, pa.Table):
            _check_feature_names(self, X, reset=reset)
            table = to_table(X)
            _check_n_features(self, table, reset=reset)
            if not reset and not hasattr(self, "feature_names_in_"):
                table = table.rename_columns(list(self._array_names(table.num_columns)))
        else:
            X = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan")
            names = getattr(self, "feature_names_in_", None)
            if reset or names is None:
                names = self._array_names(X.shape[1])
            table = to_table(X, feature_names=[str(name) for name in names])
        if table.num_rows == 0:
            raise InputError("Found array with 0 sample(s) (rows): at least 1 row is required")
        return table

    @staticmethod
    def _array_names(width: int) -> tuple[str, ...]:
        return tuple(f"x{i}" for i in range(width))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        tags.input_tags.allow_nan = True
        return tags


class _LookupMixin(TransformerMixin, _FrameMixin):
    """Transforms by looking rows up in `embeddings_`."""

    embeddings_: EmbeddingSet

    def transform(self, X: Any) -> np.ndarray:
        """Look up the vectors of every row; needs no torch.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns)
            Columns as in `fit`. Unknown and missing categories have vectors of their own.

        Returns
        -------
        float32 array of shape (n_rows, n_features_out)
            The vectors of each categorical column side by side, then the numeric columns.

        Raises
        ------
        InputError
            If a column changed its type since `fit` or holds infinite numbers.
        ValueError
            If the columns are not those of `fit`.
        NotFittedError
            If `fit` has not been called.
        """
        check_is_fitted(self)
        return self.embeddings_.transform(self._read(X, reset=False))

    def get_feature_names_out(self, input_features: Sequence[str] | None = None) -> np.ndarray:
        """Names of the columns that `transform` puts out.

        Parameters
        ----------
        input_features : sequence of str, optional
            Checked against the names seen in `fit`, as in scikit-learn.
        """
        check_is_fitted(self)
        if input_features is not None:
            known = getattr(self, "feature_names_in_", None)
            known = self._array_names(self.n_features_in_) if known is None else known
            if list(input_features) != list(known):
                raise InputError("input_features is not equal to feature_names_in_")
        return np.array(self.embeddings_.feature_names_out, dtype=object)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags


class EntityEmbeddingBase(_LookupMixin, BaseEstimator):
    """What the encoder, the classifier and the regressor share; see `EntityEmbeddingEncoder`."""

    def __init__(
        self,
        categorical_features: str | Sequence[str] = "from_dtype",
        *,
        target_type: str = "auto",
        numeric: str = "scale",
        embedding_dim: str | int | Mapping[str, int] | Callable[[int], int] = "auto",
        min_frequency: float | None = None,
        max_categories: int | None = None,
        hidden_layer_sizes: Sequence[int] = (200, 100),
        dropout: float = 0.1,
        embedding_dropout: float = 0.2,
        unknown_fraction: float = 0.03,
        shrinkage: float = 0.05,
        min_reliability: float = 0.5,
        weight_decay: float = 0.01,
        max_lr: float | str = "auto",
        schedule: str = "one_cycle",
        schedule_options: Mapping[str, float] | None = None,
        batch_size: int | str = "auto",
        max_epochs: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.categorical_features = categorical_features
        self.target_type = target_type
        self.numeric = numeric
        self.embedding_dim = embedding_dim
        self.min_frequency = min_frequency
        self.max_categories = max_categories
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.embedding_dropout = embedding_dropout
        self.unknown_fraction = unknown_fraction
        self.shrinkage = shrinkage
        self.min_reliability = min_reliability
        self.weight_decay = weight_decay
        self.max_lr = max_lr
        self.schedule = schedule
        self.schedule_options = schedule_options
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn vectors for the categorical columns of X from how they help to predict y.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns)
            pandas, polars or Arrow; an array's columns are all categorical.
        y : array, Series or frame of shape (n_rows,) or (n_rows, n_targets)
            Target or targets: numbers, or class labels.
        sample_weight : array of shape (n_rows,), optional
            How many rows each row stands for.

        Returns
        -------
        self

        Raises
        ------
        InputError
            If data or parameters cannot be learned from; the message names the column and the cure.
        MissingExtraError
            If torch is not installed.
        """
        require("torch", "train")
        from embedkit.learning.fit import learn

        self._learned = learn(*self._prepare(X, y, sample_weight))
        self._publish()
        return self

    def fit_transform(self, X: Any, y: Any, sample_weight: Any = None) -> np.ndarray:
        """`fit`, then `transform` the same rows."""
        return self.fit(X, y, sample_weight=sample_weight).transform(X)

    def find_lr(self, X: Any, y: Any, sample_weight: Any = None, **sweep: Any) -> "LRFinderResult":
        """Run the learning-rate range test on the training that `fit` would do; changes nothing.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.
        **sweep
            ``start_lr``, ``end_lr``, ``num_iter`` and the like: see `embedkit.learning.lr_finder.find_lr`.

        Returns
        -------
        LRFinderResult
        """
        require("torch", "train")
        from embedkit.learning.fit import find_learning_rate

        return find_learning_rate(*clone(self)._prepare(X, y, sample_weight), **sweep)

    def save(self, path: str | os.PathLike) -> str:
        """Publish tables, network and training history as a new version of a stored set.

        Parameters
        ----------
        path : path or URI
            The root of the stored set, by custom ``NAME.embedkit``.

        Returns
        -------
        str
            Name of the version, such as "v000001".
        """
        from embedkit import archive

        check_is_fitted(self)
        return archive.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, version: str | None = None) -> Self:
        """Load an estimator that `save` stored; it predicts and transforms as the one that was saved."""
        from embedkit import archive

        return archive.load(cls, path, version)

    def _prepare(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, ...]:
        """The arguments of `learn`, checked."""
        from embedkit.learning.targets import as_targets, make_heads

        if y is None:
            raise InputError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: "
                "vectors are learned from what they predict"
            )
        categorical = self.categorical_features
        from_array = is_array(X) or not (hasattr(X, "columns") or isinstance(X, pa.Table))
        table = self._read(X, reset=True)
        targets, names, self._single = as_targets(y)
        check_consistent_length(np.empty(table.num_rows), targets)
        if table.num_rows < 2:
            raise InputError(
                f"at least 2 rows are needed to learn from, found {table.num_rows} sample (1 sample)"
            )
        if from_array and isinstance(categorical, str) and categorical == "from_dtype":
            roles = Roles(tuple(table.column_names), ())
        else:
            roles = column_roles(table, categorical)
        if not roles.categorical:
            raise InputError(
                f"no categorical column among {table.column_names}: name integer ids and dates in categorical_features"
            )
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(
                sample_weight, np.empty((table.num_rows, 1)), dtype=np.float64, ensure_non_negative=True
            )
            if not weights.any():
                raise InputError("sample_weight is zero for all rows: nothing is left to learn from")
        heads = make_heads(targets, names, self._target_type(), weights)
        return table, roles, heads, targets, weights, self._settings()

    def _target_type(self) -> str:
        return self.target_type

    def _settings(self) -> "Settings":
        from embedkit.learning.learned import Settings

        params = self.get_params(deep=False)
        for name in ("categorical_features", "target_type"):
            params.pop(name)
        params["hidden_layer_sizes"] = tuple(params["hidden_layer_sizes"])
        params["schedule_options"] = dict(params["schedule_options"] or {})
        params["progress"] = params.pop("verbose") > 0
        params["seed"] = int(check_random_state(params.pop("random_state")).randint(2**31 - 1))
        return Settings(**params)

    def _publish(self) -> None:
        """The fitted attributes, from what was learned."""
        from embedkit import archive

        learned = self._learned
        self.embeddings_ = EmbeddingSet(
            learned.tables,
            learned.numerics,
            archive.metadata(self),
            features_in=[
                name
                for name in self._input_names()
                if name in {p.feature for p in (*learned.tables, *learned.numerics)}
            ],
        )
        self.categories_ = [table.categories.to_numpy(zero_copy_only=False) for table in learned.tables]
        self.history_ = learned.history.epochs
        self.lr_finder_ = learned.lr_finder
        self.max_lr_ = learned.max_lr
        self.n_iter_ = len(learned.history.epochs)
        self.best_iter_ = learned.history.best_epoch
        self.axes_ = learned.axes
        classes = [head.classes for head in learned.heads]
        if any(labels is not None for labels in classes):
            self.classes_ = classes[0] if self._single else classes

    def _input_names(self) -> Sequence[str]:
        return getattr(self, "feature_names_in_", self._array_names(self.n_features_in_))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags


class EntityEmbeddingEncoder(EntityEmbeddingBase):
    """Encode categorical columns by entity embeddings learned in a neural network.

    A network learns to predict `y`; on the way it learns a vector for every category of every categorical column. The
    vectors are turned to canonical axes (distances are the network's own, the most important axis first), axes that
    sampling noise explains are dropped, and what remains encodes the columns. Missing values and unknown categories
    have vectors of their own. The fitted encoder is a lookup and needs no torch.

    Parameters
    ----------
    categorical_features : "from_dtype" or sequence of str, default="from_dtype"
        Columns of a frame to take as categorical, beside strings, categories and booleans, which always are: integer
        ids and dates have to be named. Of an array all columns are categorical.
    target_type : {"auto", "continuous", "binary", "multiclass"}, default="auto"
        "auto" takes numbers with a fraction, and numbers of more than 20 distinct values, as continuous.
    numeric : {"scale", "passthrough", "drop"}, default="scale"
        What becomes of numeric columns, which help the network to learn: "scale" puts them in units of the network's
        sensitivity, so that distances between rows mean something; missing ones are imputed and flagged.
    embedding_dim : "auto", int, dict or callable, default="auto"
        Width of the tables. "auto" learns generously and publishes the axes that are signal; a number (for all), a
        dict (some features) or a callable of the number of embeddings publishes exactly as many.
    min_frequency : int or float, optional
        Categories in fewer rows (int) or a smaller fraction of rows (float) are treated as unknown.
    max_categories : int, optional
        Most categories to keep of a column: the most frequent ones.
    hidden_layer_sizes : sequence of int, default=(200, 100)
        Units of the ReLU layers.
    dropout, embedding_dropout : float, default=0.1 and 0.2
        Fraction of hidden units, and of elements of the vectors, that a training step leaves out.
    unknown_fraction : float, default=0.03
        Fraction of values that a training step replaces by unknown, which trains its vector.
    shrinkage : float, default=0.05
        Strength of the prior that draws vectors to zero: as strong as ``shrinkage * cardinality`` rows of evidence. A
        category with few rows stays near zero, one with many goes where they carry it.
    min_reliability : float, default=0.5
        Share of an axis' variance that must not be sampling noise for it to be published.
    weight_decay : float, default=0.01
        Of the layers (AdamW), per step and unit of learning rate.
    max_lr : float or "auto", default="auto"
        Peak learning rate. "auto" runs the range test first and takes its suggestion, within 1e-3 and 3e-2.
    schedule : str, default="one_cycle"
        "one_cycle", "triangular", "triangular2", "exp_range", "cosine_restarts" or "constant".
    schedule_options : dict, optional
        Of the schedule: ``pct_start`` (fraction of all steps), ``div_factor``, ``base_lr``, ``T_0`` and the like.
    batch_size : int or "auto", default="auto"
        Rows a step. "auto" makes 128 to 256 steps an epoch, within 32 and 1,024 rows.
    max_epochs : int, default=10
        Passes over the data.
    early_stopping : bool, default=False
        Hold out rows, stop when the network gets no better on them, and keep the best weights.
    validation_fraction : float, default=0.1
        Fraction of rows held out for early stopping.
    n_iter_no_change : int, default=5
        Epochs without improvement after which training stops.
    device : str, default="auto"
        "cpu", "cuda" or any torch device; "auto" is the GPU where there is one.
    random_state : int, RandomState or None, default=None
        With an int, and the same number of torch threads, the result repeats bit for bit on a CPU.
    verbose : int, default=0
        1 shows progress bars on a terminal.

    Attributes
    ----------
    embeddings_ : EmbeddingSet
        The tables; ``embeddings_["Store"].vectors`` is one.
    categories_ : list of ndarray
        Categories of each categorical column, sorted.
    axes_ : dict of str to dict
        Of each feature the "reliability" and the variance "share" of all axes, those not published included.
    history_ : list of dict
        Losses of each epoch: the mean over rows of half the squared error of the standardised target, or of the
        cross-entropy in nats.
    lr_finder_ : LRFinderResult or None
        The range test of ``max_lr="auto"``.
    max_lr_ : float
        The peak learning rate used.
    n_iter_, best_iter_ : int
        Epochs trained, and the one whose weights were kept.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    Raises
    ------
    InputError
        In `fit`, if data or parameters cannot be learned from.

    Notes
    -----
    Two equal rows and one row of weight 2 are the same thing: bit for bit up to 50,000 rows, in the mean beyond.

    References
    ----------
    Guo & Berkhahn, "Entity Embeddings of Categorical Variables", arXiv 1604.06737, 2016.

    Examples
    --------
    >>> import pandas as pd
    >>> from embedkit import EntityEmbeddingEncoder
    >>> shops = pd.DataFrame({"city": ["Rome", "Oslo", "Rome", "Bonn"] * 50})
    >>> encoder = EntityEmbeddingEncoder(embedding_dim=2, random_state=0)
    >>> vectors = encoder.fit_transform(shops, [3.0, 1.0, 3.5, 2.0] * 50)
    >>> vectors.shape
    (200, 2)
    >>> encoder.get_feature_names_out().tolist()
    ['city_0', 'city_1']
    """


class PretrainedEmbeddingEncoder(_LookupMixin, BaseEstimator):
    """Encode columns by embeddings that were learned before; never needs torch.

    Parameters
    ----------
    embeddings : path, URI or EmbeddingSet
        A stored set, or one in memory.
    version : str, optional
        Version of the stored set; the current one by default.

    Attributes
    ----------
    embeddings_ : EmbeddingSet
        The tables and numeric columns that X has. Columns of X that were not learned do not come out.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    Notes
    -----
    The columns of an array are those of the set, in the set's order; those past its end do not come out.

    Examples
    --------
    >>> import numpy as np
    >>> import pyarrow as pa
    >>> from embedkit import EmbeddingSet, EmbeddingTable, PretrainedEmbeddingEncoder
    >>> from embedkit.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.fit(pa.array(["Bonn", "Rome"]), "city")
    >>> vectors = np.array([[0.0], [0.5], [1.0], [2.0]], dtype="float32")  # missing, unknown, Bonn, Rome
    >>> encoder = PretrainedEmbeddingEncoder(EmbeddingSet([EmbeddingTable(vocabulary, vectors)]))
    >>> encoder.fit_transform(pa.table({"city": ["Rome", "Oslo", None]})).ravel().tolist()
    [2.0, 0.5, 0.0]
    """

    def __init__(self, embeddings: str | os.PathLike | EmbeddingSet, *, version: str | None = None) -> None:
        self.embeddings = embeddings
        self.version = version

    def fit(self, X: Any, y: Any = None) -> Self:
        """Load the set and check that it fits X; nothing is learned.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns)
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        InputError
            If X has none of the columns of the set, or one has another type.
        StoreError
            If the stored set is damaged or not there.
        """
        embeddings = self.embeddings
        if not isinstance(embeddings, EmbeddingSet):
            embeddings = EmbeddingSet.load(embeddings, self.version)
        table = self._read(X, reset=True)
        if not hasattr(self, "feature_names_in_"):
            self._names_in = (*embeddings.features_in, *self._array_names(table.num_columns))[
                : table.num_columns
            ]
            table = table.rename_columns(list(self._names_in))
        shared = [name for name in embeddings.features_in if name in table.column_names]
        if not shared:
            raise InputError(
                f"X has none of the columns {list(embeddings.features_in)} of the set: it has {table.column_names}"
            )
        self.embeddings_ = embeddings.subset(shared)
        self.embeddings_.transform(table.slice(0, 1))
        return self
