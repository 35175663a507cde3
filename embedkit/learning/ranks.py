"""One more number for every category: its place in sorted order, on a scale that distances do not see.

Along it a forest can take any category out by itself, as from an ordinal encoding, and boosted trees go as
far as their bins do; both find what neighbours in that order (days, sizes, postal codes) have in common.
Vectors, which keep what holds up in the mean over the categories, show neither.
"""

import numpy as np

# The trees of scikit-learn take values within 1e-7 of one another as one.
LEAST_STEP = 2e-7
# Where there is room, nine more categories fit in between.
STEP = 10 * LEAST_STEP
REACH = 0.01


def ranks(num_embeddings: int) -> np.ndarray:
    """Of missing, unknown and every category, float32 of shape (num_embeddings, 1).

    Of more than 50,000 categories neighbours share a rank: no more are told apart within what distances do
    not see.
    """
    distinct = min(num_embeddings, round(REACH / LEAST_STEP))
    places = np.arange(num_embeddings) * distinct // num_embeddings
    return (places * min(STEP, REACH / distinct)).astype(np.float32)[:, None]


def ranks_between(old: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Ranks of a vocabulary that has grown: those of before stay, new categories lie between them.

    Where many come between two old ones, trees take them for one until the set is learned anew.

    Parameters
    ----------
    old : float32 array of shape (n_old, 1)
    sources : int array of shape (num_embeddings,)
        The old code of each code, -1 for new ones.

    Returns
    -------
    float32 array of shape (num_embeddings, 1)
    """
    places = np.flatnonzero(sources >= 0)
    known = old[sources[places], 0].astype(np.float64)
    beyond = np.maximum(np.arange(len(sources)) - places[-1], 0)
    step = min(STEP, max(REACH - known[-1], 0) / max(beyond[-1], 1))
    found = np.interp(np.arange(len(sources)), places, known) + beyond * step
    return found.astype(np.float32)[:, None]
