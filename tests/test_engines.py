"""Engines schedule and nothing else: the bytes are those of the plain run, also when workers die."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from batch_data import make_rows, make_set, tree, write_dataset

from embedkit.errors import InputError, StoreNotFoundError
from embedkit.serving import engines
from embedkit.serving.batch import transform_dataset, verify_output
from embedkit.serving.output import JobFolder

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return make_rows(3_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, rows: pa.Table) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "in", rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("plain") / "out"
    transform_dataset(make_set(), source, out, unit_rows=100)
    return tree(out)


def test_dask_starts_a_cluster_of_its_own(tmp_path: Path, source: Path, plain: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    summary = transform_dataset(make_set(), source, out, unit_rows=100, engine="dask", workers=1)
    assert summary.rows == 3_000
    assert tree(out) == plain


def test_dask_goes_on_where_another_engine_was_interrupted(
    tmp_path: Path, source: Path, plain: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.transform_unit

    def failing(job: engines.Job, unit: engines.Unit, *rest: object) -> dict:
        if unit.index == 7:
            raise InputError("the test stops here")
        return real(job, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "transform_unit", failing)
        with pytest.raises(InputError, match="stops here"):
            transform_dataset(make_set(), source, tmp_path / "out", unit_rows=100, workers=1)
    resumed = {"engine": "dask", "workers": 1, "resume": True}
    summary = transform_dataset(make_set(), source, tmp_path / "out", unit_rows=100, **resumed)
    assert 7 <= summary.units_reused < summary.units
    assert tree(tmp_path / "out") == plain


def test_dask_survives_the_death_of_three_workers(
    tmp_path: Path, source: Path, plain: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    records = JobFolder(out).root / "records"
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        killed: set[int] = set()
        stop = threading.Event()

        def kill_three_workers() -> None:
            # Each time some more units are done, a worker dies, the ones that replace the dead too.
            while len(killed) < 3 and not stop.wait(0.01):
                done = len(list(records.glob("*.json"))) if records.exists() else 0
                pids = {nanny.pid for nanny in cluster.workers.values()} - killed - {None}
                if pids and done > 3 * len(killed):
                    killed.add(min(pids))
                    os.kill(min(pids), signal.SIGKILL)

        killer = threading.Thread(target=kill_three_workers)
        killer.start()
        try:
            summary = transform_dataset(
                make_set(), source, out, unit_rows=100, engine="dask", scheduler=cluster.scheduler_address
            )
        finally:
            stop.set()
            killer.join()
    assert len(killed) == 3
    assert summary.units == 32
    assert tree(out) == plain
    assert verify_output(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dask_reports_the_error_of_a_unit(tmp_path: Path, rows: pa.Table) -> None:
    source = write_dataset(tmp_path / "in", rows)
    changed = rows.set_column(1, "store", rows["day"])
    write_dataset(tmp_path / "more", changed, files=1, row_group_rows=1_000)
    (tmp_path / "more" / "0.parquet").rename(source / "2.parquet")
    with pytest.raises(
        InputError, match=r"2\.parquet, row groups 0 to 2: column 'store' was int64 when learned"
    ):
        transform_dataset(make_set(), source, tmp_path / "out", columns=[], engine="dask", workers=1)
    assert not (tmp_path / "out").exists()


def test_dask_reports_that_workers_find_no_set(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.store, "publish", lambda *_: None)
    with pytest.raises(StoreNotFoundError, match="no stored set at"):
        transform_dataset(make_set(), source, tmp_path / "out", engine="dask", workers=1)


def test_dask_without_a_scheduler(tmp_path: Path, source: Path) -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "100ms"}),
        pytest.raises(InputError, match=r"there is no Dask scheduler at tcp://127\.0\.0\.1:1: "),
    ):
        transform_dataset(make_set(), source, tmp_path / "o", engine="dask", scheduler="tcp://127.0.0.1:1")


def test_a_missing_engine_names_its_extra(tmp_path: Path, source: Path) -> None:
    code = (
        "import sys; sys.modules['distributed'] = None\n"
        "from batch_data import make_set\n"
        "from embedkit.errors import MissingExtraError\n"
        "from embedkit.serving.batch import transform_dataset\n"
        "try:\n"
        f"    transform_dataset(make_set(), {str(source)!r}, {str(tmp_path / 'out')!r}, engine='dask')\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout == 'distributed is not installed; in the folder of embedkit: pip install ".[dask]"\n', (
        run.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_a_worker_is_one_line(tmp_path: Path) -> None:
    make_set().save(tmp_path / "s.embedkit")
    rows = make_rows(300)
    text = rows.set_column(
        rows.column_names.index("distance"), "distance", rows["distance"].cast(pa.string())
    )
    write_dataset(tmp_path / "in", text, files=1)
    paths = [str(tmp_path / name) for name in ("s.embedkit", "in", "out")]
    command = [
        sys.executable,
        "-m",
        "embedkit",
        "transform",
        *paths,
        "--engine",
        "dask",
        "--workers",
        "1",
        "-q",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "column 'distance' must hold numbers, found" in line
