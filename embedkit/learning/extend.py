"""Vectors for categories that appeared since: everything that was learned before stays as it is.

With the network and the old vectors held still, a new category's vector is the one that explains its own rows
best under the prior that all vectors are learned with: a small smooth problem, solved to convergence on all
rows at once. It is published on the axes of the table it joins.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from embedkit.columns import EmbeddingTable
from embedkit.crosses import Cross
from embedkit.errors import InputError, first_line
from embedkit.frames import numeric_block
from embedkit.learning.learned import Learned
from embedkit.learning.losses import row_losses
from embedkit.learning.network import EntityEmbeddingNetwork, build
from embedkit.learning.ranks import ranks_between
from embedkit.learning.targets import encode_targets
from embedkit.vocabulary import FIRST, UNKNOWN, Vocabulary, encode_columns

MAX_ITERATIONS = 100
PASS_BATCH = 65_536


def extend(
    learned: Learned,
    table: pa.Table,
    y: np.ndarray,
    sample_weight: np.ndarray | None,
    min_frequency: float | None = None,
    max_categories: int | None = None,
) -> Learned:
    """Learn rows for the categories of a table that are not in the vocabularies.

    Parameters
    ----------
    learned : Learned
    table : pa.Table of n_rows rows
        With all columns that were learned from.
    y : ndarray of shape (n_rows, n_heads)
        Targets as given.
    sample_weight : ndarray of shape (n_rows,) or None
        How many rows each row stands for.
    min_frequency : int or float, optional
        Rarer categories stay unknown; a fraction is one of these rows.
    max_categories : int, optional
        Most categories of a column, old ones included: of the new ones the most frequent are kept.

    Returns
    -------
    Learned
        Vectors and counts of old categories are the same to the last bit, and so is the network.

    Raises
    ------
    InputError
        If a column or a target does not fit what was learned.
    """
    vocabularies, sources = [], []
    for part in learned.tables:
        column = table[part.feature]
        vocabulary, source = _extended(part.vocabulary, column, sample_weight, min_frequency, max_categories)
        vocabularies.append(vocabulary)
        sources.append(source)
    is_new = [source < 0 for source in sources]
    if not any(new.any() for new in is_new):
        return learned
    network = _grown(learned, sources)
    codes = encode_columns(vocabularies, table)
    numeric = learned.inputs.transform(numeric_block(table, learned.inputs.features))
    weights = np.ones(table.num_rows) if sample_weight is None else sample_weight
    targets = encode_targets(learned.heads, y, weights > 0)
    if not np.isfinite(targets).all():
        raise InputError("input y contains NaN or infinity: drop these rows")
    # Only the rows of new categories have a say.
    rows = np.any([new[codes[:, i]] for i, new in enumerate(is_new)], axis=0) & (weights > 0)
    _solve(
        network,
        learned,
        is_new,
        torch.as_tensor(codes[rows]),
        *(torch.as_tensor(part[rows], dtype=torch.float64) for part in (numeric, targets, weights)),
    )
    tables, network_weights = [], dict(learned.weights)
    for i, (old, vocabulary) in enumerate(zip(learned.tables, vocabularies, strict=True)):
        raw = network.tables[i].numpy().astype(np.float32)
        network_weights[f"tables.{i}"] = raw
        projection = learned.projections[i]
        vectors = ((raw - projection.center) @ projection.rotation).astype(np.float32)
        if old.ranked:
            vectors = np.hstack([vectors, ranks_between(old.vectors[:, -1:], sources[i])])
        vectors[~is_new[i]] = old.vectors[sources[i][~is_new[i]]]
        tables.append(EmbeddingTable(vocabulary, vectors, old.ranked))
    return replace(
        learned,
        tables=tuple(tables),
        shape=network.shape,
        weights=network_weights,
        crosses=_recoded(learned, sources),
    )


def _recoded(learned: Learned, sources: Sequence[np.ndarray]) -> tuple[Cross, ...]:
    """Combinations of old categories under their new codes; those with new ones have no number."""
    moved = {}
    for part, source in zip(learned.tables, sources, strict=True):
        known = np.flatnonzero(source >= 0)
        moved[part.feature] = np.zeros(part.num_embeddings, dtype=np.int32)
        moved[part.feature][source[known]] = known
    return tuple(cross.recoded(*(moved[name] for name in cross.features)) for cross in learned.crosses)


def _extended(
    old: Vocabulary,
    column: pa.ChunkedArray,
    sample_weight: np.ndarray | None,
    min_frequency: float | None,
    max_categories: int | None,
) -> tuple[Vocabulary, np.ndarray]:
    """A vocabulary with a column's new categories, and the old code of each of its codes, -1 for new ones."""
    old.encode(column)  # checks the type
    found = Vocabulary.fit(column, old.feature, min_frequency=min_frequency, sample_weight=sample_weight)
    unseen = np.flatnonzero(old.encode(found.categories) == UNKNOWN)
    if max_categories is not None:
        by_frequency = np.argsort(-found.counts[FIRST:][unseen], kind="stable")
        unseen = np.sort(unseen[by_frequency[: max(max_categories - old.cardinality, 0)]])
    if not len(unseen):
        return old, np.arange(old.num_embeddings)
    added = found.categories.take(pa.array(unseen))
    both = added
    if len(old.categories):  # else the column had no value yet, and no type
        try:
            both = pa.concat_arrays([old.categories, added.cast(old.categories.type)])
        except pa.ArrowException as error:
            raise InputError(
                f"column {old.feature!r} was {old.categories.type} when learned and has new values that do "
                f"not fit ({first_line(error)}): cast it, or learn anew"
            ) from error
    order = pc.sort_indices(both).to_numpy().astype(np.int64)
    fresh = found.counts[FIRST:][unseen]
    counts = np.concatenate([old.counts[FIRST:], fresh])[order]
    sources = np.where(order < len(old.categories), order + FIRST, -1)
    return (
        Vocabulary(old.feature, both.take(pa.array(order)), np.concatenate([old.counts[:FIRST], counts])),
        np.concatenate([np.arange(FIRST), sources]),
    )


