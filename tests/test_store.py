"""Stored sets: what goes in comes out, no damage goes unnoticed, and a crash leaves the old version or the new."""

import datetime
import errno
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from embedkit import layout, store
from embedkit.errors import InputError, OutputError, StoreError, StoreNotFoundError
from embedkit.tables import EmbeddingSet, EmbeddingTable, NumericColumn
from embedkit.vocabulary import Vocabulary

GOLDEN = Path(__file__).parent / "golden"
ATTACHMENTS = {"network.safetensors": bytes(range(256)), "report/history.parquet": b"PAR1 not really"}


def make_table(feature: str, column: pa.Array, dim: int = 2) -> EmbeddingTable:
    vocabulary = Vocabulary.fit(column, feature)
    vectors = np.arange(vocabulary.num_embeddings * dim, dtype=np.float32).reshape(-1, dim) / 3 - 1
    return EmbeddingTable(vocabulary, vectors)


def make_set() -> EmbeddingSet:
    """The set that `tests/golden` holds: never change it."""
    return EmbeddingSet(
        [
            make_table("city", pa.array(["Ulm", "Köln", None, "Bonn", "Ulm"]), 3),
            make_table("Store", pa.array([262, 3, 3, -1])),
            make_table("day/of week", pa.array([datetime.date(2024, 2, 29), None])),
            make_table("at", pa.array([datetime.datetime(2024, 2, 29, 12, 30)], pa.timestamp("us", "UTC"))),
            make_table("price", pa.array([0.5, -0.25])),
            make_table("exact", pa.array([Decimal("1.10"), Decimal("-2.00")])),
            make_table("flag", pa.array([True, False, None])),
            make_table("empty", pa.nulls(2)),
            EmbeddingTable(
                Vocabulary.fit(pa.array(["u", "v"]), "weighted", sample_weight=[0.5, 0.25]), np.eye(4)
            ),
        ],
        [NumericColumn("age", fill=40.5, center=30.0, scale=0.1, missing_scale=1.0), NumericColumn("income")],
        {"task": "multiclass", "classes": ["a", "b"], "seed": 0, "scores": {"logloss": 0.1}, "note": "Größe"},
    )


@pytest.fixture
def root(tmp_path) -> Path:
    """A store of two versions."""
    store.publish(tmp_path / "a.embedkit", make_set().subset(["city"]))
    store.publish(tmp_path / "a.embedkit", make_set(), attachments=ATTACHMENTS)
    return tmp_path / "a.embedkit"


def all_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def test_golden_directory_of_format_1_stays_readable():
    root = GOLDEN / "v1"
    assert store.verify(root) == []
    assert store.versions(root) == ["v000001", "v000002"]
    assert store.load(root).equals(make_set())
    assert store.load(root, "v000001").equals(make_set().subset(["city"]))
    for name, data in ATTACHMENTS.items():
        assert store.read_attachment(root, name) == data


def test_save_and_load(root, tmp_path):
    learned = EmbeddingSet.load(root)
    assert learned.equals(make_set())
    assert learned.save(tmp_path / "b") == "v000001"
    assert learned.save(str(tmp_path / "b"), {"x": b"1"}) == "v000002"
    assert store.read_attachment(tmp_path / "b", "x") == b"1"
    assert EmbeddingSet.load(tmp_path / "b").equals(learned)
    assert EmbeddingSet.load((tmp_path / "b").as_uri(), "v000001").equals(learned)


def test_versions_and_their_parents(root):
    assert store.versions(root) == ["v000001", "v000002"]
    assert store.current_version(root) == "v000002"
    assert list(store.load(root, "v000001")) == ["city"]
    parents = [
        json.loads((root / name / "manifest.json").read_bytes())["parent"] for name in store.versions(root)
    ]
    assert parents == [None, "v000001"]
    assert store.verify(root) == []


def test_the_same_content_gives_the_same_bytes(root, tmp_path):
    other = tmp_path / "elsewhere" / "b"
    store.publish(other, make_set().subset(["city"]))
    store.publish(other, store.load(root), attachments=ATTACHMENTS)
    assert all_files(other) == all_files(root)


