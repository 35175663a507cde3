"""The commands: what they print, what they write, how they end."""

import ast
import inspect
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import create_autospec

import click
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import embedkit
from embedkit import EmbeddingSet, EmbeddingTable, cli, cli_options, console, demo, files
from embedkit.encoder import EntityEmbeddingEncoder
from embedkit.learning.learned import PRECISIONS
from embedkit.learning.numeric import NUMERIC_OUTPUTS
from embedkit.learning.schedules import SCHEDULES
from embedkit.learning.targets import TARGET_TYPES
from embedkit.predictors import EntityEmbeddingClassifier, EntityEmbeddingRegressor
from embedkit.serving.batch import COMPRESSIONS, LAYOUTS
from embedkit.serving.engines import ENGINES
from embedkit.serving.export import FORMATS
from embedkit.serving.sql import DIALECTS
from embedkit.vocabulary import Vocabulary

ROOT = Path(embedkit.__file__).parent.parent
FAST = ["--max-epochs", "1", "--max-lr", "0.01"]


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process; an error that is not typed is raised on."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def error_line(*arguments: object, code: int = 1) -> str:
    """The one line that a failing command prints to standard error."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="session")
def csv_file(shops: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("csv") / "shops.csv"
    pacsv.write_csv(shops, path)
    return path


@pytest.fixture(scope="session")
def parquet_file(shops: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parquet") / "shops.parquet"
    pq.write_table(shops, path)
    return path


def commands() -> dict[str, click.Command]:
    return cli.main.commands


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_with_an_example(name: str) -> None:
    text = run(name, "--help").output
    assert re.search(rf"Examples?:\n\s+embedkit {name} ", text)
    options = [option for option in commands()[name].params if isinstance(option, click.Option)]
    assert all(option.help for option in options if option.name != "help")
    assert f"  {name} " in run("--help").output


def test_examples_name_options_that_exist() -> None:
    for name, command in commands().items():
        known = {text for option in command.params for text in option.opts}
        used = re.findall(r"--[\w-]+", re.search(rf"embedkit {name} .*", command.help)[0])
        assert set(used) <= known, name


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_readme_mentions_every_command(name: str) -> None:
    assert f"embedkit {name}" in (ROOT / "README.md").read_text()


def test_commands_are_thin() -> None:
    tree = ast.parse(Path(cli.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert {function.name.replace("_", "-") for function in functions} >= set(commands())
    for function in functions:
        body = function.body[1:]  # less the help
        assert not body or body[-1].end_lineno - body[0].lineno < 20, function.name


def test_fit_learns_stores_and_says_so(csv_file: Path, tmp_path: Path, shops: pa.Table) -> None:
    out = tmp_path / "shops.embedkit"
    printed = run(
        "fit",
        csv_file,
        "--target",
        "sales",
        "--categorical",
        "shop",
        "--out",
        out,
        "--embedding-dim",
        2,
        *FAST,
    ).stdout
    assert "Learned from 240 rows" in printed
    assert re.search(r"shop +6 +2 +[\d.]+\n", printed)
    assert "Predicts sales (a number, mean " in printed
    assert "Numbers: distance" in printed
    assert f"Stored in {out} as v000001." in printed
    assert f"embedkit inspect {out} shop" in printed
    loaded = EntityEmbeddingRegressor.load(out)
    assert loaded.embeddings_["town"].categories.to_pylist() == ["Bonn", "Oslo", "Rome"]
    assert loaded.embeddings_["town"].counts[0] == 12
    assert np.isfinite(loaded.predict(shops.drop_columns("sales"))).all()


def test_csv_and_parquet_give_the_same_set(csv_file: Path, parquet_file: Path, tmp_path: Path) -> None:
    for path in (csv_file, parquet_file):
        run("fit", path, "--target", "sales", "--out", tmp_path / path.suffix, "--seed", 3, "-q", *FAST)
    first, second = (embedkit.EmbeddingSet.load(tmp_path / suffix) for suffix in (".csv", ".parquet"))
    assert first.equals(second)


def test_fit_twice_adds_a_version_of_the_same_bytes(parquet_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    for version in ("v000001", "v000002"):
        printed = run("fit", parquet_file, "--target", "sales", "--out", out, *FAST).stdout
        assert f"as {version}." in printed
    tables = [sorted((out / version).rglob("*.parquet")) for version in ("v000001", "v000002")]
    assert [path.read_bytes() for path in tables[0]] == [path.read_bytes() for path in tables[1]]
    weights = [(out / version / "network.safetensors").read_bytes() for version in ("v000001", "v000002")]
    assert weights[0] == weights[1]


def test_fit_options_reach_the_estimator(parquet_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    run(
        "fit", parquet_file, "--target", "open", "--drop", "sales", "--categorical", "shop",
        "--weight", "distance", "--embedding-dim", "shop=3, town=1", "--min-frequency", "2",
        "--max-categories", "5", "--max-lr", "0.02", "--max-epochs", "2",
        "--batch-size", "16", "--schedule", "triangular", "--early-stopping",
        "--numeric", "drop", "--seed", "7", "--device", "cpu", "--out", out, "-q",
    )  # fmt: skip
    stored = embedkit.EmbeddingSet.load(out)
    parameters = stored.metadata["parameters"]
    expected = {
        "categorical_features": ["shop"],
        "embedding_dim": {"shop": 3, "town": 1},
        "min_frequency": 2,
        "max_categories": 5,
        "max_lr": 0.02,
        "max_epochs": 2,
        "batch_size": 16,
        "schedule": "triangular",
        "early_stopping": True,
        "numeric": "drop",
        "random_state": 7,
        "device": "cpu",
        "verbose": 0,
    }
    assert {name: parameters[name] for name in expected} == expected
    assert stored.features_in == ("shop", "town")
    assert stored["shop"].counts.dtype == np.float64


def test_columns_names_what_to_learn_from(parquet_file: Path) -> None:
    rows = files.read_training(parquet_file, ["sales"], columns=["town", "shop", "sales"], drop=["shop"])
    assert rows.X.column_names == ["town"]
    assert rows.y.name == "sales"


@pytest.mark.parametrize(
    ("target", "task", "kind"),
    [
        (["sales"], "auto", EntityEmbeddingRegressor),
        (["open"], "auto", EntityEmbeddingClassifier),
        (["shop"], "auto", EntityEmbeddingClassifier),
        (["shop"], "continuous", EntityEmbeddingRegressor),
        (["sales", "distance"], "auto", EntityEmbeddingRegressor),
        (["open", "shop"], "auto", EntityEmbeddingClassifier),
        (["sales", "open"], "auto", EntityEmbeddingEncoder),
    ],
)
def test_the_task_decides_what_is_stored(parquet_file: Path, target: list, task: str, kind: type) -> None:
    rows = files.read_training(parquet_file, target, skip_missing_target=True)
    assert type(rows.estimator(task)) is kind


def test_a_set_among_its_own_rows_is_refused(shops: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    pq.write_table(shops, tmp_path / "rows" / "a.parquet")
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    inside = ("--target", "sales", *FAST, "--out", tmp_path / "link" / "s.embedkit")
    for data in (
        tmp_path / "rows",
        tmp_path / "link",
        (tmp_path / "rows").as_uri(),
        tmp_path / "rows" / "**",
    ):
        assert "and would be read with it: choose another place" in error_line("fit", data, *inside)
        assert [path.name for path in (tmp_path / "rows").iterdir()] == ["a.parquet"]
    run("fit", tmp_path / "rows" / "a.parquet", *inside)
    run("fit", tmp_path / "rows" / "*.parquet", *inside)


@pytest.mark.parametrize("left", [".tmp-0123", "v000001"])
def test_a_store_that_was_killed_at_its_first_version_can_be_written(
    parquet_file: Path, tmp_path: Path, left: str
) -> None:
    root = tmp_path / "shops.embedkit"
    (root / left).mkdir(parents=True)
    run("fit", parquet_file, "--target", "sales", *FAST, "--out", root)
    assert len(EmbeddingSet.load(root)) == 2


def test_names_with_commas_are_quoted(tmp_path: Path, shops: pa.Table) -> None:
    names = {"shop": "shop, no.", "town": '6" town'}
    table = shops.rename_columns([names.get(name, name) for name in shops.column_names])
    pq.write_table(table, tmp_path / "shops.parquet")
    widths = '"shop, no."=2, 6" town=1'
    arguments = [
        "--columns",
        '"shop, no.", 6" town',
        "--categorical",
        '"shop, no."',
        "--embedding-dim",
        widths,
    ]
    arguments += ["--target", "sales", *FAST, "--out", tmp_path / "shops.embedkit"]
    run("fit", tmp_path / "shops.parquet", *arguments)
    stored = EmbeddingSet.load(tmp_path / "shops.embedkit")
    assert {name: part.embedding_dim for name, part in stored.items()} == {"shop, no.": 2, '6" town': 1}


def test_several_targets(parquet_file: Path, tmp_path: Path) -> None:
    printed = run("fit", parquet_file, "--target", "sales,open", "--out", tmp_path / "s", *FAST).stdout
    assert re.search(r"Predicts sales \(a number, mean [\d.,]+\), open \(\S+ or \S+\)", printed)


def test_quiet_prints_nothing(parquet_file: Path, tmp_path: Path) -> None:
    result = run("fit", parquet_file, "--target", "sales", "--out", tmp_path / "s", "--quiet", *FAST)
    assert result.output == ""


def test_lr_find_prints_every_rule_and_draws(parquet_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "lr.png"
    printed = run("lr-find", parquet_file, "--target", "sales", "--num-iter", "50", "--plot", picture).stdout
    assert re.search(r"valley +\d\.\d\de-\d\d", printed)
    assert re.search(r"Use --max-lr [\d.e-]+", printed)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_set_table_and_neighbours(stored: Path, regressor: EntityEmbeddingRegressor) -> None:
    overview = run("inspect", stored).stdout
    assert re.search(r"town +3 +2 ", overview)
    assert "7 columns come out of 4." in overview
    table = regressor.embeddings_["town"]
    printed = run("inspect", stored, "town", "--rows", "4").stdout
    first = f"{table.vector('Bonn')[0]:.3f}"
    assert re.search(rf"Bonn +{table.counts[2]} +{re.escape(first)} ", printed)
    assert "Rome" not in printed, "the one with the fewest rows comes last"
    assert "... 1 more rows (--rows)" in printed
    nearest = table.neighbors("Rome", 2)
    lines = run("inspect", stored, "town", "--neighbors", "Rome", "-k", "2").stdout.splitlines()
    assert lines[0] == "Nearest to town Rome:"
    assert [line.split()[0] for line in lines[2:]] == nearest["category"].fillna("(missing)").tolist()


def test_neighbours_of_numbers_booleans_and_missing(stored: Path) -> None:
    assert "Nearest to shop 4" in run("inspect", stored, "shop", "--neighbors", "4").stdout
    assert "true" in run("inspect", stored, "open", "--neighbors", "false").stdout.lower()
    assert "Rome" in run("inspect", stored, "town", "--neighbors", "(missing)").stdout
    assert "column 'shop' holds int64, which 'x' is not" in error_line(
        "inspect", stored, "shop", "--neighbors", "x"
    )
    assert "has no category 'Rom' (did you mean 'Rome'?)" in error_line(
        "inspect", stored, "town", "--neighbors", "Rom"
    )
    assert "has no feature ['twon'] (did you mean 'town'?)" in error_line("inspect", stored, "twon")
    assert "'distance' is a number and has no table" in error_line("inspect", stored, "distance")
    assert "needs a FEATURE" in run("inspect", stored, "--neighbors", "4", code=2).stderr


@pytest.mark.parametrize("kind", ["parquet", "csv", "vector", "sql"])
def test_export_writes_a_file_per_feature(
    stored: Path, tmp_path: Path, kind: str, regressor: EntityEmbeddingRegressor
) -> None:
    out = tmp_path / "a" / "tables"
    paths = run("export", stored, "--format", kind, "--out", out, "--features", "town,shop").stdout.split()
    assert sorted(paths) == sorted(str(path) for path in out.iterdir())
    table = regressor.embeddings_["town"]
    if kind == "csv":
        found = pacsv.read_csv(out / "town.csv")
        assert found["category"].to_pylist() == ["", "", "Bonn", "Oslo", "Rome"]
        vectors = np.column_stack([found["town_0"], found["town_1"]]).astype(np.float32)
    elif kind == "vector":
        found = pq.read_table(out / "town.parquet")
        assert found["embedding"].type == pa.list_(pa.float32(), 2)
        vectors = np.array(found["embedding"].to_pylist(), dtype=np.float32)
    else:
        found = pq.read_table(out / ("town.parquet" if kind == "parquet" else "embedkit_town.parquet"))
        vectors = np.column_stack([found["town_0"], found["town_1"]])
    assert found["kind"].to_pylist() == ["missing", "unknown", *["category"] * 3]
    assert found["count"].to_pylist() == table.counts.tolist()
    np.testing.assert_array_equal(vectors, table.vectors)


def test_export_refuses_what_it_cannot_write(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"cannot write to {tmp_path}/file/x" in error_line(
        "export", stored, "--out", tmp_path / "file" / "x"
    )
    assert "no feature ['twon']" in error_line(
        "export", stored, "--out", tmp_path / "x", "--features", "twon"
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_transform_is_the_lookup(
    stored: Path,
    csv_file: Path,
    parquet_file: Path,
    tmp_path: Path,
    suffix: str,
    regressor: EntityEmbeddingRegressor,
) -> None:
    data, out = {".csv": csv_file, ".parquet": parquet_file}[suffix], tmp_path / "features.parquet"
    assert "240 rows" in run("transform", stored, data, out, "--columns", "sales").stdout
    found = ds.dataset(out).to_table()
    names = list(regressor.embeddings_.feature_names_out)
    assert found.column_names == ["sales", *names]
    expected = regressor.embeddings_.transform(pq.read_table(parquet_file))
    np.testing.assert_array_equal(np.column_stack([found[name] for name in names]), expected)


def test_transform_takes_its_settings_from_a_job_file(
    stored: Path, parquet_file: Path, tmp_path: Path
) -> None:
    job, out = tmp_path / "job.toml", tmp_path / "features"
    job.write_text(f"store = '{stored}'\ninput = '{parquet_file}'\noutput = '{out}'\ncolumns = ['sales']\n")
    assert "dry run" in run("transform", "--config", job, "--dry-run").stdout
    assert not out.exists()
    run("transform", "--config", job, "--layout", "vector", "-q")
    names = ["sales", "shop_embedding", "town_embedding", "open_embedding", "distance"]
    assert ds.dataset(out).schema.names == names
    assert "exists" in error_line("transform", "--config", job)
    assert "Missing INPUT OUTPUT" in run("transform", stored, code=2).stderr


def test_verify_says_what_is_damaged(stored: Path, tmp_path: Path) -> None:
    assert run("verify", stored).stdout == f"{stored} is sound.\n"
    damaged = shutil.copytree(stored, tmp_path / "damaged")
    table = damaged / "v000001" / "tables" / "town.parquet"
    table.write_bytes(table.read_bytes()[:-1] + b"X")
    assert "town.parquet is damaged: its SHA-256 is not that of the manifest" in error_line("verify", damaged)
    (tmp_path / "file").touch()
    (tmp_path / "unfinished").mkdir()
    for name in ("nothing", "file", "unfinished"):
        assert "is no stored set (it has no CURRENT) and no finished output" in error_line(
            "verify", tmp_path / name
        )


def test_demo_hands_over_to_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    run_demo = create_autospec(demo.run, side_effect=lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(demo, "run", run_demo)
    run("demo", "--out", tmp_path, "--flights", "5000", "--quiet")
    options = {"data": None, "flights": 5000, "quiet": True, "echo": click.echo}
    assert calls == [((str(tmp_path),), options)]


def test_verify_looks_at_outputs_too(stored: Path, parquet_file: Path, tmp_path: Path) -> None:
    run("transform", stored, parquet_file, tmp_path / "out", "-q")
    assert run("verify", tmp_path / "out").output == f"{tmp_path / 'out'} is sound.\n"
    part = next((tmp_path / "out").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert part.name in error_line("verify", tmp_path / "out")


def test_the_worst_rows_of_a_csv_file_are_read_as_they_were_learned(tmp_path: Path) -> None:
    rows = pa.table({"zip": ["01234", "04321"] * 50, "sales": np.arange(100.0) % 7})
    pq.write_table(rows, tmp_path / "rows.parquet")
    pacsv.write_csv(rows, tmp_path / "rows.csv")
    run("fit", tmp_path / "rows.parquet", "--target", "sales", "--out", tmp_path / "s", "-q", *FAST)
    found = run("inspect", tmp_path / "s", "--worst", tmp_path / "rows.csv").output
    assert found == run("inspect", tmp_path / "s", "--worst", tmp_path / "rows.parquet").output
    assert "01234" in found


@pytest.mark.parametrize(
    "classes", [["1", "2"], ["01", "02", "003"], ["true", "false"], [1, 2], [True, False]]
)
def test_the_classes_of_a_csv_file_are_read_as_they_were_learned(tmp_path: Path, classes: list) -> None:
    rows = pa.table({"town": ["a", "b"] * 60, "kind": classes * (120 // len(classes))})
    pq.write_table(rows, tmp_path / "rows.parquet")
    pacsv.write_csv(rows, tmp_path / "rows.csv", pacsv.WriteOptions(quoting_style="none"))
    run("fit", tmp_path / "rows.parquet", "--target", "kind", "--out", tmp_path / "s", "-q", *FAST)
    found = run("inspect", tmp_path / "s", "--worst", tmp_path / "rows.csv").output
    assert found == run("inspect", tmp_path / "s", "--worst", tmp_path / "rows.parquet").output


def test_options_that_would_do_nothing_are_refused(stored: Path, tmp_path: Path) -> None:
    assert "--target is for --worst" in run("inspect", stored, "--target", "sales", code=2).stderr
    line = error_line("export", stored, "--features", "distance", "--out", tmp_path / "out")
    assert "there is no table to export: ['distance'] are numbers" in line
    assert not (tmp_path / "out").exists()


def test_evaluate_hands_on_its_threads(parquet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr("embedkit.evaluate", lambda *_, **options: given.update(options))
    monkeypatch.setattr(pa, "cpu_count", lambda: 7)
    run("evaluate", parquet_file, "--target", "sales", "-q")
    assert given["n_jobs"] == 7


def test_usage_errors_are_2(parquet_file: Path, tmp_path: Path) -> None:
    assert "Missing option '--target'" in run("fit", parquet_file, "--out", tmp_path / "s", code=2).stderr
    assert "No such command" in run("fti", code=2).stderr
    arguments = ["fit", parquet_file, "--target", "sales", "--out", tmp_path / "s"]
    assert "'fast' is no number and not 'auto'" in run(*arguments, "--max-lr", "fast", code=2).stderr
    assert "'x' is no number" in run(*arguments, "--embedding-dim", "shop=x", code=2).stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".csv.gz"])
def test_a_file_that_does_not_parse_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b'a,b\n1,2\n3\n"4\n')
    line = error_line("fit", path, "--target", "a", "--out", tmp_path / "s")
    kind = "Parquet" if suffix == ".parquet" else "CSV"
    assert f"bad{suffix} cannot be read as {kind} (" in line
    assert "repair or convert it" in line


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    arguments = ["--target", "a", "--out", tmp_path / "s"]
    assert "nowhere.csv does not exist" in error_line("fit", tmp_path / "nowhere.csv", *arguments)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert "rows.xlsx is of an unknown kind" in error_line("fit", tmp_path / "rows.xlsx", *arguments)


def test_a_weight_that_is_no_weight(shops: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    weights = np.ones(240)
    weights[[7, 9]] = -1, np.nan
    pq.write_table(shops.append_column("w", pa.array(weights)), path)
    line = error_line("fit", path, "--target", "sales", "--weight", "w", "--out", tmp_path / "s")
    assert "weight column 'w' is missing or negative in 2 row(s), the first is row 7: a weight is" in line


def test_a_category_is_shown_on_one_line() -> None:
    lines = console.text_table(
        ["category", "count"], [["a\nb\x1b[2J", "1"], ["Łódź" * 30, "23"]]
    ).splitlines()
    assert lines[1].split() == [r"a\nb\x1b[2J", "1"]
    assert lines[2].split() == ["Łódź" * 14 + "Ł...", "23"]
    assert [len(line) for line in lines] == [2 + 60 + 2 + len("count")] * 3


def test_text_tables_are_in_line() -> None:
    text = console.text_table(["name", "rows"], [["a", "1,000"], ["long", "5"]])
    assert text == "  name   rows\n  a     1,000\n  long      5"


def run_process(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-m", "embedkit", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


def test_a_broken_pipe_is_quiet(stored: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with run_process("inspect", stored, "shop", stdout=write_end) as process:
        os.close(write_end)
        assert process.communicate()[1] == b""


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    code = """
import os, signal
from embedkit import cli, store
store.verify = lambda root: os.kill(os.getpid(), signal.SIGINT)
cli.main(["verify", "x"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("", "\nInterrupted.\n")
    # No command that ran in this process has left a handler; shells have background jobs ignore the signal.
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_threads_reach_torch(variable: str, parquet_file: Path, tmp_path: Path) -> None:
    code = """
import sys
from embedkit.cli import main
main(sys.argv[1:], standalone_mode=False)
import torch
print(torch.get_num_threads())
"""
    command = ["fit", parquet_file, "--target", "sales", "--out", tmp_path / "s", "--threads", 2, "-q", *FAST]
    environment = os.environ | {variable: "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, check=True, env=environment
    )
    assert done.stdout == b"2\n"


def test_no_progress_bar_where_there_is_no_terminal(stored: Path, parquet_file: Path, tmp_path: Path) -> None:
    with run_process("transform", stored, parquet_file, tmp_path / "a", stdout=subprocess.DEVNULL) as process:
        assert process.communicate()[1] == b""


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_a_progress_bar_unless_quiet(
    quiet: bool, stored: Path, parquet_file: Path, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    arguments = ["transform", stored, parquet_file, tmp_path / "out", *(["-q"] if quiet else [])]
    command = [sys.executable, "-m", "embedkit", *map(str, arguments)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.write(theirs, b"END")
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(ours, 100_000)
    os.close(ours)
    os.close(theirs)
    assert (b"row" in shown) is not quiet


def test_reliability_is_that_of_the_axes_that_are_published() -> None:
    vocabulary = Vocabulary.fit(pa.array(["a", "b"]), "shop")
    table = EmbeddingTable(vocabulary, np.ones((4, 2)), ranked=True)  # one axis, and the rank
    axes = {"shop": {"share": [0.7, 0.3], "reliability": [0.1, 0.8]}}
    text = console.set_summary(EmbeddingSet([table], metadata={"axes": axes}))
    assert re.search(r"shop +2 +2 +0\.80\n", text)


@pytest.mark.parametrize("name", ["fit", "lr-find", "evaluate"])
def test_defaults_are_those_of_the_library(name: str) -> None:
    """They stand in the command too, which shows its help without loading the library."""
    parameters = inspect.signature(EntityEmbeddingEncoder).parameters
    same = {option.name: option for option in commands()[name].params if option.name in parameters}
    own = {"random_state", "categorical_features"}  # a command repeats itself, and takes a list
    assert {"max_epochs", "batch_size", "precision", "ranks", "max_lr"} - same.keys() <= {"max_lr"}
    for option in same.keys() - own:
        found = same[option].to_info_dict()["default"]
        assert found == parameters[option].default or (found is None and not parameters[option].default), (
            option
        )


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("fit", "task", TARGET_TYPES),
        ("fit", "precision", PRECISIONS),
        ("fit", "schedule", SCHEDULES),
        ("fit", "numeric", NUMERIC_OUTPUTS),
        ("export", "format", (*FORMATS, "sql")),
        ("export", "dialect", DIALECTS),
        ("transform", "layout", LAYOUTS),
        ("transform", "compression", COMPRESSIONS),
        ("transform", "engine", ENGINES),
    ],
)
def test_choices_are_those_of_the_library(command: str, option: str, values: Iterable[str]) -> None:
    (found,) = (part for part in commands()[command].params if part.name == option)
    assert set(found.type.choices) == set(values)


def test_a_warning_is_one_line(shops: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    pq.write_table(shops, tmp_path / "rows" / "a.parquet")
    pq.write_table(shops.append_column("extra", shops["distance"]), tmp_path / "rows" / "b.parquet")
    arguments = ["fit", tmp_path / "rows", "--target", "sales", "--out", tmp_path / "s", "-q", *FAST]
    environment = {**os.environ, "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "embedkit", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"Warning: .*a\.parquet lacks column\(s\) \['extra'\] .* missing there", line)


def test_results_go_to_new_directories_and_appear_whole(
    parquet_file: Path, tmp_path: Path, monkeypatch
) -> None:
    scores, curve = tmp_path / "new" / "scores.parquet", tmp_path / "other" / "curve.png"
    how = ["--target", "sales", "--columns", "shop,town"]
    how_often = ["--folds", "2", "--models", "knn,knn", "--out", scores]
    assert run("evaluate", parquet_file, *how, *how_often, *FAST, "-q").output == ""
    assert len(pq.read_table(scores)) > 0
    run("lr-find", parquet_file, *how, "--num-iter", "20", "--plot", curve)
    assert curve.exists()
    before = scores.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    line = run(
        "evaluate", parquet_file, *how, "--folds", "2", "--models", "knn", "--out", scores, *FAST, code=1
    )
    assert f"cannot write to {scores}: No space left on device" in line.stderr
    assert scores.read_bytes() == before
    assert [path.name for path in scores.parent.iterdir()] == ["scores.parquet"]


def test_one_training_at_a_time_writes_a_checkpoint(parquet_file: Path, tmp_path: Path) -> None:
    arguments = ["fit", parquet_file, "--target", "sales", "--out", tmp_path / "s", *FAST]
    with cli_options._alone(str(tmp_path / "s.checkpoint")):
        line = error_line(*arguments)
        assert f"another training is writing {tmp_path / 's.checkpoint'}: wait for it, or give a --ch" in line
        assert (tmp_path / "s.checkpoint").is_dir()
    run(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_worst_is_of_all_features() -> None:
    line = run("inspect", "s", "shop", "--worst", "rows.parquet", code=2).stderr
    assert "--worst looks at all features: leave out FEATURE and --neighbors" in line
