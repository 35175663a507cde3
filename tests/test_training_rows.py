"""`embedkit fit --train-features`: the rows that were learned from, for other models to learn from."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from embedkit import EntityEmbeddingRegressor, InputError, OutputError
from embedkit.cli import main
from embedkit.serving import training_rows
from embedkit.serving.batch import transform_dataset
from embedkit.serving.training_rows import write_training_rows

FAST = ["--max-epochs", "2", "--max-lr", "0.01", "--target", "sales", "-q"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sales that depend on the combination of clerk and product, with a column of ids and one of groups."""
    rng = np.random.default_rng(0)
    clerk, product = rng.integers(0, 20, (2, 3000))
    sales = rng.normal(size=(20, 20))[clerk, product] + rng.normal(size=20)[clerk]
    rows = pd.DataFrame({"id": np.arange(3000) + 7, "clerk": clerk, "product": product, "week": clerk % 5})
    rows = rows.astype({"clerk": str, "product": str}).assign(price=rng.normal(size=3000), sales=sales)
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    rows.to_parquet(path)
    return path


def fit(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["fit", *map(str, arguments), *FAST])
    assert result.exit_code == code, result.output
    return result


def learned_without(path: Path, *columns: str) -> tuple[EntityEmbeddingRegressor, pd.DataFrame]:
    rows = pd.read_parquet(path)
    estimator = EntityEmbeddingRegressor(max_epochs=2, max_lr=0.01, random_state=0)
    return estimator, rows.drop(columns=["sales", *columns])


def test_rows_are_written_as_fit_transform_encodes_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_rows, "ROW_GROUP_ROWS", 700)
    fit(
        data, "--drop", "id,week", "--out", tmp_path / "s", "--train-features", tmp_path / "new" / "f.parquet"
    )
    written = pq.read_table(tmp_path / "new" / "f.parquet")
    whole = pq.read_table(data).drop_columns("price")  # which comes out scaled
    assert written.select(whole.column_names).equals(whole)  # ids and the target, too
    estimator, X = learned_without(data, "id", "week")
    expected = estimator.fit_transform(X, pd.read_parquet(data)["sales"])
    assert estimator.embeddings_.crosses
    assert written.column_names[whole.num_columns :] == list(estimator.get_feature_names_out())
    found = np.stack([written[name].to_numpy() for name in written.column_names[whole.num_columns :]], axis=1)
    assert np.array_equal(found, expected)
    assert EntityEmbeddingRegressor.load(tmp_path / "s").cross_fit_ == estimator.cross_fit_
    assert not (tmp_path / "s.checkpoint").exists()


def test_new_rows_come_out_with_the_same_columns(data: Path, tmp_path: Path) -> None:
    fit(data, "--drop", "id,week", "--out", tmp_path / "s", "--train-features", tmp_path / "f.parquet")
    transform_dataset(tmp_path / "s", data, tmp_path / "out")
    written, transformed = pq.read_table(tmp_path / "f.parquet"), pq.read_table(tmp_path / "out")
    assert written.schema.remove_metadata() == transformed.schema.remove_metadata()
    assert not written.equals(transformed)


def test_groups_are_encoded_without_all_of_their_rows(data: Path, tmp_path: Path) -> None:
    options = "--drop", "id", "--group", "week", "--train-features", tmp_path / "f.parquet"
    fit(data, *options, "--out", tmp_path / "s")
    estimator, X = learned_without(data, "id", "week")
    rows = pd.read_parquet(data)
    expected = estimator.fit_transform(X, rows["sales"], groups=rows["week"])
    written = pd.read_parquet(tmp_path / "f.parquet")
    assert np.array_equal(written[list(estimator.get_feature_names_out())], expected)
    assert "week" not in EntityEmbeddingRegressor.load(tmp_path / "s").feature_names_in_


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--group", "week"), "--group is about the rows of --train-features"),
        (
            ("--train-features", "f.parquet", "--stream"),
            "--train-features takes rows in memory: add --no-stream",
        ),
        (("--train-features", "s3://there/f.parquet"), "s3://there/f.parquet is not on this machine"),
        (("--train-features", "rows.parquet"), "rows.parquet is read, or would be, as rows.parquet"),
        (("--train-features", "s"), "s would be part of s, the stored set"),
        (("--train-features", "t/../s/f.parquet"), "t/../s/f.parquet would be part of s, the stored set"),
        (("--train-features", ""), "a file to write has no name"),
        (("--out", "a/b", "--train-features", "a"), "a has to be the folder of a/b, the stored set"),
        (
            ("--train-features", "s.checkpoint/f"),
            "would be part of s.checkpoint, the training",
        ),
        (("--checkpoint", "c", "--train-features", "c"), "c would be part of c, the training so far"),
        (
            ("--train-features", "f.parquet", "--group", "weeks"),
            "no column 'weeks' (did you mean 'week'?), which group",
        ),
    ],
)
def test_what_cannot_be_written_is_said_before_the_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(data.read_bytes())
    result = CliRunner().invoke(main, ["fit", "rows.parquet", *FAST, "--out", "s", *options])
    assert result.exit_code > 0
    assert said in result.stderr
    assert os.listdir() == ["rows.parquet"]
    assert Path("rows.parquet").read_bytes() == data.read_bytes()


