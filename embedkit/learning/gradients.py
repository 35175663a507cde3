"""The layers' gradients, written out.

For one fixed kind of network autograd's bookkeeping, an optimizer over many small tensors and general-purpose
matrix products cost more than the arithmetic does. Here the products go through oneDNN, which uses the widest
vectors of any x86 processor, and all parameters lie side by side in one tensor, which one fused step moves.
"""

import torch
import torch.nn.functional as F

from embedkit.learning.network import EntityEmbeddingNetwork

# Compared with `F.linear` on processors that are not Intel's: 2 to 3 times faster.
_ONEDNN = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


class LayerGradients:
    """Outputs of a network in training, and the gradients of its layers.

    Parameters
    ----------
    network : EntityEmbeddingNetwork
        On its device for good: the parameters of its layers become views of `parameters`, their gradients
        views of `gradient`.
    precision : {"float32", "bfloat16"}
        Of factors and results of the hidden layers' products.

    Attributes
    ----------
    parameters, gradient : tensor of shape (all parameters of the layers,)
    n_shares : int
        Parts of a batch, of which one is at hand.
    """

    n_shares = 1

    def __init__(self, network: EntityEmbeddingNetwork, precision: str = "float32") -> None:
        self.network = network
        self.product = product if precision == "float32" else bfloat16_product
        own = list(network.layers.parameters())
        self.parameters = torch.cat([part.detach().flatten() for part in own])
        self.gradient = torch.zeros_like(self.parameters)
        sizes = [part.numel() for part in own]
        values, gradients = self.parameters.split(sizes), self.gradient.split(sizes)
        for part, value, gradient in zip(own, values, gradients, strict=True):
            part.data, part.grad = value.view_as(part), gradient.view_as(part)
        *hidden, self.last = network.layers
        self.blocks = list(zip(hidden[0::4], hidden[1::4], hidden[3::4], strict=True))
        self.saved: list[tuple[torch.Tensor, ...]] = []

    @torch.no_grad()
    def forward(self, embedded: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        """Outputs as of the network in training; batch norm's running averages stay as they are.

        Changes `embedded` in place.
        """
        mask = self.network.embedding_dropout.mask(embedded)
        x = embedded.mul_(mask)
        if numeric.shape[1]:
            x = torch.cat([x, numeric], dim=1)  # (batch, inputs)
        self.saved = [(mask,)]
        rows = len(x) * self.n_shares
        for linear, norm, dropout in self.blocks:
            # Batch norm from sums over columns: whatever the number of threads, each is summed by one.
            centred = self.product(x, linear.weight, linear.bias)  # (batch, units)
            centred -= self.total(centred.sum(dim=0)) / rows
            variance = self.total(centred.square().sum(dim=0)) / rows
            inverse = (variance + norm.eps).rsqrt_()
            y = torch.addcmul(norm.bias, centred, norm.weight * inverse)
            mask = dropout.mask(y)
            y = y.relu_().mul_(mask)
            self.saved.append((x, centred, inverse, y, mask))
            x = y
        self.saved.append((x,))
        return product(x, self.last.weight, self.last.bias)  # (batch, n_outputs)

    @torch.no_grad()
    def backward(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of all parameters from the one by the last outputs; returns those by each feature's
        vectors."""
        (x,) = self.saved.pop()
        self.last.weight.grad.copy_(product(gradient.T, x.T))
        self.last.bias.grad.copy_(gradient.sum(dim=0))
        g = product(gradient, self.last.weight.T)
        rows = len(x) * self.n_shares
        for linear, norm, _ in reversed(self.blocks):
            x, centred, inverse, y, mask = self.saved.pop()
            g = torch.ops.aten.threshold_backward(g.mul_(mask), y, 0)  # where ReLU and dropout let it through
            sums = torch.stack([(g * centred).sum(dim=0) * inverse, g.sum(dim=0)])
            norm.weight.grad.copy_(sums[0])
            norm.bias.grad.copy_(sums[1])
            along, mean = self.total(sums) / rows
            g.sub_(mean).addcmul_(centred, along * inverse, value=-1).mul_(norm.weight * inverse)
            linear.weight.grad.copy_(self.product(g.T, x.T))
            # That of linear.bias is zero and stays so: batch norm takes the mean out again.
            g = self.product(g, linear.weight.T)  # (batch, inputs)
        (mask,) = self.saved.pop()
        dims = self.network.shape.embedding_dims
        parts = zip(g[:, : mask.shape[1]].split(dims, dim=1), mask.split(dims, dim=1), strict=True)
        return [part * kept for part, kept in parts]

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the rows of the whole batch from those over the rows at hand, which are all here."""
        return sums


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, outside of autograd.

    Parameters
    ----------
    x : tensor of shape (batch, inputs)
    weight : tensor of shape (outputs, inputs)
    bias : tensor of shape (outputs,), optional
    """
    if _ONEDNN is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return _ONEDNN(x, weight, bias, "none", [], "")


def bfloat16_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `product`, of factors and with a result that are rounded to 8 bits of precision."""
    result = torch.mm(x.bfloat16(), weight.bfloat16().T).float()
    return result if bias is None else result.add_(bias)
