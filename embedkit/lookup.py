"""What estimators do with X once something is learned: read it, look vectors up, name the columns."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.base import TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import _check_feature_names, _check_n_features, check_is_fitted, validate_data

from embedkit.errors import InputError
from embedkit.frames import to_table
from embedkit.inputs import has_names
from embedkit.tables import EmbeddingSet


class FrameMixin:
    """What all estimators here do with X: any frame, or an array whose columns are all categorical."""

    def _read(self, X: Any, *, reset: bool, as_strings: Sequence[str] = ()) -> pa.Table:
        """X as an Arrow table; checks names and number of columns, or takes note of them (`reset`).

        Cells of the columns `as_strings` become text, and once something is learned those learned as text do.
        """
        if not reset:
            as_strings = self.embeddings_.text_features
        if isinstance(X, pa.RecordBatch):
            X = pa.Table.from_batches([X])
        if has_names(X):
            # Before scikit-learn sees it, whose error on repeated names has many lines.
            table = to_table(X, as_strings=as_strings)
            _check_feature_names(self, table, reset=reset)  # whose names are str, also those of numpy
            _check_n_features(self, table, reset=reset)
            if not reset and not hasattr(self, "feature_names_in_"):
                table = table.rename_columns(list(self._array_names(table.num_columns)))
        else:
            if isinstance(X, (list, tuple)):  # of which numpy would make texts where one cell is text
                X = np.array(X, dtype=object)
            array = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan")
            names = getattr(self, "feature_names_in_", None)
            if reset or names is None:
                names = self._array_names(array.shape[1])
            names = [str(name) for name in names]
            # Columns of a frame have types of their own: one for all could not tell large ids apart.
            X = X.set_axis(names, axis=1) if hasattr(X, "set_axis") else array
            table = to_table(X, feature_names=names, as_strings=as_strings)
        if table.num_rows == 0:
            raise InputError("Found array with 0 sample(s) (rows): at least 1 row is required")
        return table

    def _array_names(self, width: int) -> tuple[str, ...]:
        return tuple(f"x{i}" for i in range(width))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        tags.input_tags.allow_nan = True
        return tags


class LookupMixin(TransformerMixin, FrameMixin):
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
            The vectors of each categorical column side by side, then the numeric columns, then the numbers of
            combinations.

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
            As in scikit-learn: checked against the names of the columns seen in `fit`, or, if these had none
            (``x0``, ``x1`` and so on), used in their place.

        Raises
        ------
        InputError
            If they are not the names seen in `fit`, or not as many.
        """
        check_is_fitted(self)
        renamed = {}
        if input_features is not None:
            given = np.asarray(input_features, dtype=object).ravel().tolist()
            known = getattr(self, "feature_names_in_", None)
            if known is not None and given != list(known):
                raise InputError("input_features is not equal to feature_names_in_")
            if len(given) != self.n_features_in_:
                raise InputError(
                    "input_features should have length equal to number of features "
                    f"({self.n_features_in_}), got {len(given)}"
                )
            if known is None:
                own = zip(self._array_names(len(given)), given, strict=True)
                renamed = {name: new for i, (name, new) in enumerate(own) if name == f"x{i}"}
        parts = (*self.embeddings_.values(), *self.embeddings_.numerics)
        names = [
            f"{renamed.get(part.feature, part.feature)}{name.removeprefix(part.feature)}"
            for part in parts
            for name in part.feature_names_out
        ]
        for cross in self.embeddings_.crosses:
            features = [renamed.get(name, name) for name in cross.features]
            names += replace(cross, features=tuple(features)).feature_names_out
        return np.array(names, dtype=object)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags
