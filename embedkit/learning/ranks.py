"""One more number for every category: its place in sorted order, on a scale that distances do not see.

Trees can take any category out by itself along it, as from an ordinal encoding, and find what neighbours in
that order (days, sizes, postal codes) have in common. Vectors, which keep what holds up in the mean over the
categories, say neither.
"""

import numpy as np

# Trees of scikit-learn take values within 1e-7 of one another as one; float32 tells these apart up to REACH.
STEP = 2e-7
REACH = 0.01


def ranks(num_embeddings: int) -> np.ndarray:
    """Of missing, unknown and every category, float32 of shape (num_embeddings, 1)."""
    step = min(STEP, REACH / num_embeddings)
    return (np.arange(num_embeddings) * step).astype(np.float32)[:, None]


def ranks_between(old: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Ranks of a vocabulary that has grown: those of before stay, new categories lie between them.

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
    codes = np.arange(len(sources))
    found = np.interp(codes, places, known) + np.maximum(codes - places[-1], 0) * STEP
    return found.astype(np.float32)[:, None]
