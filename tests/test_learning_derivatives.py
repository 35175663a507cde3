"""Derivatives by vectors, against automatic differentiation."""

import numpy as np
import pytest
import torch

from embedkit.learning import derivatives as module
from embedkit.learning.axes import _second_order
from embedkit.learning.data import Rows
from embedkit.learning.derivatives import add_up, derivatives, folded_layers
from embedkit.learning.learned import NetworkShape
from embedkit.learning.losses import row_losses
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.targets import Head
from embedkit.learning.threads import WIDE_VECTORS, ThreadChoice

NUMBER = Head("number", "continuous")
TWO = Head("two", "binary", np.array(["no", "yes"]))
THREE = Head("three", "multiclass", np.array(["a", "b", "c"]))
DIMS, AXES = (3, 5), (2, 4)


def trained_network(n_outputs, hidden):
    """With everything that training would change set at random."""
    torch.manual_seed(0)
    network = EntityEmbeddingNetwork(NetworkShape((6, 9), DIMS, 2, hidden, n_outputs), dropout=0.5)
    for table in network.tables:
        table.copy_(torch.randn(table.shape))
    for layer in network.layers:
        if isinstance(layer, torch.nn.BatchNorm1d):
            with torch.no_grad():
                for part in (layer.weight, layer.bias, layer.running_mean):
                    part.copy_(torch.randn(part.shape))
                layer.running_var.copy_(torch.rand(layer.running_var.shape) + 0.1)
    return network.eval()


def random_rows(n, n_targets):
    codes = torch.stack([torch.randint(6, (n,)), torch.randint(9, (n,))], dim=1).int()
    return Rows(codes, torch.randn(n, 2), torch.randint(0, 2, (n, n_targets)).float(), torch.rand(n) + 0.1)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 4)], ids=["linear", "one layer", "two layers"])
@pytest.mark.parametrize("heads", [(NUMBER,), (TWO,), (NUMBER, TWO, THREE)], ids=["number", "two", "all"])
def test_gradients_are_those_of_autograd_on_the_axes(heads, hidden, monkeypatch):
    monkeypatch.setattr(module, "PASS_BATCH", 16)  # so that several batches make a pass
    network = trained_network(sum(head.n_outputs for head in heads), hidden)
    rows, noise = random_rows(40, len(heads)), torch.linspace(0.3, 1, len(heads))
    inverses = [torch.randn(n, dim, dtype=torch.float64) for n, dim in zip(AXES, DIMS, strict=True)]

    embedded = network.lookup(rows.codes).requires_grad_()
    losses = row_losses(heads, network(embedded, rows.numeric), rows.targets, noise)
    (exact,) = torch.autograd.grad((losses * rows.weights.sqrt()).sum(), embedded)

    batches = list(derivatives(network, heads, rows, inverses, noise, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch, _ in batches] == [16, 16, 8]
    for i, (part, inverse) in enumerate(zip(exact.split(DIMS, dim=1), inverses, strict=True)):
        found = torch.cat([parts[i].gradient for _, parts in batches])
        torch.testing.assert_close(found, part @ inverse.T.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [NUMBER, TWO], ids=["number", "two"])
def test_the_root_of_one_output_makes_its_gauss_newton_curvature(head):
    network = trained_network(1, (7, 4))
    rows, noise = random_rows(20, 1), torch.tensor([0.4])
    embedded = network.lookup(rows.codes).requires_grad_()
    outputs = network(embedded, rows.numeric)
    (jacobian,) = torch.autograd.grad(outputs.sum(), embedded)
    p = torch.sigmoid(outputs.detach()[:, 0])
    curvature = torch.full((20,), 1 / 0.4) if head is NUMBER else p * (1 - p)
    inverses = [torch.eye(dim) for dim in DIMS]
    ((_, parts),) = derivatives(network, [head], rows, inverses, noise, torch.Generator().manual_seed(0))
    for part, way in zip(parts, jacobian.split(DIMS, dim=1), strict=True):
        (root,) = part.roots
        exact = (rows.weights * curvature)[:, None, None] * way[:, :, None] * way[:, None, :]
        torch.testing.assert_close(root[:, :, None] * root[:, None, :], exact, rtol=1e-3, atol=1e-4)


def test_folded_layers_give_the_outputs():
    network = trained_network(2, (7, 4))
    rows = random_rows(5, 1)
    x = torch.cat([network.lookup(rows.codes), rows.numeric], dim=1).double()
    *hidden, (weight, bias) = folded_layers(network)
    for units, shift in hidden:
        x = torch.relu(x @ units.T + shift)
    torch.testing.assert_close(
        (x @ weight.T + bias).float(), network(network.lookup(rows.codes), rows.numeric), rtol=1e-4, atol=1e-4
    )


def test_roots_of_several_outputs_make_the_curvature_by_the_vectors():
    torch.manual_seed(0)
    network = EntityEmbeddingNetwork(NetworkShape((4,), (3,), 0, (), 3)).eval()
    network.tables[0].copy_(torch.randn(4, 3))
    n = 20_000  # draws
    same = Rows(
        torch.full((n, 1), 2, dtype=torch.int32), torch.zeros(n, 0), torch.ones(n, 1), torch.full((n,), 2.0)
    )
    found = torch.zeros(3, 3)
    noise, draws = torch.ones(1), torch.Generator().manual_seed(0)
    for _, (part,) in derivatives(network, [THREE], same, [torch.eye(3)], noise, draws):
        found += sum(root.T @ root for root in part.roots).detach() / n

    def loss(vector):
        return 2.0 * row_losses([THREE], network(vector[None], torch.zeros(1, 0)), torch.ones(1, 1)).sum()

    exact = torch.autograd.functional.hessian(loss, network.tables[0][2])
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.01)


@pytest.mark.skipif(not WIDE_VECTORS, reason="this processor's passes always take all threads")
@pytest.mark.parametrize("heads", [(NUMBER,), (NUMBER, TWO, THREE)], ids=["number", "all"])
def test_a_pass_is_the_same_on_any_number_of_threads(heads, monkeypatch):
    torch.manual_seed(0)
    n_outputs = sum(head.n_outputs for head in heads)
    sizes, dims, axes = (300, 40, 2000), (17, 5, 60), (9, 5, 40)
    network = EntityEmbeddingNetwork(NetworkShape(sizes, dims, 3, (200, 150), n_outputs)).eval()
    codes = torch.stack([torch.randint(size, (3_000,)) for size in sizes], dim=1).int()
    targets = torch.randint(0, 2, (3_000, len(heads))).float()
    rows = Rows(codes, torch.randn(3_000, 3), targets, torch.rand(3_000) + 0.1)
    inverses = [torch.randn(n, dim, dtype=torch.float64) for n, dim in zip(axes, dims, strict=True)]
    measured = [torch.arange(size) for size in sizes]
    monkeypatch.setattr(module.ThreadChoice, "for_batches", lambda *_: ThreadChoice(1))  # as torch has it
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            noise, draws = torch.ones(len(heads)), torch.Generator().manual_seed(0)
            sums = _second_order(network, heads, rows, inverses, measured, noise, draws)
            found.append([part.numpy().tobytes() for kind in sums for part in kind])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(not WIDE_VECTORS, reason="this processor's passes always take all threads")
def test_a_pass_tries_one_thread_first():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        batches = [(random_rows(3, 1), []), (random_rows(2, 1), [])]
        add_up(
            iter(batches), lambda *found: seen.append((found, torch.get_num_threads())), torch.device("cpu")
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [found for found, _ in seen] == batches
    assert [threads for _, threads in seen] == [1, 1]
