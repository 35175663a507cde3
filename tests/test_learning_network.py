"""The network: widths of tables, what an untrained one says, weights out and in."""

import numpy as np
import pytest
import torch

from embedkit import InputError
from embedkit.learning.learned import NetworkShape
from embedkit.learning.network import (
    Dropout,
    EntityEmbeddingNetwork,
    build,
    embedding_dims,
    predict,
    weights_of,
)

SHAPE = NetworkShape((5, 4), (3, 2), 1, (6,), 2)


def test_widths_by_rule_number_dict_and_callable():
    features, rows = ["a", "b"], [7, 10_000]
    assert embedding_dims(features, rows, "auto") == (5, 50)  # 1.6 * 7 ** 0.56 = 4.76
    assert embedding_dims(features, [7, 10_000_002], "auto") == (5, 6)  # 60 million numbers
    assert embedding_dims(features, [7, 10**9], "auto") == (5, 1)
    assert embedding_dims(features, rows, 3) == (3, 3)
    assert embedding_dims(features, rows, {"b": np.int64(4)}) == (5, 4)
    assert embedding_dims(features, rows, {"a": "auto", "b": 1}) == (5, 1)
    assert embedding_dims(features, rows, lambda n: n // 7) == (1, 1428)


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        (0, "'a'.*got 0"),
        (2.5, "got 2.5"),
        (True, "got True"),
        ("big", "got 'big'"),
        ({"c": 2}, r"names \['c'\]"),
    ],
)
def test_bad_widths(dim, message):
    with pytest.raises(InputError, match=message):
        embedding_dims(["a", "b"], [7, 8], dim)


def test_categories_start_where_the_prior_is():
    network = EntityEmbeddingNetwork(SHAPE)
    assert all(not table.any() and not table.requires_grad for table in network.tables)
    outputs = predict(network.double().eval(), np.array([[0, 0], [4, 3]], dtype=np.int32), np.zeros((2, 1)))
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_lookup_and_forward_by_hand():
    network = EntityEmbeddingNetwork(NetworkShape((2, 2), (1, 2), 1, (), 1)).eval()
    network.tables[0].copy_(torch.tensor([[1.0], [2.0]]))
    network.tables[1].copy_(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    embedded = network.lookup(torch.tensor([[1, 0], [0, 1]]))
    assert embedded.tolist() == [[2, 3, 4], [1, 5, 6]]
    with torch.no_grad():
        network.layers[0].weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
        network.layers[0].bias.fill_(0.5)
        assert network(embedded, torch.tensor([[7.0], [0.0]])).tolist() == [[7432.5], [651.5]]


def test_weights_build_the_same_network_and_batches_do_not_matter():
    torch.manual_seed(0)
    network = EntityEmbeddingNetwork(SHAPE)
    for table in network.tables:
        table.normal_()
    weights = weights_of(network)
    assert all(array.dtype.kind in "fi" for array in weights.values())
    rng = np.random.default_rng(0)
    codes = np.column_stack([rng.integers(0, 5, 50), rng.integers(0, 4, 50)]).astype(np.int32)
    numeric = rng.normal(size=(50, 1)).astype(np.float32)
    outputs = predict(build(SHAPE, weights), codes, numeric)
    with torch.no_grad():
        direct = network.eval()(network.lookup(torch.tensor(codes)), torch.tensor(numeric)).numpy()
    np.testing.assert_allclose(outputs, direct, rtol=1e-4, atol=1e-6)
    one_by_one = predict(build(SHAPE, weights), codes, numeric, batch_size=1)
    np.testing.assert_allclose(one_by_one, outputs, rtol=1e-12)


def test_the_weights_are_copies():
    network = EntityEmbeddingNetwork(SHAPE)
    weights = weights_of(network)
    network.tables[0].fill_(1.0)
    assert not weights["tables.0"].any()


@pytest.mark.parametrize(("p", "rounded"), [(0.0, 0), (1e-4, 1), (0.1, 26), (0.25, 64), (0.9999, 255)])
def test_dropout_drops_its_share_and_keeps_the_mean(p, rounded):
    torch.manual_seed(0)
    x = torch.full((401, 501), 3.0)
    dropout = Dropout(p)
    dropped = dropout(x)
    share = rounded / 256
    np.testing.assert_allclose((dropped == 0).float().mean(), share, atol=4 * (share / x.numel()) ** 0.5)
    np.testing.assert_allclose(dropped[dropped != 0], 3 / (1 - share), rtol=1e-6)
    assert dropout.eval()(x) is x
