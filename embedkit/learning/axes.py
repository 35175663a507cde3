"""Canonical axes: vectors in the network's own metric, and how far each axis can be trusted.

What the network makes of a category is its vector times its block of the first layer, batch norm folded in.
Centred and rotated by the singular value decomposition, these products are the canonical vectors: distances
are the network's own, axes come in order of importance, and two networks can be compared.

An axis along which the categories differ by no more than the sampling noise of their vectors is not signal.
The noise follows from one pass over the data (the sandwich estimate of M-estimation, White 1980): for a
category with penalised curvature ``K`` and summed squared gradients ``B`` its vector has variance ``inv(K) B
inv(K)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embedkit.learning.data import Rows
from embedkit.learning.derivatives import Derivatives, add_up, derivatives, folded_layers
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.targets import Head

# Categories whose noise is measured, per table: enough for a mean, and memory stays bounded.
MAX_MEASURED = 20_000
# An axis with less of its table's variance is as good as ignored by the network. What it holds is what the
# optimizer happened to leave there, which trees would read at its face value.
MIN_SHARE = 0.01


@dataclass(frozen=True)
class CanonicalTable:
    """One table on canonical axes.

    Attributes
    ----------
    vectors : float32 array of shape (num_embeddings, embedding_dim)
        Zero mean over the data, columns uncorrelated, the most important first.
    share : float array of shape (embedding_dim,)
        Of the table's variance over the rows of the data, that each axis has.
    reliability : float array of shape (embedding_dim,)
        Share of each axis' variance that is not sampling noise, 0 to 1; 0 for an axis whose `share` is under
        1 %.
    center : float64 array of shape (embedding_dim,)
    rotation : float64 array of shape (embedding_dim, embedding_dim)
        The map that made the vectors: ``(table - center) @ rotation``.
    """

    vectors: np.ndarray
    share: np.ndarray
    reliability: np.ndarray
    center: np.ndarray
    rotation: np.ndarray


def fill_untrained(
    network: EntityEmbeddingNetwork, counts: Sequence[np.ndarray], trained: Sequence[np.ndarray]
) -> None:
    """Give every row that nothing trained the mean of its table over the data.

    Parameters
    ----------
    network : EntityEmbeddingNetwork
    counts : sequence of array of shape (num_embeddings,)
        Rows of the data with each code.
    trained : sequence of array of shape (num_embeddings,)
        Rows that trained each code: unknown ones are put in on purpose.
    """
    for table, count, training in zip(network.tables, counts, trained, strict=True):
        weights = torch.as_tensor(count / count.sum(), dtype=table.dtype, device=table.device)
        table[torch.as_tensor(training == 0, device=table.device)] = weights @ table


def canonical_tables(
    network: EntityEmbeddingNetwork,
    heads: Sequence[Head],
    rows: Rows,
    *,
    counts: Sequence[np.ndarray],
    priors: Sequence[float],
    noise: torch.Tensor,
    generator: torch.Generator,
) -> list[CanonicalTable]:
    """Turn every table of a trained network to canonical axes and measure their reliability.

    Parameters
    ----------
    network : EntityEmbeddingNetwork
        Trained.
    heads : sequence of Head
    rows : Rows
        The rows it learned from.
    counts : sequence of array of shape (num_embeddings,)
        Rows of the data with each code, not all zero.
    priors : sequence of float
        As in `TableOptimizer`, with what a training that ends early adds to them.
    noise : tensor of shape (n_heads,)
        Residual variances; see `row_losses`.
    generator : torch.Generator
    """
    blocks = first_layer_blocks(network)
    total = float(rows.weights.sum())
    tables, centers, rotations, shares = [], [], [], []
    for table, block, count in zip(network.tables, blocks, counts, strict=False):
        weights = torch.tensor(count / count.sum(), dtype=torch.float64)
        centred = table.double().cpu()
        center = weights @ centred
        centred -= center
        rotation = _rotation(centred, block, weights)
        vectors = centred @ rotation  # (num_embeddings, embedding_dim)
        spread = weights @ vectors.square()
        tables.append(vectors)
        centers.append(center)
        rotations.append(rotation)
        shares.append(spread / spread.sum().clamp(min=torch.finfo(torch.float64).tiny))
    # Axes are in order of their share, so those that are worth measuring come first.
    num_axes = [int((share >= MIN_SHARE).sum()) for share in shares]
    inverses = [torch.linalg.pinv(rotation)[:n] for rotation, n in zip(rotations, num_axes, strict=True)]
    measured = [_measured_codes(count, generator) for count in counts]
    curvature, squares = _second_order(network, heads, rows, inverses, measured, noise, generator)

    result = []
    for i, vectors in enumerate(tables):
        codes, n = measured[i], num_axes[i]
        share = torch.tensor(counts[i], dtype=torch.float64)[codes]
        share /= share.sum()
        # The prior's precision, turned to the axes that are measured; the others are taken as they are.
        precision = priors[i] * total * inverses[i] @ inverses[i].T
        bread = torch.linalg.pinv(curvature[i] + precision, hermitian=True)
        variances = (bread @ squares[i] @ bread).diagonal(dim1=1, dim2=2)  # (measured categories, n)
        sampling, spread = share @ variances, share @ vectors[codes, :n].square()
        reliability = torch.zeros(vectors.shape[1], dtype=torch.float64)
        reliability[:n] = (1 - sampling / spread).clamp(0, 1).nan_to_num(0.0)
        parts = (vectors.float(), shares[i], reliability, centers[i], rotations[i])
        result.append(CanonicalTable(*(part.numpy() for part in parts)))
    return result


def _rotation(centred: torch.Tensor, block: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The map from a centred table to its canonical axes, shape (embedding_dim, embedding_dim).

    The singular value decomposition of ``centred @ block.T``, rows weighted, by way of matrices of the size
    of the vectors, as tables can be long.
    """
    dim = centred.shape[1]
    triangle = torch.linalg.qr(block)[1]  # block = Q triangle, and Q keeps distances
    covariance = triangle @ (centred.T @ (weights[:, None] * centred)) @ triangle.T
    _, axes = torch.linalg.eigh(covariance)
    rotation = triangle.T @ axes.flip(dims=[1])
    rotation = torch.nn.functional.pad(rotation, (0, dim - rotation.shape[1]))  # fewer units than columns
    # The sign of an axis is arbitrary: the category that weighs most on it is positive.
    vectors = centred @ rotation
    top = (weights[:, None] * vectors.square()).argmax(dim=0)
    return torch.where(vectors.gather(0, top[None])[0] < 0, -rotation, rotation)


