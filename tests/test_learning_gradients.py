"""Gradients that are written out, against autograd's."""

import pytest
import torch

from embedkit.learning import gradients
from embedkit.learning.gradients import LayerGradients, bfloat16_product, product
from embedkit.learning.learned import NetworkShape
from embedkit.learning.network import EntityEmbeddingNetwork


def network_of(sizes, n_numeric, dropout):
    torch.manual_seed(0)
    network = EntityEmbeddingNetwork(
        NetworkShape((9, 4), (3, 2), n_numeric, sizes, 3), dropout, dropout
    ).double()
    for parameter in network.layers.parameters():  # batch norm's would start at 1 and 0
        parameter.data.normal_()
    return network.train()


@pytest.mark.parametrize("sizes", [(), (7,), (7, 6)])
@pytest.mark.parametrize("n_numeric", [0, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_autograd(sizes, n_numeric, dropout):
    network = network_of(sizes, n_numeric, dropout)
    embedded, numeric = torch.randn(32, 5).double(), torch.randn(32, n_numeric).double()
    slope = torch.randn(32, 3).double()
    embedded.requires_grad_()
    torch.manual_seed(1)
    expected = network(embedded, numeric)
    expected.backward(slope)
    by_autograd = [parameter.grad.clone() for parameter in network.layers.parameters()]

    layers = LayerGradients(network)
    torch.manual_seed(1)  # the same dropout
    outputs = layers.forward(embedded.detach().clone(), numeric)
    torch.testing.assert_close(outputs, expected.detach())
    by_feature = layers.backward(slope)
    torch.testing.assert_close(torch.cat(by_feature, dim=1), embedded.grad)
    assert [part.shape[1] for part in by_feature] == [3, 2]
    torch.testing.assert_close(layers.gradient, torch.cat([part.flatten() for part in by_autograd]))


def test_one_tensor_holds_all_parameters():
    network = network_of((7,), 1, 0.0)
    before = [parameter.detach().clone() for parameter in network.layers.parameters()]
    layers = LayerGradients(network)
    layers.parameters += 1
    for old, new in zip(before, network.layers.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old + 1)
    assert layers.parameters.numel() == sum(old.numel() for old in before)


@pytest.mark.parametrize("with_onednn", [True, False])
def test_products(with_onednn, monkeypatch):
    if not with_onednn:
        monkeypatch.setattr(gradients, "_ONEDNN", None)
    x, weight, bias = torch.randn(20, 6), torch.randn(4, 6), torch.randn(4)
    torch.testing.assert_close(product(x, weight, bias), x @ weight.T + bias)
    torch.testing.assert_close(product(x, weight), x @ weight.T)
    wide = torch.randn(20, 8)  # columns of a wider tensor, and transposed ones
    torch.testing.assert_close(product(wide.T, x.T), wide.T @ x)
    torch.testing.assert_close(product(wide[:, :6], weight), wide[:, :6] @ weight.T)
    assert product(x[:0], weight).shape == (0, 4)


def test_bfloat16_rounds_factors_and_results_but_no_sums():
    x, weight, bias = torch.rand(6, 1024), torch.rand(4, 1024), torch.rand(4)
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    for found, expected in (
        (bfloat16_product(x, weight), exact),
        (bfloat16_product(x, weight, bias), exact + bias),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)


def test_gradients_in_bfloat16_are_close():
    network = network_of((40, 30), 2, 0.0).float()
    embedded, numeric, slope = torch.randn(512, 5), torch.randn(512, 2), torch.randn(512, 3)
    found = []
    for precision in ("float32", "bfloat16"):
        layers = LayerGradients(network, precision)
        outputs = layers.forward(embedded.clone(), numeric)
        found.append((outputs, torch.cat(layers.backward(slope), dim=1), layers.gradient.clone()))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        error = float((rounded - exact).norm() / exact.norm())
        assert 1e-5 < error < 0.1  # 8 bits, and ReLUs that open on the other side of zero
