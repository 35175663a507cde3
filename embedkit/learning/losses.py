"""Loss, metrics and curvature of the heads, on torch tensors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from embedkit.learning.targets import Head

# A fit that explains more than this share of a target's variance is not trusted to be that good.
MIN_NOISE = 0.05


def row_losses(
    heads: Sequence[Head], outputs: torch.Tensor, targets: torch.Tensor, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss of each row, summed over heads: cross-entropy (natural logarithm) of classes, half the squared
    error of standardised numbers.

    Parameters
    ----------
    heads : sequence of Head
    outputs : tensor of shape (batch, sum of n_outputs)
    targets : tensor of shape (batch, n_heads)
        From `Head.encode`.
    noise : tensor of shape (n_heads,), optional
        Residual variance of each continuous target. With it the squared errors are in units of the noise,
        as in the Gaussian likelihood, so that the tables' prior weighs the same against every target.

    Returns
    -------
    tensor of shape (batch,)
    """
    losses = []
    for i, (head, part) in enumerate(zip(heads, split(heads, outputs), strict=True)):
        if head.kind == "continuous":
            error = 0.5 * (part[:, 0] - targets[:, i]).square()
            losses.append(error if noise is None else error / noise[i])
        elif head.kind == "binary":
            losses.append(F.binary_cross_entropy_with_logits(part[:, 0], targets[:, i], reduction="none"))
        else:
            losses.append(F.cross_entropy(part, targets[:, i].long(), reduction="none"))
    return torch.stack(losses).sum(dim=0)  # (batch,)


def output_gradients(
    heads: Sequence[Head], outputs: torch.Tensor, targets: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Gradient of each row's loss in `row_losses` by the row's outputs, shape (batch, sum of n_outputs)."""
    parts = []
    for i, (head, part) in enumerate(zip(heads, split(heads, outputs), strict=True)):
        if head.kind == "continuous":
            parts.append((part - targets[:, i : i + 1]) / noise[i])
        elif head.kind == "binary":
            parts.append(torch.sigmoid(part) - targets[:, i : i + 1])
        else:
            parts.append(torch.softmax(part, dim=1) - F.one_hot(targets[:, i].long(), head.n_outputs))
    return torch.cat(parts, dim=1)


def squared_errors(heads: Sequence[Head], outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error of each row under each continuous head, 1 under the others, shape (batch, n_heads)."""
    ones = torch.ones(len(outputs), device=outputs.device)
    parts = zip(heads, split(heads, outputs), targets.unbind(dim=1), strict=True)
    return torch.stack(
        [(part[:, 0] - y).square() if head.kind == "continuous" else ones for head, part, y in parts], dim=1
    )


def accuracy(
    heads: Sequence[Head], outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor | None:
    """Weighted fraction of rows whose class is right, mean over the heads with classes; None without one."""
    hits = []
    for i, (head, part) in enumerate(zip(heads, split(heads, outputs), strict=True)):
        if head.kind != "continuous":
            guess = (part[:, 0] > 0) if head.kind == "binary" else part.argmax(dim=1)
            hits.append(((guess == targets[:, i]) * weights).sum() / weights.sum())
    return torch.stack(hits).mean() if hits else None


def curvature_root(
    heads: Sequence[Head], outputs: torch.Tensor, noise: torch.Tensor, signs: torch.Tensor
) -> torch.Tensor:
    """A root of the Hessian of `row_losses` by the outputs, times random signs.

    With ``H = L L'`` the Hessian of a row, the outer product of ``L signs`` has mean ``H``; for a head with
    one output it is ``H`` itself.

    Parameters
    ----------
    heads : sequence of Head
    outputs, signs : tensor of shape (batch, sum of n_outputs)
        Outputs of the network; independent signs, +1 or -1.
    noise : tensor of shape (n_heads,)
        As in `row_losses`.
    """
    parts = []
    pairs = zip(heads, split(heads, outputs), split(heads, signs), strict=True)
    for i, (head, part, sign) in enumerate(pairs):
        if head.kind == "continuous":
            parts.append(sign / noise[i].sqrt())
        elif head.kind == "binary":
            p = torch.sigmoid(part)
            parts.append((p * (1 - p)).sqrt() * sign)
        else:
            p = torch.softmax(part, dim=1)  # H = diag(p) - p p', L = diag(sqrt p) - p sqrt(p)'
            parts.append(p.sqrt() * sign - p * (p.sqrt() * sign).sum(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)  # (batch, sum of n_outputs)


def split(heads: Sequence[Head], outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The columns of each head."""
    return outputs.split([head.n_outputs for head in heads], dim=1)