def test_the_layout_on_disk(root):
    names = [name for name in all_files(root) if name.startswith("v000002")]
    tables = ["Store", "at", "city", "day%2Fof week", "empty", "exact", "flag", "price", "weighted"]
    assert names == [
        "v000002/manifest.json",
        "v000002/network.safetensors",
        "v000002/report/history.parquet",
        *(f"v000002/tables/{name}.parquet" for name in tables),
    ]


feature_names = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(
        ["..", ".", "", "a/b", "/", "A", "a", "AUX", "a%2Fb", "\0", "x" * 300, "x" * 299 + "y", "ä" * 90]
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(feature_names, min_size=1, max_size=6, unique=True), st.integers(0, 2**32))
def test_any_feature_name_is_a_safe_file_name(tmp_path, names, number):
    learned = EmbeddingSet([make_table(name, pa.array([name]), 1) for name in names])
    files, _ = layout.contents(learned, {})
    assert all(file.startswith("tables/") and file.count("/") == 1 and len(file) < 200 for file in files)
    assert len({file.lower() for file in files}) == len(names)
    root = tmp_path / str(number)
    version = store.publish(root, learned)
    assert store.load(root, version).equals(learned)
    assert store.verify(root) == []


@pytest.mark.parametrize(
    "dtype",
    [
        *(pa.timestamp(unit, tz) for unit in ("s", "ms", "us", "ns") for tz in (None, "UTC", "Europe/Paris")),
        *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
        *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.date32(), pa.date64()),
        *(pa.int8(), pa.uint32(), pa.float16(), pa.float32(), pa.decimal128(30, 2), pa.decimal256(40, 2)),
        *(pa.decimal32(5, 2), pa.decimal64(12, 2), pa.large_string(), pa.string_view()),
    ],
    ids=str,
)
def test_every_type_of_category_survives(tmp_path, dtype):
    # Whole days, which every type can hold.
    cells = pa.array(
        [0, 86_400_000, None, 172_800_000] if dtype == pa.date64() else [0, 1, None, 2], pa.int64()
    )
    if pa.types.is_decimal(dtype):
        column = cells.cast(pa.decimal128(21, 2)).cast(dtype)
    elif pa.types.is_string_view(dtype) or pa.types.is_large_string(dtype):
        column = cells.cast(pa.string()).cast(dtype)
    else:
        width = pa.int32() if dtype in (pa.time32("s"), pa.time32("ms"), pa.date32()) else pa.int64()
        column = cells.cast(width).cast(dtype)
    table = make_table("c", column)
    store.publish(tmp_path, EmbeddingSet([table]))
    loaded = store.load(tmp_path)["c"]
    assert loaded.equals(table)
    assert loaded.encode(column).tolist() == [2, 3, 0, 4]