def first_layer_blocks(network: EntityEmbeddingNetwork) -> list[torch.Tensor]:
    """The first layer's weights for each table, then for the numeric inputs, batch norm folded in.

    Each of shape (units, width of the input), float64 on the CPU.
    """
    weight = folded_layers(network)[0][0].cpu()  # (units, inputs)
    return list(weight.split([*network.shape.embedding_dims, network.shape.n_numeric], dim=1))


def _measured_codes(count: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    seen = torch.as_tensor(np.flatnonzero(count > 0))
    if len(seen) <= MAX_MEASURED:
        return seen
    return seen[torch.randperm(len(seen), generator=generator)[:MAX_MEASURED]]


def _second_order(
    network: EntityEmbeddingNetwork,
    heads: Sequence[Head],
    rows: Rows,
    inverses: Sequence[torch.Tensor],
    measured: Sequence[torch.Tensor],
    noise: torch.Tensor,
    generator: torch.Generator,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gauss-Newton curvature and squared gradients of the loss by the canonical vectors of measured
    categories.

    Both lists hold float64 tensors of shape (measured categories, axes, axes), summed over the rows of a
    category; the axes are the rows of `inverses`.
    """
    device = rows.device
    slots = []
    for codes, size in zip(measured, network.shape.num_embeddings, strict=True):
        slot = torch.full((size,), len(codes))  # the last slot collects what is not measured
        slot[codes] = torch.arange(len(codes))
        slots.append(slot.to(device))
    widths = [len(inverse) for inverse in inverses]
    curvature, squares = (
        [
            torch.zeros(len(codes) + 1, width**2, device=device)
            for codes, width in zip(measured, widths, strict=True)
        ]
        for _ in range(2)
    )

    def add(batch: Rows, parts: list[Derivatives]) -> None:
        for i, part in enumerate(parts):
            slot = slots[i][batch.codes[:, i]]
            for root in part.roots:
                curvature[i].index_add_(0, slot, outer(root))
            squares[i].index_add_(0, slot, outer(part.gradient))

    add_up(derivatives(network, heads, rows, inverses, noise, generator), add, device)
    return tuple(
        [
            part[:-1].double().cpu().unflatten(1, (width, width))
            for part, width in zip(kind, widths, strict=True)
        ]
        for kind in (curvature, squares)
    )


def outer(rows: torch.Tensor) -> torch.Tensor:
    """Outer product of each row with itself, shape (n_rows, width * width)."""
    return (rows[:, :, None] * rows[:, None, :]).flatten(1)
