"""Settings of batch jobs: from Python, from the command line and from a file; what is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from batch_data import make_rows, make_set, tree, write_dataset
from click.testing import CliRunner

from embedkit.cli import main
from embedkit.cli import transform as transform_command
from embedkit.errors import InputError, OutputError
from embedkit.files import read_table
from embedkit.serving.batch import transform_dataset
from embedkit.serving.config import load_job
from embedkit.serving.output import JobFolder
from embedkit.serving.sources import open_source
from embedkit.tables import EmbeddingSet


@pytest.fixture(scope="module")
def embedding_set() -> EmbeddingSet:
    return make_set()


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return make_rows(2_000)


@pytest.fixture
def source(tmp_path: Path, rows: pa.Table) -> Path:
    return write_dataset(tmp_path / "in", rows)


def read(output: Path) -> pa.Table:
    return ds.dataset(output, partitioning=None).to_table()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layout": "long"}, r"layout must be one of \('wide', 'vector'\), got 'long'"),
        ({"engine": "ray"}, r"engine must be one of \('plain', 'dask'\), got 'ray'"),
        ({"compression": "gzip"}, "compression must be one of"),
        ({"columns": "id"}, r"columns must be a list of names, got 'id': write \['id'\]"),
        ({"columns": [1]}, r"columns must be a list of names, got \[1\]$"),
        ({"columns": ["idd"]}, r"columns names \['idd'\], which .*0.parquet lacks \(did you mean 'id'\?\)"),
        ({"partition_by": ["dya"]}, r"0.parquet lacks column\(s\) \['dya'\] \(did you mean 'day'\?\)"),
        ({"max_unknown": "5 percent"}, r"max_unknown must be a fraction .* got '5 percent'"),
        ({"max_unknown": 5}, "max_unknown must be a fraction"),
        ({"workers": 0}, "workers must be a whole number >= 1, got 0"),
        ({"version": "v000001"}, "version is for a store on disk"),
        ({"scheduler": "tcp://127.0.0.1:1"}, 'scheduler needs engine="dask"'),
    ],
)
def test_settings_are_checked(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, kwargs: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        transform_dataset(embedding_set, source, tmp_path / "out", **kwargs)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_unusable_inputs_are_refused(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    (source / "more.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match=r"5 file\(s\) of format \['csv', 'parquet'\]"):
        transform_dataset(embedding_set, source, tmp_path / "out")
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        transform_dataset(embedding_set, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match=r"0 file\(s\)"):
        transform_dataset(embedding_set, source / "*.orc", tmp_path / "out")
    with pytest.raises(InputError, match=r"output .*in holds the input"):
        transform_dataset(embedding_set, source / "*.parquet", source, overwrite=True)
    with pytest.raises(InputError, match="output must be on a file system where files can be renamed"):
        transform_dataset(embedding_set, source / "*.parquet", "s3://bucket/out")


@pytest.mark.parametrize("how", ["uri", "pattern", "link"])
def test_an_output_within_the_input_is_refused_by_any_name(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, how: str
) -> None:
    (tmp_path / "link").symlink_to(source)
    named = {"uri": source.as_uri(), "pattern": source / "**", "link": tmp_path / "link"}[how]
    with pytest.raises(InputError, match="lies in the input"):
        transform_dataset(embedding_set, named, source / "out")
    transform_dataset(embedding_set, source / "*.parquet", source / "out")


def test_a_link_to_the_output_is_no_input(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    output = tmp_path / "features"
    transform_dataset(embedding_set, source, output)
    (tmp_path / "latest").symlink_to(output)
    with pytest.raises(InputError, match="holds the input"):
        transform_dataset(embedding_set, tmp_path / "latest", output, overwrite=True, columns=["id"])


@pytest.mark.parametrize("column", [[[1]], [b"\xff"]])
def test_columns_that_cannot_name_directories(
    tmp_path: Path, embedding_set: EmbeddingSet, column: list
) -> None:
    rows = make_rows(1)
    pq.write_table(rows.append_column("key", pa.array(column)), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"partition_by names column 'key', which is .*: take one of texts"):
        transform_dataset(embedding_set, tmp_path / "in.parquet", tmp_path / "out", partition_by=["key"])
    with pytest.raises(InputError, match="partition_by names a column twice"):
        transform_dataset(embedding_set, tmp_path / "in.parquet", tmp_path / "out", partition_by=["id", "id"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_dry_run_says_what_the_run_would(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    transform_dataset(embedding_set, source, tmp_path / "out")
    with pytest.raises(OutputError, match="out exists"):
        transform_dataset(embedding_set, source, tmp_path / "out", dry_run=True)
    transform_dataset(embedding_set, source, tmp_path / "out", dry_run=True, overwrite=True)
    transform_dataset(embedding_set, source, tmp_path / "out", dry_run=True, resume=True)


def test_an_unwritable_output_is_one_error(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to .*file/\.out\.partial: Not a directory"):
        transform_dataset(embedding_set, source, tmp_path / "file" / "out")


def test_job_files(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        f'input = "{source}"\noutput = "{tmp_path / "out"}"\n'
        'columns = ["id"]\nmax_unknown = "50%"\nworkers = 1\n'
    )
    transform_dataset(embedding_set, **load_job(job))
    assert read(tmp_path / "out").column_names == ["id", *embedding_set.feature_names_out]
    job.write_text("max-unknown = 0.5\n")
    with pytest.raises(
        InputError, match=r"unknown key\(s\) \['max-unknown'\] \(did you mean 'max_unknown'\?\)"
    ):
        load_job(job)
    for line in ('resume = "no"', "workers = true", 'unit_rows = "9"', "store = 3", "quiet = 1"):
        job.write_text(line)
        with pytest.raises(InputError, match=rf"job\.toml: {line.split()[0]} must be .*, got "):
            load_job(job)
    job.write_text("max_unknown = 0\nquiet = true\npartition_by = []\ndry_run = true\n")
    assert load_job(job) == {"max_unknown": 0, "quiet": True, "partition_by": [], "dry_run": True}
    job.write_text("columns = [\n")
    with pytest.raises(InputError, match=r"job\.toml cannot be read as TOML"):
        load_job(job)


def test_every_option_of_the_command_can_be_in_a_job_file(tmp_path: Path) -> None:
    names = {parameter.name for parameter in transform_command.params} - {"config", "no_partitions"}
    (tmp_path / "job.toml").write_text("nothing = 1")
    with pytest.raises(InputError) as caught:
        load_job(tmp_path / "job.toml")
    assert names <= set(re.findall(r"'(\w+)'", str(caught.value).partition("expected")[2]))


def test_the_command_can_give_up_directories(
    tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    embedding_set.save(tmp_path / "store")
    ds.write_dataset(
        rows.slice(0, 50), tmp_path / "in", format="parquet", partitioning=["day"], partitioning_flavor="hive"
    )
    arguments = [tmp_path / "store", tmp_path / "in", tmp_path / "out", "--columns", "id,day"]
    job = tmp_path / "job.toml"
    job.write_text("partition_by = []\noverwrite = true\nquiet = true\n")
    for options in (["--no-partitions"], ["--config", job], ["--config", job, "--no-partitions"]):
        result = CliRunner().invoke(transform_command, list(map(str, [*arguments, *options])))
        assert result.exit_code == 0, result.output
        assert (result.output == "") == ("--config" in options)
        assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
        assert read(tmp_path / "out").column_names == ["id", "day", *embedding_set.feature_names_out]
    options = ["--partition-by", "id", "--no-partitions", "--overwrite"]
    result = CliRunner().invoke(transform_command, list(map(str, [*arguments, *options])))
    assert result.exit_code == 2
    assert "not both" in result.output


def test_too_many_directories_are_refused(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    big = write_dataset(tmp_path / "big", make_rows(1_100), files=1)
    with pytest.raises(InputError, match=r"0.parquet, row groups 0 to 10: columns \['id'\] have 1100 values"):
        transform_dataset(embedding_set, big, tmp_path / "out", partition_by=["id"])


def test_too_many_open_files_are_one_error_that_says_so(tmp_path: Path, source: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from batch_data import make_set
from embedkit.files import read_table
from embedkit.serving.batch import transform_dataset
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
transform_dataset(make_set(), sys.argv[1], sys.argv[2], partition_by=["id"])
"""
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert "Too many open files; finished work is kept, allow more files (ulimit -n)" in done.stderr


