"""Batch jobs under faults: killed at any moment, no room, damaged input; what is done is kept."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_data import make_rows, make_set, tree, write_dataset

from embedkit.errors import InputError, OutputError
from embedkit.serving.batch import transform_dataset, verify_output
from embedkit.serving.output import JobFolder, read_sealed
from embedkit.tables import EmbeddingSet

SETTINGS = {"unit_rows": 100, "workers": 2}

# Says when it begins and ends, so that what is killed is the job, not the start of Python or its end.
JOB = """
import sys
from embedkit.serving.batch import transform_dataset
import embedkit.tables, embedkit.serving.units
store, source, output, overwrite = sys.argv[1:]
print("begins", flush=True)
transform_dataset(store, source, output, unit_rows=100, workers=2, resume=True, overwrite=overwrite == "1")
print("ends", flush=True)
"""

# Dies at the n-th call that moves, syncs or removes something, before or after it is done.
DIE_AT = """
import itertools, os, signal, sys
count, moment = int(sys.argv.pop(1)), sys.argv.pop(1)
calls = itertools.count()
def deadly(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        number = next(calls)
        if number == count and moment == "before":
            os.kill(os.getpid(), 9)
        result = real(*args, **kwargs)
        if number == count:
            os.kill(os.getpid(), 9)
        return result
    setattr(os, name, call)
for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
    deadly(name)
"""


@pytest.fixture(scope="module")
def embedding_set() -> EmbeddingSet:
    return make_set()


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return make_rows(2_000)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, rows: pa.Table, embedding_set: EmbeddingSet) -> Path:
    """A folder with a store, a dataset of twenty row groups, and what must come of it."""
    folder = tmp_path_factory.mktemp("data")
    embedding_set.save(folder / "store")
    write_dataset(folder / "in", rows)
    transform_dataset(folder / "store", folder / "in", folder / "whole", **SETTINGS)
    return folder


def start(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def kill_at(delay: float, data: Path, output: Path) -> bool:
    """Run a job, and kill it some seconds after it began; whether it was still at work."""
    with start(JOB, data / "store", data / "in", output, 0) as process:
        assert process.stdout.readline() == b"begins\n"
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        return b"ends" not in process.stdout.read() and process.wait() == -signal.SIGKILL


def check_resumed(data: Path, output: Path, **settings: object) -> None:
    """Resume a job; all must be as if nothing had ever happened."""
    transform_dataset(data / "store", data / "in", output, resume=True, **SETTINGS, **settings)
    assert tree(output) == tree(data / "whole")
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    "campaign", [pytest.param(5, id="5"), pytest.param(50, id="50", marks=pytest.mark.slow)]
)
def test_killed_at_random_moments(tmp_path: Path, data: Path, campaign: int) -> None:
    began = time.perf_counter()
    assert not kill_at(60, data, tmp_path / "whole" / "out")
    longest = time.perf_counter() - began  # with the start of Python: a few of the first kills come too late
    draw, killed = random.Random(campaign), 0
    for number in range(20 * campaign):
        output = tmp_path / str(number) / "out"
        hit = kill_at(draw.uniform(0.0, longest), data, output)
        check_resumed(data, output)
        longest *= 1.0 if hit else 0.9
        killed += hit
        if killed == campaign:
            break
    assert killed == campaign


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, data: Path) -> None:
    draw, output = random.Random(0), tmp_path / "folder" / "out"
    for _ in range(10):
        kill_at(draw.uniform(0.0, 0.1), data, output)
    check_resumed(data, output)


def deadly_calls() -> list:
    """A few moments for the quick run, all for the slow one: fsync, rename and the like, before and after."""
    quick = {(3, "after"), (40, "before"), (110, "after")}
    moments = [(count, moment) for count in range(125) for moment in ("before", "after")]
    return [pytest.param(*m, marks=() if m in quick else pytest.mark.slow) for m in moments]


@pytest.mark.parametrize(("count", "moment"), deadly_calls())
def test_killed_at_every_step_to_the_disk(tmp_path: Path, data: Path, count: int, moment: str) -> None:
    output = tmp_path / "folder" / "out"
    transform_dataset(make_set(1), data / "in", output)
    before = tree(output)
    with start(DIE_AT + JOB, count, moment, data / "store", data / "in", output, 1) as process:
        process.communicate()
    # The old output, the new one, or (between two renames) neither: never a mixture.
    assert not output.exists() or tree(output) in (before, tree(data / "whole"))
    with JobFolder(output).lock():
        assert output.exists()
    check_resumed(data, output, overwrite=True)


def test_no_room_for_a_file(tmp_path: Path, data: Path) -> None:
    output = tmp_path / "folder" / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))\n"
    code = JOB.replace("transform_dataset(store", limit + "transform_dataset(store")
    with start(code, data / "store", data / "in", output, 0) as process:
        _, error = process.communicate()
    assert b"OutputError: cannot write to" in error
    assert b"File too large" in error
    assert not output.exists()
    assert list(output.parent.rglob(".tmp-*")) == []
    check_resumed(data, output)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_full(small_disk: Path, data: Path, embedding_set: EmbeddingSet, rows: pa.Table) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    output = small_disk / "out"
    with pytest.raises(OutputError, match=r"No space left on device; finished work is kept"):
        transform_dataset(data / "store", data / "in", output, **SETTINGS)
    folder = JobFolder(output)
    kept = list((folder.root / "records").glob("*.json"))
    assert kept
    assert not output.exists()
    assert list(folder.root.rglob(".tmp-*")) == []
    ballast.unlink()
    summary = transform_dataset(data / "store", data / "in", output, resume=True, **SETTINGS)
    assert summary.units_reused == len(kept)
    assert tree(output) == tree(data / "whole")


def with_bad_utf8(table: pa.Table) -> pa.Table:
    """The third row of the column state becomes bytes that are not UTF-8, under the type of text."""
    cells = [None if v is None else v.encode() for v in table["state"].to_pylist()]
    cells[2] = b"B\xff"
    return table.set_column(2, "state", pa.array(cells, pa.binary()).view(pa.string()))


def damage_page(path: Path) -> None:
    """Overwrite the middle of a row group's data."""
    column = pq.read_metadata(path).row_group(2).column(2)
    first = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    with open(path, "r+b") as file:
        file.seek(first)
        file.write(b"\xff" * column.total_compressed_size)


def harm_pages(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=100)
    damage_page(path)


def harm_schema(path: Path, table: pa.Table) -> None:
    pq.write_table(table.set_column(1, "store", table["day"]), path, row_group_size=100)


def harm_text(path: Path, table: pa.Table) -> None:
    good, bad = table.slice(0, 200), with_bad_utf8(table.slice(200))
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(good, row_group_size=100)
        writer.write_table(bad, row_group_size=100)


def harm_numbers(path: Path, table: pa.Table) -> None:
    values = table["distance"].to_pylist()
    values[250] = float("inf")
    pq.write_table(table.set_column(5, "distance", pa.array(values)), path, row_group_size=100)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (harm_pages, r"in/2\.parquet, row group 2 cannot be read \(.*\): repair the file and resume"),
        (harm_schema, r"in/2\.parquet, row group 0: column 'store' was int64 when learned, is string"),
        (harm_text, r"in/2\.parquet, row group 2 cannot be read \(.*UTF8.*\): repair the file and resume"),
        (harm_numbers, r"in/2\.parquet, row group 2: column 'distance' holds 1 infinite value"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_file_in_the_middle(
    tmp_path: Path,
    data: Path,
    rows: pa.Table,
    harm: Callable[[Path, pa.Table], None],
    message: str,
    workers: int,
) -> None:
    source = write_dataset(tmp_path / "in", rows)
    output = tmp_path / "folder" / "out"
    settings = {"unit_rows": 100, "workers": workers, "columns": ["id"]}
    harm(source / "2.parquet", rows.slice(1_000, 500))
    with pytest.raises(InputError, match=message):
        transform_dataset(data / "store", source, output, **settings)
    assert not output.exists()
    records = [read_sealed(path) for path in (JobFolder(output).root / "records").iterdir()]
    kept = [record["file"] for record in records if record["file"] != "2.parquet"]
    assert len(kept) >= 10  # all units of the files before it
    write_dataset(tmp_path / "in", rows)
    summary = transform_dataset(data / "store", source, output, resume=True, **settings)
    assert summary.units_reused == len(kept)
    transform_dataset(data / "store", data / "in", tmp_path / "whole", **settings)
    assert tree(output) == tree(tmp_path / "whole")


def test_a_file_cut_short_is_found_before_the_job_begins(
    tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    source = write_dataset(tmp_path / "in", rows)
    (source / "2.parquet").write_bytes((source / "2.parquet").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"2\.parquet is not a readable Parquet file"):
        transform_dataset(embedding_set, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_kept_columns_of_another_type_are_found_before_the_job_begins(
    tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    source = write_dataset(tmp_path / "in", rows)
    pq.write_table(rows.set_column(0, "id", rows["day"]), source / "2.parquet")
    with pytest.raises(InputError, match=r"2\.parquet does not go with the files before it \(.*id.*\)"):
        transform_dataset(embedding_set, source, tmp_path / "out")
    transform_dataset(embedding_set, source, tmp_path / "out", columns=["promo"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"5;x\n", r"a\.csv, .*cannot be read \(.*5;x"),
        (b"5,B\xff\n", r"a\.csv, .*cannot be read \(.*UTF8"),
        (b"five,BE\n", r"a\.csv, .*cannot be read \(.*five"),
    ],
)
def test_a_bad_line_of_csv(tmp_path: Path, line: bytes, message: str) -> None:
    embedding_set = make_set(numerics=False).subset(["store", "state"])
    lines = b"store,state\n" + b"5,BE\n" * 500_000
    (tmp_path / "a.csv").write_bytes(lines + line)
    with pytest.raises(InputError, match=message):
        transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out")
    assert list((JobFolder(tmp_path / "out").root / "data").iterdir()) == []
    (tmp_path / "a.csv").write_bytes(lines)
    assert transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out", resume=True).rows == 500_000
    assert verify_output(tmp_path / "out") == []