def test_loading_imports_neither_torch_nor_sklearn_nor_pandas(root):
    code = f"""
import sys
from embedkit.tables import EmbeddingSet
import pyarrow as pa
learned = EmbeddingSet.load({str(root)!r})
frame = pa.table({{"city": learned["city"].categories[:2], "income": learned["price"].categories}})
assert learned.subset(["city", "income"]).transform(frame).shape == (2, 4)
heavy = {{"torch", "sklearn", "pandas", "narwhals", "matplotlib", "pyarrow.dataset"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- damage


def read_everything(root: Path) -> None:
    """Load the current version with all that is attached."""
    store.load(root)
    for name in ATTACHMENTS:
        store.read_attachment(root, name)


def assert_found(root: Path, file: str) -> None:
    """A damaged file shows in `verify`, and in reading if it belongs to the current version."""
    assert store.verify(root), file
    if not file.startswith("v000001"):
        with pytest.raises(StoreError) as caught:
            read_everything(root)
        assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_found(root):
    for file, data in all_files(root).items():
        bits = 8 * len(data)
        # An odd step visits every position in a byte.
        step = bits // 40 | 1
        for bit in range(0, bits, step):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            (root / file).write_bytes(damaged)
            assert_found(root, file)
        (root / file).write_bytes(data)
    assert store.verify(root) == []


def test_every_truncated_grown_or_deleted_file_is_found(root):
    for file, data in all_files(root).items():
        for spoiled in (data[:-1], data[: len(data) // 2], b"", data + b"\0", data + data, None):
            if spoiled is None:
                (root / file).unlink()
            else:
                (root / file).write_bytes(spoiled)
            assert_found(root, file)
        (root / file).write_bytes(data)
    assert store.verify(root) == []


def test_two_tables_that_changed_places_are_found(root):
    first, second = root / "v000002/tables/city.parquet", root / "v000002/tables/Store.parquet"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert len(store.verify(root)) == 2


def test_versions_that_changed_places_are_found(root):
    (root / "v000001").rename(root / "aside")
    (root / "v000002").rename(root / "v000001")
    with pytest.raises(StoreError, match="v000001 holds version v000002: move it back to its name"):
        store.load(root, "v000001")
    (root / "aside").rename(root / "v000002")
    with pytest.raises(StoreError, match="v000002 holds version v000001"):
        store.load(root)
    assert len(store.verify(root)) == 3


def test_strays_are_found(root):
    (root / "v000001" / "tables" / "extra.parquet").write_bytes(b"")
    (root / "notes.txt").write_bytes(b"")
    (root / ".tmp-123").mkdir()
    problems = store.verify(root)
    assert [problem.partition(str(root))[2].split()[0] for problem in problems] == [
        "/v000001/tables/extra.parquet",
        "/.tmp-123",
        "/notes.txt",
    ]
    read_everything(root)


def reseal(root: Path, **changes: object) -> None:
    """Write a manifest that is whole but says something else, and point CURRENT at it."""
    path = root / "v000002" / "manifest.json"
    sealed = layout.seal(json.loads(path.read_bytes()) | changes)
    path.write_bytes(sealed)
    (root / "CURRENT").write_bytes(layout.current_line("v000002", json.loads(sealed)))


FEATURE = {
    "name": "city",
    "file": "tables/city.parquet",
    "type": "string",
    "num_embeddings": 5,
    "embedding_dim": 3,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 2},
            "was written by a newer embedkit, in format version 2: this one reads up to 1, upgrade",
        ),
        ({"format_version": "1"}, "manifest.json is damaged"),
        (
            {"features": [FEATURE | {"embedding_dim": 4}]},
            r"city.parquet does not fit its manifest: expected .*4.*, found .*3",
        ),
        ({"features": [FEATURE | {"type": "int64"}]}, "does not fit its manifest"),
        ({"features": [FEATURE | {"file": "tables/Store.parquet"}]}, "does not fit its manifest"),
        ({"features": [FEATURE | {"file": "network.safetensors"}]}, "is not a table of vectors"),
        ({"features": [FEATURE | {"file": "../../secret"}]}, "does not describe a set: KeyError"),
        ({"numerics": [{"name": "age"}]}, "does not describe a set: TypeError"),
        ({"features_in": ["city"]}, "does not describe a set: InputError"),
    ],
)
def test_a_manifest_that_lies_is_refused(root, changes, message):
    reseal(root, **changes)
    with pytest.raises(StoreError, match=message):
        store.load(root)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff", b'{"format_version": 1}'])
def test_a_manifest_that_is_none_is_refused(root, content):
    (root / "v000002" / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match="manifest.json is damaged: restore it from a copy"):
        store.load(root)


def test_what_is_not_there(root, tmp_path):
    for missing in (lambda: store.load(tmp_path / "none"), lambda: store.verify(tmp_path / "none")):
        with pytest.raises(StoreNotFoundError, match="none/CURRENT does not exist"):
            missing()
    for version in ("v000009", "latest", "../v000001"):
        with pytest.raises(StoreNotFoundError, match=version):
            store.load(root, version)
    with pytest.raises(StoreNotFoundError, match=r"no file 'x', it has \['network.safetensors', 'report/"):
        store.read_attachment(root, "x")
    assert store.versions(tmp_path / "none") == []


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../x", "a//b", "tables/x", "manifest.json", "./x"])
def test_attachments_stay_inside_their_version(tmp_path, name):
    with pytest.raises(InputError, match="must be a relative path outside tables/ and manifest.json"):
        store.publish(tmp_path, make_set(), attachments={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=f"^cannot write to {root}: ") as caught:
            store.publish(root, make_set())
        assert "\n" not in str(caught.value)


def test_unknown_kind_of_uri():
    with pytest.raises(InputError, match="cannot open gopher://x/y: "):
        store.load("gopher://x/y")


# ---- crashes and races


def test_a_full_disk_leaves_nothing_behind(root, monkeypatch):
    before = all_files(root)
    calls = iter(range(1000))

    def fsync(_: int) -> None:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="No space left on device"):
        store.publish(root, make_set())
    assert all_files(root) == before
    assert store.verify(root) == []


CRASHES = """
import os, signal, sys
from embedkit import store