def _grown(learned: Learned, sources: Sequence[np.ndarray]) -> EntityEmbeddingNetwork:
    """The network with rows for new categories: zero, where the prior is."""
    shape = replace(learned.shape, num_embeddings=tuple(len(source) for source in sources))
    weights = dict(learned.weights)
    for i, source in enumerate(sources):
        grown = np.zeros((len(source), shape.embedding_dims[i]), dtype=np.float32)
        grown[source >= 0] = weights[f"tables.{i}"][source[source >= 0]]
        weights[f"tables.{i}"] = grown
    network = build(shape, weights)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def _solve(
    network: EntityEmbeddingNetwork,
    learned: Learned,
    is_new: Sequence[np.ndarray],
    codes: torch.Tensor,
    numeric: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Move the new rows of the tables, in place, to where penalised loss is lowest (L-BFGS)."""
    # Of the tables only the new rows are parameters; the others are looked up as they are.
    places = [torch.as_tensor(np.flatnonzero(new)) for new in is_new]
    free = [
        torch.zeros(len(place), table.shape[1], dtype=table.dtype, requires_grad=True)
        for place, table in zip(places, network.tables, strict=True)
    ]
    optimizer = torch.optim.LBFGS(
        free,
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )
    noise, total = torch.tensor(learned.noise, dtype=torch.float64), weights.sum()

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = sum(
            projection.precision / 2 * part.square().sum()
            for projection, part in zip(learned.projections, free, strict=True)
        )
        penalty = penalty / total
        penalty.backward()
        value = penalty.item()
        for start in range(0, len(codes), PASS_BATCH):
            batch = slice(start, start + PASS_BATCH)
            tables = [
                table.index_copy(0, place, part)
                for table, place, part in zip(network.tables, places, free, strict=True)
            ]
            embedded = torch.cat([table[codes[batch, i]] for i, table in enumerate(tables)], dim=1)
            losses = row_losses(learned.heads, network(embedded, numeric[batch]), targets[batch], noise)
            part_loss = (losses * weights[batch]).sum() / total
            part_loss.backward()
            value += part_loss.item()
        return torch.tensor(value, dtype=torch.float64)

    optimizer.step(objective)
    for table, place, part in zip(network.tables, places, free, strict=True):
        if part.isfinite().all():
            table[place] = part.detach()
