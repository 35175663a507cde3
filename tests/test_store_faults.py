"""No damage to a stored set goes unnoticed, and a crash leaves the old version or the new."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_store import ATTACHMENTS, all_files, make_set

from embedkit import layout, store
from embedkit.errors import OutputError, StoreError


@pytest.fixture
def root(tmp_path) -> Path:
    """A store of two versions."""
    store.publish(tmp_path / "a.embedkit", make_set().subset(["city"]))
    store.publish(tmp_path / "a.embedkit", make_set(), attachments=ATTACHMENTS)
    return tmp_path / "a.embedkit"


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
            {"format_version": 3},
            "was written by a newer embedkit, in format version 3: this one reads up to 2, upgrade",
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


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b"\xff", layout.seal({"format_version": 1, "version": "v000002"})]
)
def test_a_manifest_that_is_none_is_refused(root, content):
    (root / "v000002" / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: restore it from a copy"):
        store.load(root)


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