root = sys.argv[1]
learned = store.load(root)
for step in range(1000):
    child = os.fork()
    if child == 0:
        calls = iter(range(1000))
        def dying(call):
            def wrapper(*args, **kwargs):
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapper
        for name in ("mkdir", "fsync", "rename", "replace"):
            setattr(os, name, dying(getattr(os, name)))
        store.publish(root, learned)
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    assert store.load(root).equals(learned)
    problems = [problem for problem in store.verify(root) if "interrupted publish" not in problem]
    assert not problems, problems
    print(step, killed, store.current_version(root))
    if not killed:
        break
"""


def test_kill_9_at_any_step_leaves_the_old_version_or_the_new(tmp_path):
    root = tmp_path / "a"
    store.publish(root, make_set().subset(["city"]), attachments={"deep/file": b"1"})
    run = subprocess.run(
        [sys.executable, "-c", CRASHES, str(root)], check=True, capture_output=True, text=True
    )
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) > 10
    assert [killed for _, killed, _ in lines] == ["True"] * (len(lines) - 1) + ["False"]
    assert {current for *_, current in lines[:8]} == {"v000001"}
    assert lines[-1][2] == store.versions(root)[-1]


PUBLISHES = """
import sys
from embedkit import store

learned = store.load(sys.argv[1])
sys.stdin.readline()
for _ in range(15):
    print(store.publish(sys.argv[1], learned))
"""


def test_concurrent_publishers_lose_nothing(tmp_path):
    root = tmp_path / "a"
    store.publish(root, make_set().subset(["city"]))
    command = [sys.executable, "-c", PUBLISHES, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    published = []
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        published += process.communicate()[0].split()
        assert process.returncode == 0
    assert sorted(published) == [f"v{number:06}" for number in range(2, 32)]
    assert store.versions(root) == ["v000001", *sorted(published)]
    assert store.current_version(root) == "v000031"
    assert store.verify(root) == []


@pytest.mark.parametrize("call", ["rename", "replace"])
def test_a_publish_overtaken_by_another(root, monkeypatch, call):
    real, other = getattr(os, call), make_set().subset(["flag"])

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.undo()
        assert store.publish(root, other) == ("v000003" if call == "rename" else "v000004")
        real(source, target)

    monkeypatch.setattr(os, call, overtaken)
    mine = store.publish(root, make_set())
    assert mine == ("v000004" if call == "rename" else "v000003")
    assert store.load(root, mine).equals(make_set())
    assert store.current_version(root) == "v000004"
    assert store.verify(root) == []


def test_a_file_system_without_rename(tmp_path, monkeypatch):
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(store, "_resolve", lambda root: (remote, root.removeprefix("s3://")))
    learned = make_set()
    assert store.publish("s3://bucket/a", learned, attachments=ATTACHMENTS) == "v000001"
    assert store.publish("s3://bucket/a", learned) == "v000002"
    assert store.load("s3://bucket/a").equals(learned)
    assert store.read_attachment("s3://bucket/a", "report/history.parquet", "v000001") == b"PAR1 not really"
    assert store.verify("s3://bucket/a") == []
    (tmp_path / "bucket/a/v000001/tables/city.parquet").write_bytes(b"")
    assert len(store.verify("s3://bucket/a")) == 1
