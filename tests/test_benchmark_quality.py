"""The benchmark of quality runs on any suite in its format: a tiny one here."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embedkit.models import MODELS

SCRIPT = Path(__file__).parents[1] / "pipelines" / "benchmark_quality.py"
sys.path.insert(0, str(SCRIPT.parent))

import benchmark_quality as benchmark  # noqa: E402

SUITE = """
[[task]]
name = "sales"
file = "rows.parquet"
where = "sales > 0"
target = "sales"
transform = "log1p"
kind = "regression"
categorical = ["shop", "town"]
numeric = ["area"]
split = "time:when"
max_rows = 150

[[task]]
name = "size"
file = "rows.csv"
target = "size"
kind = "multiclass"
categorical = ["shop", "town"]
numeric = []
split = "group:group"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    random = np.random.default_rng(0)
    shop = random.integers(6, size=240)
    rows = pd.DataFrame(
        {
            "shop": shop,
            "town": np.array(["Bonn", "Oslo", None], dtype=object)[shop % 3],
            "area": random.normal(size=240),
            "when": pd.date_range("2020-01-01", periods=240)[random.permutation(240)],
            "group": random.integers(30, size=240),
            "size": random.choice(["s", "m", "l"], 240),
        }
    )
    rows["sales"] = np.where(np.arange(240) < 40, 0, shop + random.normal(1, 0.1, 240))
    rows.loc[230:, "size"] = None
    rows.to_parquet(folder / "rows.parquet")
    rows.to_csv(folder / "rows.csv", index=False)
    (folder / "suite.toml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def tasks() -> dict[str, dict]:
    import tomllib

    return {task["name"]: task for task in tomllib.loads(SUITE)["task"]}


def test_a_split_by_time_draws_then_orders(folder: Path, tasks: dict) -> None:
    problem = benchmark.load(tasks["sales"], folder)
    rows = pd.read_parquet(folder / "rows.parquet").query("sales > 0")
    drawn = rows.sample(150, random_state=0).sort_values("when")
    assert (len(problem.X_train), len(problem.X_test)) == (112, 38)
    assert problem.X_test.index.tolist() == drawn.index[112:].tolist()
    assert set(problem.X_train.index) == set(drawn.index[:112])
    np.testing.assert_allclose(problem.y_test, np.log1p(rows.loc[problem.X_test.index, "sales"]))
    assert list(problem.X_train.columns) == ["shop", "town", "area"]


def test_a_split_by_group_has_no_group_on_both_sides(folder: Path, tasks: dict) -> None:
    problem = benchmark.load(tasks["size"], folder)
    groups = pd.read_csv(folder / "rows.csv")["group"]
    assert not set(groups[problem.X_train.index]) & set(groups[problem.X_test.index])
    assert len(problem.X_train) + len(problem.X_test) == 230  # rows without a target are dropped


def test_a_random_split_is_three_quarters_and_always_the_same(folder: Path, tasks: dict) -> None:
    first, again = (benchmark.load({**tasks["size"], "split": "random"}, folder) for _ in range(2))
    assert (len(first.X_train), len(first.X_test)) == (172, 58)
    assert first.X_train.equals(again.X_train)
    with pytest.raises(SystemExit, match="task size: split must be random, time:COLUMN or group:COLUMN"):
        benchmark.load({**tasks["size"], "split": "alphabetic"}, folder)


def test_categories_beside_vectors_are_no_rival() -> None:
    scores = made_up(0.9, 0.8, 0.01)
    beside = scores[(scores["encoding"] == "embedkit") & (scores["model"] == "lightgbm")]
    beside = beside.assign(encoding="embedkit+native", score=beside["score"] + 0.05)
    outcomes = dict(benchmark.count_wins(benchmark.summarise(pd.concat([scores, beside]))))
    assert outcomes["LightGBM: embedkit against the best other encoding"] == {"a": "win"}
    title = "LightGBM: embedkit and native categories against the best other encoding"
    assert outcomes[title] == {"a": "win"}


def made_up(score: float, rival: float, spread: float) -> pd.DataFrame:
    seeds = [
        ("a", "R2", encoding, model, value + shift, seed, 3, 1.0, 0.5, 2.0)
        for model in MODELS
        for encoding, value in (("embedkit", score), ("target", rival))
        for seed, shift in enumerate((-spread, 0.0, spread))
    ]
    columns = ["task", "metric", "encoding", "model", "score", "seed", "n_columns"]
    return pd.DataFrame(seeds, columns=[*columns, "fit_seconds", "transform_seconds", "model_seconds"])


@pytest.mark.parametrize(
    ("score", "rival", "spread", "outcome"),
    [(0.9, 0.8, 0.01, "win"), (0.8, 0.9, 0.01, "loss"), (0.9, 0.89, 0.01, "tie"), (0.9, 0.9, 0.0, "tie")],
)
def test_wins_are_counted_beyond_the_spread(score: float, rival: float, spread: float, outcome: str) -> None:
    table = benchmark.summarise(made_up(score, rival, spread))
    assert table["score"].tolist() == pytest.approx([score, rival] * 3)
    assert table["spread"].tolist() == pytest.approx([spread] * 6)
    outcomes = dict(benchmark.count_wins(table))
    assert outcomes["KNN: embedkit against the best other encoding"] == {"a": outcome}
    assert outcomes["LightGBM: embedkit against TargetEncoder"] == {"a": outcome}
    text = benchmark.as_markdown(table)
    best = max(score, rival)
    assert f"**{best:.4f}" in text
    assert "over 3 seed(s)" in text


def test_the_script_runs_a_task_and_makes_the_tables(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--suite", folder / "suite.toml", "--out", tmp_path, "--seeds", "1"]
    done = subprocess.run(
        [*map(str, command), "--threads", "1", "--task", "sales"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "quality.parquet")
    expected = {(e, m) for e in ("ordinal", "onehot", "target", "embedkit") for m in MODELS}
    found = set(zip(table["encoding"], table["model"], strict=True)) - {("catboost", "catboost")}
    boosted = {("native", "lightgbm"), ("embedkit+native", "lightgbm")}
    assert found == {*expected, *boosted, ("embedkit", "network")}
    assert np.isfinite(table["score"]).all()
    assert (tmp_path / "quality.md").read_text() in done.stdout
    wrong = subprocess.run([*map(str, command), "--task", "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "has no task x" in wrong.stderr
