"""The scikit-learn transformers: learn vectors for categorical columns, or use vectors learned before."""

import os
from typing import Any, Self

from sklearn.base import BaseEstimator

from embedkit.base import EntityEmbeddingBase
from embedkit.errors import InputError
from embedkit.lookup import LookupMixin
from embedkit.tables import EmbeddingSet


class EntityEmbeddingEncoder(EntityEmbeddingBase):
    """Encode categorical columns by entity embeddings learned in a neural network.

    A network learns to predict `y`; on the way it learns a vector for every category of every categorical
    column. The vectors are turned to canonical axes (distances are the network's own, the most important axis
    first), axes that sampling noise explains are dropped, and what remains encodes the columns. Missing
    values and unknown categories have vectors of their own. The fitted encoder is a lookup and needs no
    torch.

    Parameters
    ----------
    categorical_features : "from_dtype" or sequence of str, default="from_dtype"
        Columns of a frame to take as categorical, beside strings, categories and booleans, which always are:
        integer ids and dates have to be named. Of an array all columns are categorical.
    target_type : {"auto", "continuous", "binary", "multiclass"}, default="auto"
        "auto" takes numbers with a fraction, and numbers of more than 20 distinct values, as continuous.
    numeric : {"scale", "passthrough", "drop"}, default="scale"
        What becomes of numeric columns, which help the network to learn: "scale" puts them in units of the
        network's sensitivity, so that distances between rows mean something; missing ones are imputed and
        flagged.
    embedding_dim : "auto", int, dict or callable, default="auto"
        Width of the tables. "auto" learns generously (50 at most, fewer above 1.3 million categories) and
        publishes the axes that are signal; a number (for all), a dict (some features) or a callable of the
        number of embeddings publishes exactly as many.
    min_frequency : int or float, optional
        Categories in fewer rows (int) or a smaller fraction of rows (float) are treated as unknown.
    max_categories : int, optional
        Most categories to keep of a column: the most frequent ones.
    hidden_layer_sizes : int or sequence of int, default=(200, 100)
        Units of the ReLU layers.
    dropout, embedding_dropout : float, default=0.1 and 0.2
        Fraction of hidden units, and of elements of the vectors, that a training step leaves out.
    unknown_fraction : float, default=0.03
        Fraction of values that a training step replaces by unknown, which trains its vector.
    shrinkage : float, default=0.1
        Strength of the prior that draws vectors to zero: as strong as ``shrinkage * cardinality`` rows of
        evidence. A category with few rows stays near zero, one with many goes where they carry it.
    min_reliability : float, default=0.3
        Share of an axis' variance that must not be sampling noise for it to be published.
    ranks : bool, default=True
        Whether the place of a category in sorted order comes with its vector, in a last column
        ``{feature}_rank``, on a scale that distances do not see: trees, which do, can take single categories
        out along it. Not for features whose width `embedding_dim` gives, nor for those that come out as
        zeros, nor where an input or a target has that name.
    crosses : int or "auto", default="auto"
        Most pairs of categorical columns that get a column ``{feature}_x_{feature}`` (one each with several
        classes or targets, ``..._0``, ``..._1``): how far the mean target of rows with that combination lies
        from the mean of all, shrunk; 0.6 of the spread of all vectors is a standard deviation. Those that
        explain most of what the network leaves over come first, also where it is little; of more than 25
        columns, only pairs of the 25 whose vectors spread most. They are judged, and `fit_transform` encodes
        every row, without the fifth of the rows that it came with, in the order given: what passes with time
        counts little where rows are in the order of time. So does what is of one shop only where they are in
        the order of shops: shuffle rows whose order means nothing. Where they are in the order of the target
        the fifths are random; groups, or the folds of `cross_fit`, take their place where these are given.
        "auto" takes 8 (fewer with more than 4 classes or targets) where `fit_transform` measures, on the rows
        that ``cross_fit="auto"`` holds out, that LightGBM gains by them, and none where nothing is measured,
        as in `fit`; where KNN gains more than its error by another spread, 0.01, 1.2, 2.4 or 4.8, that one.
        For rows in memory, at least 1,000 of them, for "auto" 1,250; `fit_transform` has none where
        ``cross_fit="auto"`` finds no folds among the groups.
    cross_fit : "auto", False, int or splitter, default="auto"
        Whether `fit_transform` encodes a row by vectors learned without it: in as many random folds, or in
        those of a splitter of scikit-learn; rows that it never tests are encoded without one another. "auto"
        does so for the third of the columns that it moves most, unless quick models get better with none, two
        thirds or all of them, on rows held out of the training rows; and sets columns to zero that are mostly
        noise and of no help there.
    hidden_fraction : float, default=0.01
        Fraction of values that `fit_transform` encodes as unknown, so that a model which learns from the rows
        learns what unknown means. Nothing is hidden where there are fewer than 1,000 rows.
    weight_decay : float, default=0.01
        AdamW's, for the layers: per step and unit of learning rate.
    max_lr : float or "auto", default="auto"
        Peak learning rate. "auto" runs the range test first and takes its suggestion, within 1e-3 and 1e-2;
        where there are fewer than 2,000 steps, not below 2 / steps. A training of fewer than 800 steps, of
        which a test would be a large part, goes without one: 4e-3, where that is within these bounds.
    schedule : str, default="one_cycle"
        "one_cycle", "triangular", "triangular2", "exp_range", "cosine_restarts" or "constant".
    schedule_options : dict, optional
        Options of the schedule: ``pct_start`` (fraction of all steps), ``div_factor``, ``base_lr``, ``T_0``
        and the like.
    batch_size : int or "auto", default="auto"
        Rows a step. "auto" makes 128 to 256 steps an epoch, within 32 and 1,024 rows.
    precision : {"float32", "bfloat16"}, default="float32"
        Of factors and results of the hidden layers' matrix products in training: "bfloat16" is faster where
        the processor (AVX512-BF16, AMX) or the GPU multiplies such numbers, the more so the wider the layers,
        and several times slower elsewhere. Weights, batch norm and all that is worked out afterwards stay
        float32 or better.
    max_epochs : int, default=15
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
    cross_fit_ : dict or None
        Of `fit_transform`: "features" says of each column whether it was "cross_fitted", if it "helps" (if
        not, it is mostly noise, of no help on held-out rows, and its vectors are zeros), and its
        "alignment_residual" (how far vectors learned without a row lie from the full ones, relative to the
        spread of these), "scores" what was measured, "reason" why it was chosen so, "crosses" what these
        gained. None after `fit`.
    history_ : list of dict
        Losses of each epoch: the mean over rows of half the squared error of the standardised target, or of
        the cross-entropy in nats.
    learning_rates_ : list of float
        Learning rate of each step.
    lr_finder_ : LRFinderResult or None
        The range test of ``max_lr="auto"``, where there was one.
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
    To `fit`, two equal rows and one row of weight 2 are the same thing: bit for bit up to 50,000 rows, in the
    mean beyond. Early stopping holds rows out as they are given, each with its weight.

    ``fit_transform(X, y)`` is not ``fit(X, y).transform(X)`` unless `cross_fit` is False. It splits rows into
    folds: equal rows may be in different ones, a row of weight 2 is in one, which holds for the choice of
    `crosses` in `fit` too. It chooses whether there are `crosses`, and hides some values (`hidden_fraction`).

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


class PretrainedEmbeddingEncoder(LookupMixin, BaseEstimator):
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
        self._array_columns = embeddings.features_in
        table = self._read(X, reset=True, as_strings=embeddings.text_features)
        shared = [name for name in embeddings.features_in if name in table.column_names]
        if not shared:
            expected, found = list(embeddings.features_in), table.column_names
            raise InputError(f"X has none of the columns {expected} of the set: it has {found}")
        self.embeddings_ = embeddings.subset(shared)
        self.embeddings_.transform(table.slice(0, 1))
        return self

    def _array_names(self, width: int) -> tuple[str, ...]:
        spare = (f"column {i}" for i in range(width))
        return (*self._array_columns, *(name for name in spare if name not in self._array_columns))[:width]
