"""Derivatives of the loss by the canonical vectors of each row, from one pass over the data.

Outside of training a network is affine between its ReLUs, batch norm included. So the derivatives are written
out, with batch norm folded into the layers, and lead straight to the few axes that are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from embedkit.learning.data import Rows
from embedkit.learning.gradients import product
from embedkit.learning.losses import curvature_root, output_gradients
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.targets import Head
from embedkit.learning.threads import ThreadChoice

PASS_BATCH = 1_024
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


@torch.no_grad()
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
        With batch norm's averages measured.
    heads : sequence of Head
    rows : Rows
    inverses : sequence of tensor of shape (n_axes, embedding_dim)
        From canonical vectors to those of the network's tables.
    noise : tensor of shape (n_heads,)
        Residual variances; see `row_losses`.
    generator : torch.Generator
    """
    layers = _Layers(network, inverses)
    n_probes = 1 if network.shape.n_outputs == 1 else NUM_PROBES
    for batch in rows.batches(PASS_BATCH):
        outputs = layers.outputs(torch.cat([network.lookup(batch.codes), batch.numeric], dim=1))
        root_weights = batch.weights.sqrt()[:, None]  # so that products of two carry the weight once
        seeds = []
        for _ in range(n_probes):
            signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
            root = curvature_root(heads, outputs, noise, signs)
            seeds.append(root * (root_weights / n_probes**0.5))
        seeds.append(output_gradients(heads, outputs, batch.targets, noise) * root_weights)
        if outputs.shape[1] == 1:  # all of them go the same way
            way = layers.by_vectors(torch.ones_like(outputs))
            turned = [[part * seed for part in way] for seed in seeds]
        else:
            turned = [layers.by_vectors(seed) for seed in seeds]
        yield batch, [Derivatives(gradient, list(roots)) for *roots, gradient in zip(*turned, strict=True)]


def add_up(
    found: Iterator[tuple[Rows, list[Derivatives]]],
    add: Callable[[Rows, list[Derivatives]], None],
    device: torch.device,
) -> None:
    """Give every batch of `derivatives` to `add`, on as many threads as are faster at the time."""

    def step() -> bool:
        one = next(found, None)
        if one is not None:
            add(*one)
        return one is not None

    threads = ThreadChoice.for_batches(PASS_BATCH, device)
    while threads.run(step):
        pass


class _Layers:
    """The layers of a network, batch norm folded in: outputs, and how these change with the vectors.

    Parameters
    ----------
    network : EntityEmbeddingNetwork
    inverses : sequence of tensor of shape (n_axes, embedding_dim)
    """

    def __init__(self, network: EntityEmbeddingNetwork, inverses: Sequence[torch.Tensor]) -> None:
        folded = folded_layers(network)
        columns = folded[0][0].split([*network.shape.embedding_dims, network.shape.n_numeric], dim=1)
        # From canonical vectors to the units of the first layer, (units, n_axes).
        self.blocks = [
            (block @ inverse.T.to(block)).float() for block, inverse in zip(columns, inverses, strict=False)
        ]
        self.layers = [(weight.float(), bias.float()) for weight, bias in folded]
        self.hidden: list[torch.Tensor] = []

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Of rows, shape (batch, n_outputs); what passed the ReLUs is kept."""
        *hidden, last = self.layers
        self.hidden = []
        for weight, bias in hidden:
            x = product(x, weight, bias).relu_()
            self.hidden.append(x)
        return product(x, *last)

    def by_vectors(self, seed: torch.Tensor) -> list[torch.Tensor]:
        """Derivatives by the vectors of each table, of a function with these derivatives by the outputs."""
        for (weight, _), units in zip(reversed(self.layers), reversed(self.hidden), strict=False):
            seed = torch.ops.aten.threshold_backward(product(seed, weight.T), units, 0)
        return [product(seed, block.T) for block in self.blocks]


def folded_layers(network: EntityEmbeddingNetwork) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of each layer, with batch norm as it was measured; ReLUs are between them.

    Of shape (units, inputs) and (units,), float64.
    """
    folded, modules = [], list(network.layers)
    for i, linear in enumerate(modules):
        if not isinstance(linear, nn.Linear):
            continue
        weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
        if i + 1 < len(modules):
            norm: nn.BatchNorm1d = modules[i + 1]
            scale = norm.weight.detach() / torch.sqrt(norm.running_var.double() + norm.eps)
            weight = weight * scale[:, None]
            bias = (bias - norm.running_mean) * scale + norm.bias.detach()
        folded.append((weight, bias))
    return folded
