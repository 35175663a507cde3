"""Canonical axes against a naive reference, and how much of them is signal."""

import numpy as np
import pandas as pd
import pytest
import torch

from embedkit import EntityEmbeddingClassifier, EntityEmbeddingEncoder, EntityEmbeddingRegressor
from embedkit.learning.axes import canonical_tables, fill_untrained, first_layer_blocks
from embedkit.learning.data import make_rows
from embedkit.learning.learned import NetworkShape
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.targets import Head

NUMBER = Head("y", "continuous")


def random_network(hidden=(7,), dims=(3, 9)):
    """Two tables, of 6 and 4 rows, and 2 numbers; everything random."""
    torch.manual_seed(0)
    network = EntityEmbeddingNetwork(NetworkShape((6, 4), dims, 2, hidden, 1))
    with torch.no_grad():
        for part in (*network.tables, *network.parameters()):
            part.normal_()
        for layer in network.layers:
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    return network.eval()


def canonical(network, counts):
    rng = np.random.default_rng(0)
    codes = np.column_stack([rng.choice(len(c), 300, p=c / c.sum()) for c in counts]).astype(np.int32)
    rows = make_rows(codes, rng.normal(size=(300, 2)).astype("f4"), rng.normal(size=(300, 1)), np.ones(300))
    seen = [np.bincount(codes[:, i], minlength=len(c)) for i, c in enumerate(counts)]
    tables = canonical_tables(
        network,
        [NUMBER],
        rows,
        counts=seen,
        priors=[0.01, 0.01],
        noise=torch.ones(1),
        generator=torch.Generator(),
    )
    return tables, seen


@pytest.mark.parametrize("hidden", [(7,), ()], ids=["with batch norm", "without layers"])
def test_distances_are_those_of_the_first_layer(hidden):
    network = random_network(hidden)
    tables, counts = canonical(network, [np.array([0, 1, 5, 9, 2, 3.0]), np.array([2, 0, 3, 4.0])])
    start = 0
    for i, (table, seen) in enumerate(zip(tables, counts, strict=True)):
        weights, dim = seen / seen.sum(), network.shape.embedding_dims[i]

        def first_layer(vector, start=start, dim=dim):
            """Units of the first layer, batch norm applied, where only this table says something."""
            row = torch.zeros(1, 14)
            row[0, start : start + dim] = vector
            return network.layers[: 2 if hidden else 1](row)[0].detach().numpy()

        units = np.array([first_layer(vector) for vector in network.tables[i]])
        found = np.linalg.norm(table.vectors[:, None] - table.vectors[None], axis=2)
        np.testing.assert_allclose(
            found, np.linalg.norm(units[:, None] - units[None], axis=2), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(weights @ table.vectors, 0, atol=1e-5)
        covariance = (table.vectors * weights[:, None]).T @ table.vectors
        variances = np.diag(covariance)
        np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-4 * variances.max())
        assert (np.diff(variances) <= 1e-5 * variances.max()).all()
        np.testing.assert_allclose(table.share, variances / variances.sum(), atol=1e-5)
        top = (weights[:, None] * table.vectors**2).argmax(axis=0)
        assert (table.vectors[top, range(dim)] >= -1e-5).all()
        start += dim


def test_first_layer_blocks_are_its_weights_with_batch_norm_folded_in():
    network = random_network()
    linear, norm = network.layers[0], network.layers[1]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    blocks = first_layer_blocks(network)
    assert [block.shape[1] for block in blocks] == [3, 9, 2]
    torch.testing.assert_close(torch.cat(blocks, dim=1), linear.weight.detach().double() * scale[:, None])


def test_rows_that_nothing_trained_get_the_mean_of_the_data():
    network = EntityEmbeddingNetwork(NetworkShape((4,), (1,), 0, (), 1))
    network.tables[0].copy_(torch.tensor([[9.0], [5.0], [1.0], [3.0]]))
    fill_untrained(network, [np.array([0, 0, 1, 3])], [np.array([0, 2, 1, 3])])
    assert network.tables[0][:, 0].tolist() == [2.5, 5.0, 1.0, 3.0]
    fill_untrained(network, [np.array([0, 0, 1, 3])], [np.array([0, 0, 1, 3])])
    assert network.tables[0][:, 0].tolist() == [2.5, 2.5, 1.0, 3.0]


@pytest.fixture(scope="module")
def signal_and_noise():
    """20 categories that say much about y, 20 that say nothing."""
    rng = np.random.default_rng(0)
    strong, noise = rng.integers(0, 20, 3000), rng.integers(0, 20, 3000)
    effect = rng.normal(size=20)
    X = pd.DataFrame({"strong": strong.astype(str), "noise": noise.astype(str)})
    return X, effect[strong] + rng.normal(0, 0.5, 3000)


SETTINGS = {"hidden_layer_sizes": (32,), "max_epochs": 6, "max_lr": 0.02, "random_state": 0}


@pytest.mark.parametrize("kind", [EntityEmbeddingRegressor, EntityEmbeddingClassifier])
def test_signal_is_reliable_and_noise_is_not(signal_and_noise, kind):
    X, y = signal_and_noise
    model = kind(**SETTINGS).fit(X, y if kind is EntityEmbeddingRegressor else y > 0)
    assert model.axes_["strong"]["reliability"][0] > 0.9
    assert model.axes_["noise"]["reliability"].max() < 0.6
    assert model.embeddings_["strong"].vectors.any()


def test_a_column_without_a_reliable_axis_comes_out_as_zero(signal_and_noise):
    X, y = signal_and_noise
    noise = EntityEmbeddingRegressor(min_reliability=0.8, **SETTINGS).fit(X, y).embeddings_["noise"]
    assert noise.embedding_dim == 1
    assert not noise.vectors.any()


def test_the_published_width(signal_and_noise):
    X, y = signal_and_noise
    auto = EntityEmbeddingEncoder(**SETTINGS).fit(X, y)
    axes = auto.axes_["strong"]
    assert len(axes["reliability"]) == 9  # 1.6 * 22 ** 0.56
    best, second = np.sort(axes["reliability"])[:-3:-1]
    assert best > second > auto.min_reliability
    for limit in (auto.min_reliability, second, (second + best) / 2, best, (best + 1) / 2):
        table = EntityEmbeddingEncoder(min_reliability=limit, **SETTINGS).fit(X, y).embeddings_["strong"]
        kept = axes["reliability"] >= limit
        assert table.embedding_dim - table.ranked == max(kept.sum(), 1)
        assert table.vectors.any() == kept.any()
    fixed = EntityEmbeddingEncoder(embedding_dim={"noise": 3, "strong": "auto"}, **SETTINGS).fit(X, y)
    assert fixed.embeddings_["noise"].embedding_dim == 3
    assert fixed.embeddings_["noise"].vectors.any()
    assert fixed.embeddings_["strong"].embedding_dim < 9
    assert EntityEmbeddingEncoder(embedding_dim=30, **SETTINGS).fit(X, y).embeddings_.width == 60
