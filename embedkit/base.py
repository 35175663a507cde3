"""What the estimators that learn share."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted

from embedkit.errors import InputError, require
from embedkit.folds import check_cross_fit
from embedkit.frames import check_weights
from embedkit.inputs import check_repeatable, has_names, is_stream, task_of_rows, task_of_stream
from embedkit.lookup import LookupMixin
from embedkit.tables import EmbeddingSet

if TYPE_CHECKING:
    from embedkit.learning.learned import Learned, Settings, Task
    from embedkit.learning.lr_finder import LRFinderResult


class EntityEmbeddingBase(LookupMixin, BaseEstimator):
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
        shrinkage: float = 0.1,
        min_reliability: float = 0.3,
        ranks: bool = True,
        crosses: int | str = "auto",
        cross_fit: Any = "auto",
        hidden_fraction: float = 0.01,
        weight_decay: float = 0.01,
        max_lr: float | str = "auto",
        schedule: str = "one_cycle",
        schedule_options: Mapping[str, float] | None = None,
        batch_size: int | str = "auto",
        precision: str = "float32",
        max_epochs: int = 15,
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
        self.ranks = ranks
        self.crosses = crosses
        self.cross_fit = cross_fit
        self.hidden_fraction = hidden_fraction
        self.weight_decay = weight_decay
        self.max_lr = max_lr
        self.schedule = schedule
        self.schedule_options = schedule_options
        self.batch_size = batch_size
        self.precision = precision
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        groups: Any = None,
        cache_dir: str | os.PathLike | None = None,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> Self:
        """Learn vectors for the categorical columns of X from how they help to predict y.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns), or its location
            pandas, polars or Arrow; an array's columns are all categorical, and so are those of a frame of
            numbers whose columns have no names. A path or URI of Parquet files
            (a file, a directory or a pattern), or a `pyarrow.dataset.Dataset`, need not fit into memory.
        y : array, Series or frame of shape (n_rows,) or (n_rows, n_targets)
            Target or targets: numbers, or class labels. Of rows in files, the name or list of names of the
            columns to predict; all other columns are learned from, except for an unnamed pandas index
            (``__index_level_0__``).
        sample_weight : array of shape (n_rows,), optional
            How many rows each row stands for. Of rows in files, the name of a column.
        groups : ignored
            For `fit_transform`: ``set_fit_request(groups=True)`` has a pipeline hand them on to it.
        cache_dir : path, optional
            Directory where the codes of rows in files are kept while they are learned from, 4 bytes a value;
            that for temporary files by default. Nothing is left there.
        checkpoint : path, optional
            Directory for the state of the training, from which a later call with the same data and settings
            goes on, and ends up with the same bits; `random_state` has to be a number. It stays: remove it
            when what was learned is stored.
        checkpoint_seconds : float, default=60.0
            How often to write it, at most; less often where that would take more than 5 % of the time.

        Returns
        -------
        self

        Raises
        ------
        InputError
            If data or parameters cannot be learned from, or the checkpoint is of another training; the
            message names the column and the cure.
        UnstableTrainingError
            If the loss goes to infinity or NaN, also at lower rates. After a sound epoch the estimator is
            fitted all the same, with the best weights.
        OutOfMemoryError
            If not even a few rows at a time fit into memory.
        MissingExtraError
            If torch is not installed.
        """
        require("torch", "train")
        from embedkit.learning.combinations import with_crosses
        from embedkit.learning.fit import learn, plain_torch
        from embedkit.learning.loop import UnstableTrainingError

        if checkpoint is not None:
            check_repeatable(self)
        saving = {"checkpoint": checkpoint, "checkpoint_seconds": checkpoint_seconds}
        with plain_torch(), self._put_back_if_it_fails():
            try:
                task = self._task(X, y, sample_weight, cache_dir)
                self._keep(with_crosses(learn(task, **saving), task))
            except UnstableTrainingError as error:
                if error.learned is not None:
                    self._keep(error.learned)
                raise
        return self

    def extend(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Learn vectors for categories that appeared since `fit`; all else stays as it is, to the last bit.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns)
            Columns as in `fit`. Rows without a new category are not learned from. Where `max_categories` is
            set, the most frequent new ones fill what room is left.
        y : array, Series or frame of shape (n_rows,) or (n_rows, n_targets)
            Target or targets as in `fit`; classes must be those of `fit`.
        sample_weight : array of shape (n_rows,), optional
            How many rows each row stands for.

        Returns
        -------
        self

        Raises
        ------
        InputError
            If a column or a target does not fit what was learned.
        NotFittedError
            If `fit` has not been called.
        """
        require("torch", "train")
        from embedkit.learning.extend import extend
        from embedkit.learning.fit import plain_torch

        check_is_fitted(self)
        table = self._read(X, reset=False)
        targets, weights = self._targets(y, table.num_rows), self._weights(sample_weight, table.num_rows)
        limits = self.min_frequency, self.max_categories
        with plain_torch():
            self._keep(extend(self._learned, table, targets, weights, *limits))
        return self

    def fit_transform(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        groups: Any = None,
        *,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> np.ndarray:
        """`fit`, then encode the same rows for a model to learn from.

        Where `cross_fit` says so, a row is encoded by vectors that were learned without it, in the space of
        the tables: a model that learns from vectors which know its targets trusts rare categories too much.
        New rows, for which `transform` is, have no such knowledge. They may have values never seen, so
        `hidden_fraction` of the values are encoded as unknown, for the model to learn what that means.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`, in memory.
        groups : array of shape (n_rows,), optional
            Rows of one group are in one fold of `cross_fit`.
        checkpoint, checkpoint_seconds
            As in `fit`. A later call goes on with the training on all rows; what is measured after it is
            measured anew.

        Returns
        -------
        float32 array of shape (n_rows, n_features_out)
        """
        if is_stream(X):
            raise InputError("fit_transform takes rows in memory: call fit for files, then transform_dataset")
        saving = {"checkpoint": checkpoint, "checkpoint_seconds": checkpoint_seconds}
        if self.cross_fit is False:
            return self.fit(X, y, sample_weight=sample_weight, **saving).transform(X)
        require("torch", "train")
        from embedkit.cross_fitting import cross_fit_rows, encode_rows
        from embedkit.learning.fit import plain_torch

        if checkpoint is not None:
            check_repeatable(self)
        with plain_torch(), self._put_back_if_it_fails():
            task = self._task(X, y, sample_weight)
            learned, crossed = cross_fit_rows(task, self.cross_fit, groups, **saving)
            self._keep(learned)
        return encode_rows(self.embeddings_, task, crossed)

    def find_lr(self, X: Any, y: Any, sample_weight: Any = None, **sweep: Any) -> "LRFinderResult":
        """Run the learning-rate range test on the training that `fit` would do; changes nothing.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.
        **sweep
            ``start_lr``, ``end_lr`` and the like: see `embedkit.learning.lr_finder.find_lr`. As in `fit`, the
            sweep has 200 steps, the rule is "fall", and the suggestion is held within automatic bounds.

        Returns
        -------
        LRFinderResult
        """
        require("torch", "train")
        from embedkit.learning.fit import find_learning_rate, plain_torch

        with plain_torch():
            return find_learning_rate(clone(self)._task(X, y, sample_weight), **sweep)

    def save(self, path: str | os.PathLike) -> str:
        """Publish tables, network and training history as a new version of a stored set.

        Under torchrun the first process writes, and the others wait for it.

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
        return archive.save_once(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, version: str | None = None) -> Self:
        """Load an estimator that `save` stored; it predicts and transforms as the one that was saved.

        Parameters that are objects of Python (a splitter, a callable) are not stored: they are at their
        defaults. Nor are `learning_rates_` and `lr_finder_`; `axes_` has six digits.
        """
        from embedkit import archive

        return archive.load(cls, path, version)

    def _task(self, X: Any, y: Any, sample_weight: Any, cache_dir: str | os.PathLike | None = None) -> "Task":
        """What is to be learned, checked."""
        if y is None:
            raise InputError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: "
                "vectors are learned from what they predict"
            )
        if is_stream(X):
            return task_of_stream(self, X, y, sample_weight, cache_dir)
        return task_of_rows(self, X, y, sample_weight)

    def _weights(self, sample_weight: Any, num_rows: int) -> np.ndarray | None:
        if sample_weight is None:
            return None
        weights = _check_sample_weight(
            sample_weight, np.empty((num_rows, 1)), dtype=np.float64, ensure_non_negative=True
        )
        check_weights(weights)
        return weights

    def _targets(self, y: Any, num_rows: int) -> np.ndarray:
        """Targets of rows that come after `fit`, of shape (n_rows, n_targets)."""
        from embedkit.learning.targets import as_targets

        targets, names, _ = as_targets(y)
        check_consistent_length(np.empty(num_rows), targets)
        learned = [head.name for head in self._learned.heads]
        if len(names) != len(learned):
            raise InputError(f"y must have {len(learned)} target(s), found {len(names)}: {names}")
        if len(names) == 1 or not has_names(y) or names == learned:
            return targets
        if sorted(names) != sorted(learned):
            raise InputError(
                f"y must have the targets {learned} that were learned, found {names}: rename them"
            )
        return targets[:, [names.index(name) for name in learned]]

    def _target_type(self) -> str:
        return self.target_type

    def _settings(self) -> "Settings":
        from embedkit.learning.learned import Settings

        # By name: a subclass may have parameters of its own, or fewer.
        params = {
            field.name: getattr(self, field.name) for field in fields(Settings) if hasattr(self, field.name)
        }
        sizes = params["hidden_layer_sizes"]
        is_list = np.iterable(sizes) and not isinstance(sizes, (str, bytes, Mapping))
        params["hidden_layer_sizes"] = tuple(sizes) if is_list else (sizes,)
        if params["schedule_options"] is None:
            params["schedule_options"] = {}
        if not isinstance(self.verbose, (Integral, np.bool_)) or self.verbose < 0:
            raise InputError(f"verbose must be a whole number of at least 0, got {self.verbose!r}")
        check_cross_fit(self.cross_fit)
        return Settings(**params, seed=self._seed(), progress=self.verbose > 0)

    def _seed(self) -> int:
        try:
            return int(check_random_state(self.random_state).randint(2**31 - 1))
        except ValueError:
            raise InputError(
                "random_state must be a whole number from 0 to 2**32 - 1, a RandomState or None, "
                f"got {self.random_state!r}"
            ) from None

    @contextmanager
    def _put_back_if_it_fails(self) -> Iterator[None]:
        """What an earlier fit has left stays whole where another one has nothing to put in its place."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            if vars(self).get("embeddings_") is before.get("embeddings_"):
                vars(self).clear()
                vars(self).update(before)
            raise

    def _keep(self, learned: "Learned") -> None:
        from embedkit import archive

        self._learned = learned
        self._publish(archive.embedding_set(self))

    def _publish(self, embeddings: EmbeddingSet) -> None:
        """The fitted attributes, from what was learned."""
        learned = self._learned
        self.embeddings_ = embeddings
        self.categories_ = [table.vocabulary.to_numpy() for table in learned.tables]
        self.history_ = learned.history.epochs
        self.learning_rates_ = learned.history.lrs
        self.lr_finder_ = learned.lr_finder
        self.max_lr_ = learned.max_lr
        self.n_iter_ = len(learned.history.epochs)
        self.best_iter_ = learned.history.best_epoch
        self.axes_ = learned.axes
        self.cross_fit_ = learned.cross_fit
        classes = [head.classes for head in learned.heads]
        vars(self).pop("classes_", None)  # of an earlier fit
        if any(labels is not None for labels in classes):
            self.classes_ = classes[0] if self._single else classes

    def _input_names(self) -> Sequence[str]:
        return getattr(self, "feature_names_in_", self._array_names(self.n_features_in_))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags
