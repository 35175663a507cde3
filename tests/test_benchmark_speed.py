"""The benchmark of speed runs: small sizes, and a peer that is not there."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parents[1] / "pipelines" / "benchmark_speed.py"
sys.path.insert(0, str(SCRIPT.parent))

import benchmark_speed as benchmark  # noqa: E402
import benchmark_speed_ours as ours  # noqa: E402
import benchmark_speed_peers as peers  # noqa: E402

JOB = {**benchmark.NETWORK, "batch_size": 64, "layers": [16], "epochs": 4, "lr": 0.01, "precision": "float32"}


@pytest.fixture
def runner(tmp_path: Path) -> benchmark.Runner:
    return benchmark.Runner(tmp_path, {}, threads=1)


@pytest.fixture(params=[False, True], ids=["number", "class"])
def job(request: pytest.FixtureRequest, runner: benchmark.Runner) -> dict[str, object]:
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"a": random.integers(5, size=1500), "b": random.integers(40, size=1500)}).astype(
        str
    )
    y = frame["a"].astype(float) - 2 + random.normal(size=1500) / 4
    y = (y > 0) if request.param else y / y.std()
    return {**JOB, **runner.split(frame.assign(y=y), 300), "binary": request.param}


@pytest.mark.parametrize("train", [ours.training, lambda job: peers.run_torch(peers.Job(job))])
def test_a_job_is_learned_and_timed(job, train):
    found = train(job)
    seconds, losses = np.array(found["curve"]).T
    assert len(seconds) == 4
    assert found["prepared"] > 0
    assert (np.diff(seconds, prepend=0) > 0).all()
    without = np.log(2) if job["binary"] else 1.0  # of the mean
    assert losses[-1] < 0.6 * without


def test_both_train_the_same_network(job):
    assert peers.Job(job).tables() == {"a": (7, 5), "b": (42, 13)}
    trainer = ours.make_trainer(ours.made_rows([5, 40], 200), [7, 42], layers=[16])
    assert trainer.network.shape.embedding_dims == (5, 13)


def test_a_whole_fit_is_timed_with_its_loss(job):
    found = ours.quality({**job, "epochs": [1, 2]})
    assert len(found["curve"]) == 2
    assert found["curve"][1][1] < (np.log(2) if job["binary"] else 1.0)


@pytest.mark.skipif(importlib.util.find_spec("fastai") is not None, reason="fastai is there")
def test_a_peer_that_is_not_there_is_left_out_and_named(runner):
    job = {**JOB, **runner.split(benchmark.made_up(50), 10), "binary": False}
    for _ in range(2):
        assert runner.run("fastai", job) is None
    assert runner.left_out == {"fastai": "ModuleNotFoundError: No module named 'fastai'"}
    report = benchmark.as_markdown({}, 1, runner.left_out)
    assert "fastai was left out: `ModuleNotFoundError" in report


def test_lookups_and_what_bounds_them():
    table = pd.DataFrame(ours.transform(200, 1)).set_index("way")
    assert (table["rows_per_second"] > 0).all()
    assert set(table["columns"]) == {83}


def test_growth_has_four_curves_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "steps_per_second", lambda trainer: (float(trainer.rows.codes.shape[1]), 100.0))
    table = pd.DataFrame(ours.growth(1000))
    assert table.groupby("growing", sort=False).size().to_dict() == {
        "cardinality": 2,
        "columns": 6,
        "width": 6,
    }
    assert table.loc[table["growing"] == "columns", "rows_per_second"].tolist() == [2, 4, 8, 16, 32, 64]
    benchmark.plot_growth(table, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_steps_and_floor_are_rates():
    rate, bare = ours.steps_per_second(ours.make_trainer(ours.made_rows([9], 128), [11], batch_size=32), 2, 1)
    assert min(rate, bare) > 0


def test_training_counts_the_fastest_epoch_of_each(runner, monkeypatch):
    answers = {
        "fastai": [(2.0, 0.5), (3.0, 0.4)],
        "embedkit": [(0.5, 0.5), (0.75, 0.3)],
        "embedkit, bfloat16": [(0.5, 0.5), (0.625, 0.3)],
    }

    def run(name, job, ours=None):
        assert (ours == "training") == name.startswith("embedkit")
        assert (job.get("precision") == "bfloat16") == ("bfloat16" in name)
        return {"prepared": 0.1, "curve": answers[name]} if name in answers else None

    monkeypatch.setattr(runner, "run", run)
    table = benchmark.training(runner, 1024, 2, 1)
    rates = table.set_index("who")["rows_per_second"]
    assert (rates["fastai"], rates["embedkit"]) == (1024, 4096)
    text = benchmark.as_markdown({"training": table}, 1, {})
    assert "| embedkit | 4,096 | 0.1000 | 0.3000 | 4.0000 |" in text
    assert "| embedkit, bfloat16 | 8,192 | 0.1000 | 0.3000 |  |" in text, "its rivals are in float32"


def test_what_is_chosen_is_measured_at_sizes_up_to_the_one_asked_for(runner, monkeypatch):
    monkeypatch.setattr(
        runner, "run", lambda name, job, ours: {"fit": float(len(pd.read_parquet(job["train"])))}
    )
    table = benchmark.automatic(runner, 6_000, 1)
    assert table["rows"].tolist() == table["fit"].tolist() == [5_000, 6_000]


def test_the_ways_to_fit_are_timed(runner):
    table = benchmark.load_flights()[["origin", "dest", "late"]][:200].rename(columns={"late": "y"})
    found = ours.automatic({**runner.split(table, 0), "binary": True, "repeats": 1})
    assert list(found) == ["fit, rate given", "fit", "fit_transform"]
    assert min(found.values()) > 0


def test_time_to_quality(runner, monkeypatch):
    """A peer gets to 0.4 after 1 + 8 s, at the second rate; embedkit is there after 3 s."""
    curves = {
        1e-3: [(4.0, 0.6), (9.0, 0.5)],
        5e-3: [(8.0, 0.4), (12.0, 0.45)],
    }

    def run(name, job, ours=None):
        if ours:
            return {"prepared": 0.0, "curve": [(1.0, 0.5), (2.0, 0.5), (3.0, 0.4), (6.0, 0.41), (9.0, 0.42)]}
        return {"prepared": 1.0, "curve": curves[job["lr"]]} if name == "fastai" else None

    rows = benchmark.made_up(100)
    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(benchmark, "data_of_quality", lambda *_: iter([("made up", rows, False)]))
    table = benchmark.quality(runner, None, 100, 2, [1e-3, 5e-3]).set_index("who")
    peer = table.loc["fastai"]
    assert (peer["best_loss"], peer["seconds"], peer["embedkit_seconds"]) == (0.4, 9.0, 3.0)
    assert np.isnan(peer["embedkit_default_seconds"])  # 15 epochs ended at 0.42
    text = benchmark.as_markdown({"quality": table.reset_index()}, 1, {})
    assert "| fastai | made up | 0.4000 | 9.0000 | 3.0000 |  | 3.0000 |  |" in text


def test_the_command_line(tmp_path, monkeypatch, capsys):
    command = ["benchmark_speed.py", "--only", "transform", "--transform-rows", "100", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(
        benchmark.Runner, "run", lambda *_: {"rows_per_second": 7.0, "columns": 4, "first": 1.0}
    )
    benchmark.main()
    assert "| TargetEncoder | 4 | 1.0000 | 7.0000 |" in (tmp_path / "speed.md").read_text()
    assert "category_encoders" in set(pd.read_parquet(tmp_path / "transform.parquet")["way"])
    assert "wrote" in capsys.readouterr().out


def test_jobs_go_through_the_command_line_of_a_script(job, tmp_path, monkeypatch, capsys):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({**job, "epochs": 1, "threads": 1}))
    for module, who in ((ours, "training"), (peers, "torch")):
        monkeypatch.setattr(sys, "argv", ["script", who, str(path)])
        module.main()
        assert len(json.loads(capsys.readouterr().out)["curve"]) == 1


@pytest.mark.parametrize("columns", [benchmark.eight_columns, partial(benchmark.long_column, 300)])
@pytest.mark.parametrize("stream", [True, False])
def test_a_fit_and_its_memory_are_measured(columns, stream, tmp_path):
    path = tmp_path / "rows.parquet"
    categorical = benchmark.write_rows(path, 600, columns)
    names = pq.read_schema(path).names
    assert len(names) == (9 if len(categorical) > 1 else 3)  # the target is one
    found = ours.memory({"train": str(path), "stream": stream, "categorical": categorical})
    assert found["seconds"] > 0
    assert found["megabytes"] >= 0


def test_memory_is_that_of_the_process_measured(runner):
    path = runner.folder / "rows.parquet"
    categorical = benchmark.write_rows(path, 600, partial(benchmark.long_column, 300))
    held = np.ones(125_000_000)  # a gigabyte of the parent's
    found = runner.run("x", {"train": str(path), "stream": True, "categorical": categorical}, ours="memory")
    assert held.nbytes / 2**20 > found["imports"] > 100
    assert 0 < found["megabytes"] < held.nbytes / 2**20


def test_a_long_column_has_every_category_twice(tmp_path):
    benchmark.write_rows(tmp_path / "rows.parquet", 600, partial(benchmark.long_column, 300))
    counts = pq.read_table(tmp_path / "rows.parquet")["c_user"].value_counts().field("counts")
    assert counts.to_pylist() == [2] * 300
