"""Derivatives of the loss by the canonical vectors of each row, from one pass over the data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from embedkit.learning.data import Rows
from embedkit.learning.losses import curvature_root, row_losses
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.targets import Head

PASS_BATCH = 8_192
# Independent draws of signs where a head has several outputs; one is exact for a single output.
NUM_PROBES = 4


@dataclass(frozen=True)
class Derivatives:
    """Of the rows of one batch, by their vectors of one table on canonical axes.

    Attributes
    ----------
    gradient : tensor of shape (batch, n_axes)
        Of each row's loss, times the root of its weight.
    roots : list of tensor of shape (batch, n_axes)
        The sum of their outer products has the row's Gauss-Newton curvature, weighted, for its mean.
    """

    gradient: torch.Tensor
    roots: list[torch.Tensor]


def derivatives(
    network: EntityEmbeddingNetwork,
    heads: Sequence[Head],
    rows: Rows,
    inverses: Sequence[torch.Tensor],
    noise: torch.Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[Rows, list[Derivatives]]]:
    """Every batch of the rows, in order, with its derivatives by the vectors of each table.

    Parameters
    ----------
    network : EntityEmbeddingNetwork
        In evaluation mode.
    heads : sequence of Head
    rows : Rows
    inverses : sequence of tensor of shape (n_axes, embedding_dim)
        From canonical vectors to those of the network's tables.
    noise : tensor of shape (n_heads,)
        Residual variances; see `row_losses`.
    generator : torch.Generator
    """
    maps = [inverse.T.float().to(rows.device) for inverse in inverses]
    n_probes = 1 if network.shape.n_outputs == 1 else NUM_PROBES
    for batch in rows.batches(PASS_BATCH):
        embedded = network.lookup(batch.codes).requires_grad_()
        outputs = network(embedded, batch.numeric)
        root_weights = batch.weights.sqrt()  # so that products of two gradients carry the weight once
        loss = (row_losses(heads, outputs, batch.targets, noise) * root_weights).sum()
        seeds = []
        for _ in range(n_probes):
            signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
            root = curvature_root(heads, outputs.detach(), noise, signs)
            seeds.append((outputs * root * (root_weights / n_probes**0.5)[:, None]).sum())
        parts = [torch.autograd.grad(seed, embedded, retain_graph=True)[0] for seed in (*seeds, loss)]
        turned = [
            [
                column @ m
                for column, m in zip(part.split(network.shape.embedding_dims, dim=1), maps, strict=True)
            ]
            for part in parts
        ]
        yield batch, [Derivatives(gradient, list(roots)) for *roots, gradient in zip(*turned, strict=True)]
