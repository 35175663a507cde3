"""Losses by hand, curvature against automatic differentiation."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.learning.losses import accuracy, curvature_root, output_gradients, row_losses, squared_errors
from embedkit.learning.targets import Head

NUMBER = Head("number", "continuous")
TWO = Head("two", "binary", np.array(["no", "yes"]))
THREE = Head("three", "multiclass", np.array(["a", "b", "c"]))
ALL = (NUMBER, TWO, THREE)


def test_losses_by_hand():
    outputs = torch.tensor([[2.0, 0.0, 1.0, 1.0, 1.0]])
    targets = torch.tensor([[5.0, 1.0, 2.0]])
    expected = 0.5 * 9 + np.log(2) + np.log(3)
    torch.testing.assert_close(
        row_losses(ALL, outputs, targets), torch.tensor([expected], dtype=torch.float32)
    )
    noise = torch.tensor([0.25, 1.0, 1.0])
    expected = 0.5 * 9 / 0.25 + np.log(2) + np.log(3)
    torch.testing.assert_close(
        row_losses(ALL, outputs, targets, noise), torch.tensor([expected], dtype=torch.float32)
    )
    assert squared_errors(ALL, outputs, targets).tolist() == [[9.0, 1.0, 1.0]]


def test_accuracy_is_a_mean_over_rows_by_weight_then_over_heads():
    outputs = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 5.0, 0.0, 1.0]])
    targets = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 2.0]])
    weights = torch.tensor([3.0, 1.0])
    assert accuracy(ALL, outputs, targets, weights).item() == 0.75
    assert accuracy([TWO], outputs[:, 1:2], targets[:, 1:2], torch.ones(2)).item() == 0.5
    assert accuracy([NUMBER], outputs[:, :1], targets[:, :1], weights) is None


@pytest.mark.parametrize("heads", [(NUMBER,), (TWO,), (THREE,), ALL], ids=["number", "two", "three", "all"])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_curvature_is_the_hessian(heads, data):
    """The mean of its outer product over all signs is the Hessian of the loss by the outputs."""
    width = sum(head.n_outputs for head in heads)
    row = torch.tensor(
        [data.draw(st.lists(st.floats(-3, 3), min_size=width, max_size=width))], dtype=torch.float64
    )
    targets = torch.tensor([[1.0] * len(heads)], dtype=torch.float64)
    noise = torch.linspace(0.3, 1, len(heads), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: row_losses(heads, x, targets, noise).sum(), row)[
        0, :, 0
    ]
    mean = torch.zeros(width, width, dtype=torch.float64)
    for signs in itertools.product([-1.0, 1.0], repeat=width):
        root = curvature_root(heads, row, noise, torch.tensor([signs], dtype=torch.float64))
        mean += root.T @ root / 2**width
    torch.testing.assert_close(mean, hessian, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("heads", [(NUMBER,), (TWO,), (THREE,), ALL], ids=["number", "two", "three", "all"])
def test_gradients_are_those_of_autograd(heads):
    generator = torch.Generator().manual_seed(0)
    width = sum(head.n_outputs for head in heads)
    outputs = torch.randn(6, width, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 2, (6, len(heads)), generator=generator).double()
    noise = torch.linspace(0.3, 1, len(heads), dtype=torch.float64)
    row_losses(heads, outputs, targets, noise).sum().backward()
    torch.testing.assert_close(output_gradients(heads, outputs.detach(), targets, noise), outputs.grad)
