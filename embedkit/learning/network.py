"""The network: entity embeddings and numbers, side by side, under ReLU layers.

Source: Guo & Berkhahn 2016, arXiv 1604.06737, figure 1; dropout and batch norm as in fastai's tabular model.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from embedkit.errors import InputError
from embedkit.learning.learned import NetworkShape

MAX_AUTO_DIM = 50
# Of a table: 256 MB. Of millions of categories each has few rows to learn from.
MAX_AUTO_NUMBERS = 1 << 26


def embedding_dims(
    features: Sequence[str],
    num_embeddings: Sequence[int],
    embedding_dim: str | int | Mapping[str, int] | Callable[[int], int],
) -> tuple[int, ...]:
    """The width of each table while it is learned.

    Parameters
    ----------
    features : sequence of str
        Names of the categorical columns.
    num_embeddings : sequence of int
        Rows of each table.
    embedding_dim : "auto", int, dict or callable
        "auto" is fastai's rule, ``1.6 * num_embeddings ** 0.56``, at most 50, and less for a table that would
        hold more than 67 million numbers; a dict names some features and leaves the others to the rule; a
        callable gets ``num_embeddings``.

    Raises
    ------
    InputError
        If a width is no positive whole number, or a dict names an unknown feature.
    """
    if isinstance(embedding_dim, Mapping):
        unknown = sorted(set(embedding_dim) - set(features))
        if unknown:
            raise InputError(f"embedding_dim names {unknown}, categorical columns are {list(features)}")
    dims = []
    for feature, rows in zip(features, num_embeddings, strict=True):
        dim = embedding_dim.get(feature, "auto") if isinstance(embedding_dim, Mapping) else embedding_dim
        if isinstance(dim, str) and dim == "auto":
            dim = min(MAX_AUTO_DIM, round(1.6 * rows**0.56), max(MAX_AUTO_NUMBERS // rows, 1))
        elif callable(dim):
            dim = dim(rows)
        if not isinstance(dim, (int, np.integer)) or isinstance(dim, bool) or dim < 1:
            raise InputError(
                f"embedding_dim of {feature!r} must be 'auto' or a positive whole number, got {dim!r}"
            )
        dims.append(int(dim))
    return tuple(dims)


class Dropout(nn.Module):
    """Dropout that draws its masks cheaply: eight elements from each random 64-bit number.

    Parameters
    ----------
    p : float
        Fraction of elements set to zero in training, rounded to a multiple of 1 / 256 between 1 and 255 of
        them; 0 is none.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Set elements to zero and scale up the others, in training; do nothing otherwise."""
        return x * self.mask(x) if self.training else x

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """What to multiply a tensor by, of its shape and type: zeros, and what makes up for them."""
        if self.p == 0:
            return torch.ones_like(x)
        dropped = min(max(round(self.p * 256), 1), 255)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        draws = words.view(torch.uint8)[: x.numel()].view(x.shape)  # uniform over 0 ... 255
        # In place on bytes: a comparison into a tensor of bool takes three times as long.
        return draws.ge_(dropped).to(x.dtype).mul_(256 / (256 - dropped))


class EntityEmbeddingNetwork(nn.Module):
    """Tables of vectors and the layers that read them.

    The tables take no part in autograd: `embedkit.learning.optimizer.TableOptimizer` moves them from the
    gradient at their looked-up vectors.

    Parameters
    ----------
    shape : NetworkShape
    dropout, embedding_dropout : float
        Fraction of hidden units, and of vector elements, set to zero in training.
    """

    def __init__(self, shape: NetworkShape, dropout: float = 0.0, embedding_dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        # Zero is where the prior is: a category moves away by evidence only. The layers' random weights break
        # the symmetry.
        tables = zip(shape.num_embeddings, shape.embedding_dims, strict=True)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.zeros(rows, dim), requires_grad=False) for rows, dim in tables
        )
        self.embedding_dropout = Dropout(embedding_dropout)
        layers: list[nn.Module] = []
        width = sum(shape.embedding_dims) + shape.n_numeric
        for units in shape.hidden_layer_sizes:
            norm = nn.BatchNorm1d(units, momentum=1.0)  # what it keeps is measured after the training
            layers += [nn.Linear(width, units), norm, nn.ReLU(), Dropout(dropout)]
            width = units
        self.layers = nn.Sequential(*layers, nn.Linear(width, shape.n_outputs))

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors of all features side by side."""
        vectors = [table.index_select(0, codes[:, i]) for i, table in enumerate(self.tables)]
        return torch.cat(vectors, dim=1)  # (batch, sum of embedding_dims)

    def forward(self, embedded: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        """Outputs from looked-up vectors and numbers."""
        inputs = torch.cat([self.embedding_dropout(embedded), numeric], dim=1)
        return self.layers(inputs)  # (batch, n_outputs)


def weights_of(network: EntityEmbeddingNetwork) -> dict[str, np.ndarray]:
    """All learned numbers of a network, by name."""
    state = network.state_dict()
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def build(shape: NetworkShape, weights: Mapping[str, np.ndarray]) -> EntityEmbeddingNetwork:
    """A network from its shape and weights, ready to predict.

    In double precision: what a row is predicted does not depend on the rows beside it, as it does in single.
    """
    with torch.device("meta"):  # without random weights: they would be drawn from the process' random numbers
        network = EntityEmbeddingNetwork(shape)
    tensors = {name: torch.as_tensor(np.array(array)) for name, array in weights.items()}
    network.load_state_dict(tensors, assign=True)
    return network.double().eval()


def predict(
    network: EntityEmbeddingNetwork, codes: np.ndarray, numeric: np.ndarray, batch_size: int = 65_536
) -> np.ndarray:
    """Outputs of a network from `build` for coded rows, float64 of shape (n_rows, n_outputs)."""
    outputs = np.empty((len(codes), network.shape.n_outputs))
    with torch.no_grad():
        for start in range(0, len(codes), batch_size):
            rows = slice(start, start + batch_size)
            embedded = network.lookup(torch.as_tensor(codes[rows]))
            outputs[rows] = network(embedded, torch.as_tensor(numeric[rows]).double()).numpy()
    return outputs