def test_only_the_output_of_a_job_is_overwritten(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    embedding_set.save(tmp_path / "set.embedkit")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "notes" / "_manifest.json").write_text('{"units": []}')
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for output in ("set.embedkit", "notes"):
        with pytest.raises(OutputError, match=f"{output} holds other files than those of a job, or"):
            transform_dataset(tmp_path / "set.embedkit", source, tmp_path / output, overwrite=True)
    with pytest.raises(OutputError, match="file is a file: choose another output"):
        transform_dataset(embedding_set, source, tmp_path / "file", overwrite=True)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    transform_dataset(embedding_set, source, tmp_path / "empty", overwrite=True)


@pytest.mark.parametrize("name", ["_day", ".day"])
def test_directories_that_nobody_would_read_are_refused(
    tmp_path: Path, embedding_set: EmbeddingSet, name: str
) -> None:
    source = write_dataset(tmp_path / "in", make_rows(10).append_column(name, pa.array(range(10))))
    with pytest.raises(
        InputError, match=re.escape(f"partition_by names ['{name}']: readers of datasets skip")
    ):
        transform_dataset(embedding_set, source, tmp_path / "out", partition_by=[name])


def test_values_too_long_for_a_directory_are_one_error(tmp_path: Path, embedding_set: EmbeddingSet) -> None:
    rows = make_rows(10).append_column("long", pa.array(["x" * 300] * 10))
    source = write_dataset(tmp_path / "in", rows)
    with pytest.raises(OutputError, match="partition by a column with shorter values and resume"):
        transform_dataset(embedding_set, source, tmp_path / "out", partition_by=["long"])


