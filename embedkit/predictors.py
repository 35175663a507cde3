"""The network itself as a classifier and a regressor."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from embedkit import store
from embedkit.base import EntityEmbeddingBase
from embedkit.errors import InputError, StoreError, require
from embedkit.frames import numeric_block
from embedkit.vocabulary import encode_columns

if TYPE_CHECKING:
    import pandas as pd


class _NetworkMixin:
    def _outputs(self, table: pa.Table) -> list[np.ndarray]:
        """Outputs of the network for rows from `_read`, one array of shape (n_rows, n_outputs) per head."""
        require("torch", "train")
        from embedkit.learning.network import build, predict

        learned = self._learned
        codes = encode_columns([part.vocabulary for part in learned.tables], table)
        numeric = learned.inputs.transform(numeric_block(table, learned.inputs.features))
        outputs = predict(build(learned.shape, learned.weights), codes, numeric)
        ends = np.cumsum([head.n_outputs for head in learned.heads])[:-1]
        return np.split(outputs, ends, axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """Predict the target of every row.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns)
            Columns as in `fit`.

        Returns
        -------
        ndarray of shape (n_rows,) or (n_rows, n_targets)
            Class labels, or numbers in units of the target. Of the first shape if `y` in `fit` had one
            dimension; a frame of one target is of shape (n_rows, 1), and so is what is predicted.
        """
        check_is_fitted(self)
        outputs = self._outputs(self._read(X, reset=False))
        decoded = [head.decode(part) for head, part in zip(self._learned.heads, outputs, strict=True)]
        if self._single:
            return decoded[0]
        if (
            len({part.dtype.kind for part in decoded}) > 1
        ):  # numpy would turn the numbers among them into text
            decoded = [part.astype(object) for part in decoded]
        return np.stack(decoded, axis=1)

    def top_losses(self, X: Any, y: Any, k: int = 20) -> "pd.DataFrame":
        """Find the rows that the network predicts worst.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns)
            Columns as in `fit`.
        y : array, Series or frame of shape (n_rows,) or (n_rows, n_targets)
            What is true of them.
        k : int
            How many rows at most.

        Returns
        -------
        DataFrame
            The worst first: ``row`` (position in X), ``loss`` (as in `history_`), ``target, prediction``,
            ``probability_<class>`` of each class, then for each categorical column its value and
            ``<column>_count``, the rows in `fit` behind its vector, and the numeric columns. Of several
            targets each has its name after ``target``, ``prediction`` and ``probability``.
        """
        from embedkit.worst import top_losses

        check_is_fitted(self)
        return top_losses(self, X, y, k)

    def category_losses(self, X: Any, y: Any) -> "pd.DataFrame":
        """Find the categories that give the network trouble.

        Parameters
        ----------
        X, y
            As in `top_losses`.

        Returns
        -------
        DataFrame
            A row per feature and category in X: ``feature, category`` (as text), ``count`` (rows in `fit`
            behind its vector), ``rows`` (in X), ``mean_loss, total_loss`` and ``excess_loss``, by which the
            total is above that of as many average rows; the highest excess first.
        """
        from embedkit.worst import category_losses

        check_is_fitted(self)
        return category_losses(self, X, y)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        # Columns of arrays are categories. Where these are distinct numbers, as in scikit-learn's checks of
        # the score, there is nothing to learn, and the prior sees to it that nothing is.
        (tags.classifier_tags or tags.regressor_tags).poor_score = True
        return tags


class EntityEmbeddingClassifier(_NetworkMixin, ClassifierMixin, EntityEmbeddingBase):
    """Classify rows with the network that learns the embeddings; `transform` gives the vectors.

    Parameters and fitted attributes are those of `EntityEmbeddingEncoder`; `target_type` may be "auto",
    "binary" or "multiclass", and "auto" takes every target as classes.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,), or a list of these for several targets
        Class labels, sorted: the order of the columns of `predict_proba`.
    """

    def predict_proba(self, X: Any) -> np.ndarray | list[np.ndarray]:
        """Probability of each class.

        Parameters
        ----------
        X : frame or array of shape (n_rows, n_columns)
            Columns as in `fit`.

        Returns
        -------
        float64 array of shape (n_rows, n_classes)
            Columns in the order of `classes_`; a list of these for several targets.
        """
        check_is_fitted(self)
        outputs = self._outputs(self._read(X, reset=False))
        parts = [head.probabilities(part) for head, part in zip(self._learned.heads, outputs, strict=True)]
        return parts[0] if self._single else parts

    def _target_type(self) -> str:
        if self.target_type == "continuous":
            raise InputError(
                "a classifier cannot learn target_type 'continuous': use EntityEmbeddingRegressor"
            )
        return "multiclass" if self.target_type == "auto" else self.target_type


class EntityEmbeddingRegressor(_NetworkMixin, RegressorMixin, EntityEmbeddingBase):
    """Predict numbers with the network that learns the embeddings; `transform` gives the vectors.

    Parameters and fitted attributes are those of `EntityEmbeddingEncoder`; `target_type` may be "auto" or
    "continuous", which is the same here.
    """

    def _target_type(self) -> str:
        if self.target_type not in ("auto", "continuous"):
            raise InputError(
                f"a regressor cannot learn target_type {self.target_type!r}: use EntityEmbeddingClassifier"
            )
        return "continuous"


def load_predictor(
    path: str | os.PathLike, version: str | None = None
) -> EntityEmbeddingClassifier | EntityEmbeddingRegressor:
    """Load a stored classifier or regressor, whichever it is.

    Raises
    ------
    StoreError
        If the set holds neither, or is damaged.
    """
    version = store.current_version(path) if version is None else version
    found = store.load(path, version).metadata.get("estimator", "embeddings only")
    for kind in (EntityEmbeddingClassifier, EntityEmbeddingRegressor):
        if kind.__name__ == found:
            return kind.load(path, version)
    raise StoreError(
        f"{os.fspath(path)} holds {found}, which predicts nothing: store a classifier or regressor"
    )
