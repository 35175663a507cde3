"""The ablation runs on any suite in the format of the benchmark of quality: a tiny one here."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

import ablation
from benchmark_quality import load

SUITE = """
[[task]]
name = "sales"
file = "rows.parquet"
target = "sales"
kind = "regression"
categorical = ["shop", "town"]
numeric = ["area"]
split = "random"

[[task]]
name = "busy"
file = "rows.parquet"
target = "busy"
kind = "binary"
categorical = ["shop", "town"]
numeric = []
split = "random"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    random = np.random.default_rng(0)
    shop = random.integers(8, size=600)
    rows = pd.DataFrame({"shop": shop, "area": random.normal(size=600)})
    rows["town"] = np.array(["Bonn", "Oslo", "Rome"])[shop % 3]
    rows["sales"] = shop * 1.5 + rows["area"] + random.normal(0, 0.1, 600)
    rows["busy"] = random.uniform(size=600) < np.where(shop % 4 == 1, 0.9, 0.2)
    rows.to_parquet(folder / "rows.parquet")
    (folder / "suite.toml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def sales(folder: Path) -> ablation.Problem:
    return ablation.draw(load(tomllib.loads(SUITE)["task"][0], folder), 300)


def test_the_plain_recipe_learns_and_unknown_is_the_mean(sales: ablation.Problem) -> None:
    estimator, train = ablation.learn(ablation.STEPS[0], sales, seed=0)
    assert ablation.score_of(estimator, sales.X_test, sales) > 0.8
    assert train.shape == (300, estimator.embeddings_.width)
    for i, (name, table) in enumerate(estimator.embeddings_.items()):
        np.testing.assert_array_equal(table.vectors, estimator._learned.weights[f"tables.{i}"])
        mean = table.transform(sales.X_train[name]).mean(axis=0)
        np.testing.assert_allclose(table.vector("nowhere" if name == "town" else -1), mean, atol=1e-6)
    assert train[:, -1].mean() == pytest.approx(0, abs=1e-6)  # numbers are standardised
    assert train[:, -1].std() == pytest.approx(1, abs=1e-6)


def test_embedkits_network_predicts_what_the_plain_one_does(sales: ablation.Problem) -> None:
    estimator, _ = ablation.learn(ablation.STEPS[0], sales, seed=0)
    task = estimator._task(sales.X_train, sales.y_train, None)
    settings = task.settings
    preparation = ablation.prepare(task)
    training = ablation.PlainTraining(preparation, settings)
    weights = estimator._learned.weights
    state = training.network.state_dict()
    names = {name: name.removesuffix(".weight") if name.startswith("tables") else name for name in state}
    training.network.load_state_dict({name: torch.tensor(weights[names[name]]) for name in state})
    training.network.eval()
    with torch.no_grad():
        outputs = training.network(training.rows.codes, training.rows.numeric)
    expected = preparation.heads[0].decode(outputs.double().numpy())
    np.testing.assert_allclose(np.sort(estimator.predict(sales.X_train)), np.sort(expected), atol=1e-4)


def test_the_range_test_leaves_the_plain_training_as_it_was(sales: ablation.Problem) -> None:
    estimator = ablation.EntityEmbeddingRegressor(sales.categorical, random_state=0, device="cpu")
    task = estimator._task(sales.X_train, sales.y_train, None)
    settings = task.settings
    losses = []
    for tested in (False, True):
        torch.manual_seed(0)
        preparation = ablation.prepare(task)
        training = ablation.PlainTraining(preparation, settings)
        training.step(0.01)
        if tested:
            ablation.range_test(ablation.replace(preparation, trainer=training), settings)
        losses.append([training.step(0.01)[0] for _ in range(20)])
    assert losses[0] == losses[1]


def test_every_step_is_scored_on_the_same_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["ablation", "--suite", folder / "suite.toml", "--rows", 200, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    ablation.main()
    scores = pd.read_parquet(tmp_path / "ablation.parquet")
    steps = [step.title for step in ablation.STEPS]
    models = ["network", "knn", "forest", "lightgbm"]
    expected = [(task, step, model) for task in ("sales", "busy") for step in steps for model in models]
    assert list(zip(scores["task"], scores["step"], scores["model"], strict=True)) == expected
    assert scores["score"].between(0.5, 1).all()
    networks = scores[scores["model"] == "network"].pivot(index="step", columns="task", values="score")
    # What is handed out changes nothing of the network.
    assert networks.loc["+ trained unknown"].equals(networks.loc["+ canonical axes"])
    text = (tmp_path / "ablation.md").read_text()
    said = capsys.readouterr().out
    assert text in said
    assert said.count("200 rows to learn from, 150 to be judged on") == 2
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--task", "x"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert "has no task x" in capsys.readouterr().err