def test_a_set_given_as_a_uri_is_kept_apart_too(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "s" / "f.parquet"
    result = fit(data, "--out", (tmp_path / "s").as_uri(), "--train-features", place, code=1)
    assert "would be part of file://" in result.stderr
    assert os.listdir(tmp_path) == []


def test_a_file_that_the_data_links_to_is_not_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part.parquet").symlink_to(tmp_path / "real.parquet")
    (tmp_path / "real.parquet").write_bytes(data.read_bytes())
    place = tmp_path / "real.parquet"
    result = fit(tmp_path / "rows", "--out", tmp_path / "s", "--train-features", place, code=1)
    assert "is read, or would be, as" in result.stderr
    assert place.read_bytes() == data.read_bytes()


def test_rows_in_memory_are_local_ones(data: Path, tmp_path: Path) -> None:
    pattern = data.parent / "*.parquet"
    result = fit(pattern, "--out", tmp_path / "s", "--train-features", tmp_path / "f.parquet", code=2)
    assert "--train-features needs a local file or directory as DATA" in result.stderr


def test_categories_are_written_as_transform_writes_them(data: Path, tmp_path: Path) -> None:
    rows = pd.read_parquet(data).drop(columns=["id", "week"]).astype({"clerk": "category"})
    rows.to_parquet(tmp_path / "rows.parquet")
    place = tmp_path / "f.parquet"
    fit(tmp_path / "rows.parquet", "--out", tmp_path / "s", "--train-features", place)
    transform_dataset(tmp_path / "s", tmp_path / "rows.parquet", tmp_path / "out")
    written, transformed = pq.read_table(place), pq.read_table(tmp_path / "out")
    assert written.schema.remove_metadata() == transformed.schema.remove_metadata()
    assert written["clerk"].to_pylist() == rows["clerk"].tolist()


def test_views_of_text_are_text(data: Path, tmp_path: Path) -> None:
    rows = pq.read_table(data).drop_columns(["id", "week"])
    views = rows.set_column(0, "clerk", rows["clerk"].cast(pa.string_view()))
    pq.write_table(views, tmp_path / "views.parquet")
    pq.write_table(rows, tmp_path / "rows.parquet")
    for name in ("rows", "views"):
        place = tmp_path / f"{name}.features.parquet"
        fit(tmp_path / f"{name}.parquet", "--out", tmp_path / name, "--train-features", place)
    found = [pq.read_table(tmp_path / f"{name}.features.parquet") for name in ("rows", "views")]
    assert found[0].to_pydict() == found[1].to_pydict()


def test_a_file_that_cannot_get_its_name_leaves_nothing(data: Path, tmp_path: Path) -> None:
    estimator, X = learned_without(data, "id", "week")
    vectors = estimator.fit_transform(X, pd.read_parquet(data)["sales"])
    (tmp_path / "f.parquet").mkdir()
    with pytest.raises(OutputError, match=r"cannot write to .*f\.parquet: Is a directory"):
        write_training_rows(tmp_path / "f.parquet", pq.read_table(data), estimator.embeddings_, vectors)
    assert os.listdir(tmp_path) == ["f.parquet"]


def test_two_columns_of_one_name(data: Path, tmp_path: Path) -> None:
    estimator, X = learned_without(data, "id", "week")
    vectors = estimator.fit_transform(X, pd.read_parquet(data)["sales"])
    rows = pa.table({"clerk_0": np.zeros(3000)})
    with pytest.raises(InputError, match=r"two columns of the name\(s\) \['clerk_0'\]: rename"):
        write_training_rows(tmp_path / "f.parquet", rows, estimator.embeddings_, vectors)
    assert os.listdir(tmp_path) == []


def test_nothing_is_half_written_where_the_disk_is_full(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    estimator, X = learned_without(data, "id", "week")
    vectors = estimator.fit_transform(X, pd.read_parquet(data)["sales"])
    monkeypatch.setattr("embedkit.serving.output.os.fsync", full)
    with pytest.raises(OutputError, match=r"cannot write to .*f\.parquet: No space left on device"):
        write_training_rows(tmp_path / "f.parquet", pq.read_table(data), estimator.embeddings_, vectors)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_rows(data: Path, tmp_path: Path) -> None:
    options = [data, "--drop", "id,week", "--target", "sales", "--max-lr", "0.01", "--max-epochs", "40"]

    def command(folder: Path, *more: str) -> list[str]:
        places = [
            "--out",
            folder / "s",
            "--train-features",
            folder / "f.parquet",
            "--checkpoint-seconds",
            "0",
        ]
        return [sys.executable, "-m", "embedkit", "fit", *map(str, [*options, *places, *more])]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True)
    with subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (killed / "s.checkpoint" / "training.safetensors").exists():
            pass
        process.kill()
    assert process.returncode < 0
    assert not (killed / "f.parquet").exists()
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True)
    assert (killed / "f.parquet").read_bytes() == (whole / "f.parquet").read_bytes()