def test_a_column_that_comes_twice_is_named(tmp_path: Path, embedding_set: EmbeddingSet) -> None:
    rows = make_rows(10)
    source = write_dataset(tmp_path / "in", rows.append_column("id", rows["id"]), files=1)
    with pytest.raises(InputError, match=r"0.parquet has more than one column named \['id'\]"):
        transform_dataset(embedding_set, source, tmp_path / "out")


def test_an_existing_output_is_replaced_only_on_request(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    transform_dataset(embedding_set, source, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(OutputError, match="out exists: choose another output, or overwrite it"):
        transform_dataset(embedding_set, source, tmp_path / "out")
    with pytest.raises(OutputError, match="out exists"):
        transform_dataset(make_set(1), source, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    transform_dataset(make_set(1), source, tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out").keys() == before.keys()
    assert tree(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_second_job_is_refused(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    expected = pytest.raises(OutputError, match=r"another job is writing .*out: wait for it")
    with JobFolder(tmp_path / "out").lock(), expected:
        transform_dataset(embedding_set, source, tmp_path / "out", resume=True, overwrite=True)
    transform_dataset(embedding_set, source, tmp_path / "out")


def test_the_lock_of_a_finished_job_is_worth_nothing(tmp_path: Path) -> None:
    first, second = JobFolder(tmp_path / "out"), JobFolder(tmp_path / "out")
    with first.lock():
        first.remove()  # the second job opens a new lock file, not the one that has gone
        with second.lock():
            assert (second.root / "lock").exists()


def test_too_many_unknown_values_fail_the_job_before_it_commits(
    tmp_path: Path, source: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    with pytest.raises(InputError, match=r"more than max_unknown=5.00% of the rows are unknown in .*'state'"):
        transform_dataset(embedding_set, source, tmp_path / "out", max_unknown="5%")
    assert not (tmp_path / "out").exists()
    share = rows["state"].to_pylist().count("??") / 2_000
    most = max(
        share, rows["store"].to_pylist().count(999) / 2_000, rows["tail"].to_pylist().count("") / 2_000
    )
    summary = transform_dataset(embedding_set, source, tmp_path / "out", max_unknown=most, resume=True)
    assert summary.committed
    assert summary.units_reused == summary.units


def test_a_number_that_comes_out_is_no_directory(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    message = (
        r"the output would have \['distance'\] in its files and, with other values, in the names of its dir"
    )
    with pytest.raises(InputError, match=message):
        transform_dataset(embedding_set, source, tmp_path / "out", partition_by=["distance"])
    (tmp_path / "keys" / "distance=5").mkdir(parents=True)
    rows = ds.dataset(source).to_table().drop_columns("distance")
    pq.write_table(rows, tmp_path / "keys" / "distance=5" / "a.parquet")
    with pytest.raises(InputError, match=message):
        transform_dataset(embedding_set, tmp_path / "keys", tmp_path / "out")
    transform_dataset(embedding_set, tmp_path / "keys", tmp_path / "out", partition_by=[])
    assert len(set(read(tmp_path / "out")["distance"].to_pylist())) == 1
    assert read(tmp_path / "out").num_rows == rows.num_rows


def test_an_output_that_the_next_job_would_read_is_refused(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    with pytest.raises(InputError, match=r"out lies in the input .*in and would be a part of it"):
        transform_dataset(embedding_set, source, source / "out")
    transform_dataset(embedding_set, source, source / "_features" / "out")
    transform_dataset(embedding_set, source / "0.parquet", source / "out")  # that file alone is the input


def test_a_link_is_followed(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    transform_dataset(embedding_set, source, tmp_path / "real", columns=["id"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    transform_dataset(embedding_set, source, tmp_path / "link", columns=["id", "day"], overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert "day" in read(tmp_path / "real").column_names


def test_a_uri_of_a_local_file_is_its_path(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    output = (tmp_path / "an output").as_uri()
    assert "%20" in output
    transform_dataset(embedding_set, source, output, columns=["id"])
    assert (tmp_path / "an output" / "_manifest.json").exists()
    assert CliRunner().invoke(main, ["verify", output]).output == f"{output} is sound.\n"
    with pytest.raises(InputError, match="is no URI of a local file"):
        transform_dataset(embedding_set, source, "file://elsewhere/out")
    embedding_set.save(tmp_path / "s.embedkit")
    refused = CliRunner().invoke(main, ["export", str(tmp_path / "s.embedkit"), "--out", output])
    assert refused.exit_code == 2
    assert "--out must be a local directory" in refused.output


@pytest.mark.parametrize("length", [201, 255, 300])
def test_a_name_that_leaves_no_room_for_the_folder_of_the_job(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, length: int
) -> None:
    with pytest.raises(OutputError, match=f"has {length} bytes: choose one of at most 200"):
        transform_dataset(embedding_set, source, tmp_path / ("x" * length))
    assert list(tmp_path.iterdir()) == [source]
    transform_dataset(embedding_set, source, tmp_path / ("x" * 200))


def test_names_that_are_not_utf8(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    strange = source / os.fsdecode(b"\xff.parquet")
    try:
        (source / "0.parquet").rename(strange)
    except OSError:
        pytest.skip("the file system takes no such names")
    for data in (source, strange):
        with pytest.raises(InputError, match=r"\\xff\.parquet' is no name in UTF-8: rename it"):
            transform_dataset(embedding_set, data, tmp_path / "out")
        with pytest.raises(InputError, match=r"\\xff\.parquet' is no name in UTF-8: rename it"):
            read_table(data)
    strange.rename(source / os.fsdecode(b"\xff.txt"))
    assert transform_dataset(embedding_set, source, tmp_path / "out").files == 3


def test_links_that_go_in_a_circle_are_not_followed(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    (source / "more").mkdir()
    (tmp_path / "linked").mkdir()
    (source / "3.parquet").rename(tmp_path / "linked" / "3.parquet")
    (source / "more" / "linked").symlink_to(tmp_path / "linked")
    (source / "more" / "up").symlink_to("..")
    (source / "more" / "self").symlink_to(".")
    (tmp_path / "linked" / "back").symlink_to(source)
    assert transform_dataset(embedding_set, source, tmp_path / "out").files == 4
    names = [file.name for file in open_source(source).files]
    assert names == ["0.parquet", "1.parquet", "2.parquet", "more/linked/3.parquet"]


def test_a_home_directory_in_a_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.toml").write_text('store = "s"\noutput = "~/out"\ncolumns = ["~x"]')
    found = load_job(tmp_path / "job.toml")
    assert found == {"store": "s", "output": str(tmp_path / "out"), "columns": ["~x"]}


@pytest.mark.parametrize("first", ["note,store\n", "note,store\n1,5\n", "note,store\n,5\n"])
def test_a_first_file_does_not_decide_on_the_types_of_all(tmp_path: Path, first: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(first)
    (tmp_path / "in" / "b.csv").write_text("note,store\n300.5,6\n")
    transform_dataset(make_set(numerics=False).subset("store"), tmp_path / "in", tmp_path / "out")
    assert read(tmp_path / "out")["note"].to_pylist()[-1] == 300.5
