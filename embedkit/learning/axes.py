"""Canonical axes: vectors in the network's own metric, and how far each axis can be trusted.

What the network makes of a category is its vector times its block of the first layer, batch norm folded in. Centred and
rotated by the singular value decomposition, these products are the canonical vectors: distances are the network's own,
axes come in order of importance, and two networks can be compared.

An axis along which the categories differ by no more than the sampling noise of their vectors is not signal. The
noise follows from one pass over the data (the sandwich estimate of M-estimation, White 1980): for a category
with penalised curvature ``K`` and summed squared gradients ``B`` its vector has variance ``inv(K) B inv(K)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from embedkit.learning.data import Rows
from embedkit.learning.losses import curvature_root, row_losses
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.targets import Head

PASS_BATCH = 8_192
# Categories whose noise is measured, per table; enough for a mean, and memory stays bounded.
MAX_MEASURED = 20_000
# Independent draws of signs where a head has several outputs; one is exact for a single output.
NUM_PROBES = 4


@dataclass(frozen=True)
class CanonicalTable:
    """One table on canonical axes.

    Attributes
    ----------
    vectors : float32 array of shape (num_embeddings, embedding_dim)
        Zero mean over the data, columns uncorrelated, the most important first.
    reliability : float array of shape (embedding_dim,)
        Share of each axis' variance that is not sampling noise, 0 to 1.
    variances : float array of shape (embedding_dim,)
        Of each axis over the rows of the data.
    """

    vectors: np.ndarray
    reliability: np.ndarray
    variances: np.ndarray


def fill_untrained(network: EntityEmbeddingNetwork, counts: Sequence[np.ndarray]) -> None:
    """Give every row that nothing trained the mean of its table, weighted by counts."""
    for table, count in zip(network.tables, counts, strict=True):
        weights = torch.as_tensor(count / count.sum(), dtype=table.dtype, device=table.device)
        table[weights == 0] = weights @ table


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
        As in `TableOptimizer`.
    noise : tensor of shape (n_heads,)
        Residual variances; see `row_losses`.
    generator : torch.Generator
    """
    network.eval()
    blocks = first_layer_blocks(network)
    tables = []
    measured = [
        _measured_codes(len(table), count, generator)
        for table, count in zip(network.tables, counts, strict=True)
    ]
    curvature, squares = _second_order(network, heads, rows, measured, noise, generator)
    for i, table in enumerate(network.tables):
        weights = torch.as_tensor(counts[i] / counts[i].sum(), dtype=torch.float64)
        products = table.double().cpu() @ blocks[i].T  # (num_embeddings, units)
        products -= weights @ products
        _, _, axes = torch.linalg.svd(weights.sqrt()[:, None] * products, full_matrices=False)
        axes = axes[: table.shape[1]]
        # The sign of an axis is arbitrary: the category that weighs most on it is positive.
        vectors = products @ axes.T
        top = (weights[:, None] * vectors.square()).argmax(dim=0)
        signs = vectors.gather(0, top[None])[0].sign()
        vectors, axes = vectors * signs, axes * signs[:, None]
        vectors = _pad(vectors, table.shape[1])
        rotation = _pad(blocks[i].T @ axes.T, table.shape[1])  # canonical = centred table @ rotation

        codes, precision = measured[i], priors[i] * float(rows.weights.sum())
        bread = curvature[i] + precision * torch.eye(table.shape[1], dtype=torch.float64)
        maps = torch.linalg.solve(bread, rotation.expand(len(codes), -1, -1))  # (codes, dim, axis)
        variances = torch.einsum("nia,nij,nja->na", maps, squares[i], maps)
        share = weights[codes] / weights[codes].sum()
        sampling = share @ variances
        spread = share @ vectors[codes].square()
        reliability = torch.where(spread > 0, 1 - sampling / spread, 0.0).clamp(0, 1)
        tables.append(
            CanonicalTable(vectors.float().numpy(), reliability.numpy(), (weights @ vectors.square()).numpy())
        )
    return tables


def first_layer_blocks(network: EntityEmbeddingNetwork) -> list[torch.Tensor]:
    """The first layer's weights for each table, then for the numeric inputs, batch norm folded in.

    Each of shape (units, width of the input), float64 on the CPU.
    """
    first = network.layers[0]
    weight = first.weight.detach().double().cpu()  # (units, inputs)
    if len(network.layers) > 1:
        norm: nn.BatchNorm1d = network.layers[1]
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = weight * scale.detach().double().cpu()[:, None]
    return list(weight.split([*network.shape.embedding_dims, network.shape.n_numeric], dim=1))


def _measured_codes(num_embeddings: int, count: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    seen = torch.as_tensor(np.flatnonzero(count > 0))
    if len(seen) <= MAX_MEASURED:
        return seen
    return seen[torch.randperm(len(seen), generator=generator)[:MAX_MEASURED]]


def _second_order(
    network: EntityEmbeddingNetwork,
    heads: Sequence[Head],
    rows: Rows,
    measured: Sequence[torch.Tensor],
    noise: torch.Tensor,
    generator: torch.Generator,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per measured category: Gauss-Newton curvature and squared gradients of the loss by its vector, summed over rows.

    Both lists hold float64 tensors of shape (measured categories, embedding_dim, embedding_dim).
    """
    device = rows.codes.device
    dims = network.shape.embedding_dims
    slots = []
    for codes, size in zip(measured, network.shape.num_embeddings, strict=True):
        slot = torch.full((size,), len(codes))  # the last slot collects what is not measured
        slot[codes] = torch.arange(len(codes))
        slots.append(slot.to(device))
    sums = [
        [
            torch.zeros(len(codes) + 1, dim * dim, device=device)
            for codes, dim in zip(measured, dims, strict=True)
        ]
        for _ in range(2)
    ]
    n_probes = 1 if network.shape.n_outputs == 1 else NUM_PROBES
    for batch in rows.batches(PASS_BATCH):
        embedded = network.lookup(batch.codes).requires_grad_()
        outputs = network(embedded, batch.numeric)
        root_weights = batch.weights.sqrt()  # so that products of two gradients carry the weight once
        loss = (row_losses(heads, outputs, batch.targets, noise) * root_weights).sum()
        (gradient,) = torch.autograd.grad(loss, embedded, retain_graph=True)
        probes = []
        for _ in range(n_probes):
            signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
            root = curvature_root(heads, outputs.detach(), noise, signs)
            root = root * (root_weights / n_probes**0.5)[:, None]
            probes += torch.autograd.grad((outputs * root).sum(), embedded, retain_graph=True)
        for into, parts in zip(sums, (probes, [gradient]), strict=True):
            for part in parts:
                for i, column in enumerate(part.split(dims, dim=1)):
                    outer = (column[:, :, None] * column[:, None, :]).flatten(1)  # (batch, dim * dim)
                    into[i].index_add_(0, slots[i][batch.codes[:, i]], outer)
    curvature, squares = (
        [part[:-1].double().cpu().unflatten(1, (dim, dim)) for part, dim in zip(kind, dims, strict=True)]
        for kind in sums
    )
    return curvature, squares


def _pad(columns: torch.Tensor, width: int) -> torch.Tensor:
    """Zero columns on the right, where a table has fewer rows or units than columns."""
    return torch.nn.functional.pad(columns, (0, width - columns.shape[1]))
