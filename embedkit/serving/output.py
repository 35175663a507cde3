"""Where a job writes: parts that appear whole, records of what is done, and an output that appears last.

::

    .features.partial/lock          held while a job runs
    .features.partial/job.json      what is being made
    .features.partial/embeddings/   the set, where workers in other processes have to look it up
    .features.partial/records/      one file per finished unit of work
    .features.partial/data/         the parts; renamed to `features` when the manifest is in it

Everything that counts is written to a temporary sibling, synced and renamed, so a job that is killed at any
moment leaves nothing that a later one could take for finished work.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from embedkit.errors import EmbedkitError, InputError, OutputError, first_line
from embedkit.layout import seal
from embedkit.store import sync

if TYPE_CHECKING:
    import pandas as pd

#: Name of the file that makes an output complete; readers of Parquet datasets skip names with an underscore.
MANIFEST = "_manifest.json"

_TEMPORARY = ".tmp-"


class PartFile:
    """A Parquet file that appears under its name when it is complete and safe on the disk.

    Parameters
    ----------
    root : Path
        Root of the dataset.
    name : str
        Path of the file below it.
    schema : pa.Schema
    options : dict
        For `pyarrow.parquet.ParquetWriter`.
    """

    def __init__(self, root: Path, name: str, schema: pa.Schema, options: Mapping[str, Any]) -> None:
        self._name, self._path = name, root / name
        if not root.is_dir():  # a worker that everybody took for dead must not begin anew
            raise FileNotFoundError(errno.ENOENT, "the job is over", str(root))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        self._digest, self._size, self._rows = hashlib.sha256(), 0, 0
        self._dropped = False
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - closed in close and discard
        self._writer = None
        try:
            self._writer = pq.ParquetWriter(pa.PythonFile(self, mode="w"), schema, **options)
        except BaseException:
            self.discard()
            raise

    @property
    def closed(self) -> bool:
        """Whether the file is closed; pyarrow asks."""
        return self._file.closed

    def write(self, data: bytes) -> int:
        """Take bytes from the Parquet writer, and hash them on their way."""
        if self._dropped:
            return len(data)
        view = memoryview(data)
        self._digest.update(view)
        self._size += len(view)
        while len(view):
            view = view[self._file.write(view) :]
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back here; pyarrow asks."""

    def append(self, table: pa.Table) -> None:
        """Write a table as one row group."""
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._rows += table.num_rows

    def close(self) -> dict[str, Any]:
        """Give the file its name; return path, size, SHA-256 and number of rows."""
        self._writer.close()
        self._writer = None  # it holds this file, and a cycle would keep its buffers until some collection
        os.fsync(self._file.fileno())
        self._file.close()
        try:
            os.replace(self._temporary, self._path)
        except OSError:
            self._temporary.unlink(missing_ok=True)
            raise
        sync(self._path.parent)
        digest = self._digest.hexdigest()
        return {"path": self._name, "size": self._size, "sha256": digest, "rows": self._rows}

    def discard(self) -> None:
        """Remove the file if it is not finished."""
        if self._file.closed:
            return
        self._dropped = True  # a Parquet writer writes a footer when it goes, come what may
        with suppress(OSError, pa.ArrowException):
            if self._writer is not None:
                self._writer.close()
        self._writer = None
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class JobFolder:
    """The folder beside an output in which a job works; see the module's description.

    Parameters
    ----------
    output : path
        Where the result is to appear.
    """

    def __init__(self, output: str | os.PathLike) -> None:
        self.output = Path(os.path.realpath(output))
        self.root = self.output.with_name(f".{self.output.name}.partial")
        self.data = self.root / "data"
        self.embeddings = self.root / "embeddings"
        self._job = self.root / "job.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make sure that no other job writes to the same output; a job that dies gives the lock back.

        Raises
        ------
        OutputError
            If another job is at it.
        """
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            with open(self.root / "lock", "ab") as file:
                lock_or_refuse(
                    file.fileno(),
                    f"another job is writing {self.output}: wait for it, or choose another output",
                )
                if not _is_at(file.fileno(), self.root / "lock"):
                    continue  # the other job has just finished and taken its folder away
                self._tidy()
                try:
                    yield
                finally:
                    if not self._job.exists() and _is_at(file.fileno(), self.root / "lock"):
                        self.remove()  # nothing was begun
                return

    def settings(self) -> dict[str, Any] | None:
        """Settings of the unfinished job that is in the folder; None if there is none."""
        return read_sealed(self._job)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Remember what is being made. From here on the job can be resumed."""
        self.data.mkdir()
        self._records.mkdir()
        write_atomic(self._job, seal(settings))

    def clear(self) -> None:
        """Throw away everything but the lock."""
        self._job.unlink(missing_ok=True)
        for part in (self.data, self.embeddings, self._records):
            shutil.rmtree(part, ignore_errors=True)

    def record(self, index: int, content: Mapping[str, Any]) -> None:
        """Note that a unit of work is finished; its parts are on the disk."""
        write_atomic(self._records / f"{index:06d}.json", seal(content))

    def recorded(self, index: int) -> dict[str, Any] | None:
        """What was noted about a unit of work, if all its parts are there."""
        record = read_sealed(self._records / f"{index:06d}.json")
        if record is None:
            return None
        return record if all(is_whole(self.data, part) for part in record["files"]) else None

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Put the manifest beside the parts, and give the result its name. What is at that name now goes."""
        parts = {part["path"] for unit in manifest["units"] for part in unit["files"]}
        write_atomic(self.data / MANIFEST, seal(manifest))
        _sweep(self.data, parts | {MANIFEST})
        if self.output.exists():
            os.rename(self.output, self.root / f"replaced-{uuid.uuid4().hex}")
        os.rename(self.data, self.output)
        sync(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Take the folder away; in one step, so that nobody waits for a lock that is being deleted."""
        done = self.root.with_name(f"{self._done_name()}{uuid.uuid4().hex}")
        os.rename(self.root, done)
        shutil.rmtree(done, ignore_errors=True)  # the next job may be at it too

    @property
    def _records(self) -> Path:
        return self.root / "records"

    def _tidy(self) -> None:
        """Finish what a job was killed at while it put its result in place."""
        for left in self.output.parent.glob(f"{glob.escape(self._done_name())}*"):
            shutil.rmtree(left, ignore_errors=True)
        for replaced in self.root.glob("replaced-*"):
            if not self.output.exists():
                os.rename(replaced, self.output)

    def _done_name(self) -> str:
        return f".{self.output.name}.done-"


@contextmanager
def writing(folder: JobFolder) -> Iterator[None]:
    """Turn an error of the file system into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, EmbedkitError):
            raise
        cure = "make room"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            cure = "allow more files (ulimit -n) or partition by a column with fewer values"
        elif error.errno == errno.ENAMETOOLONG:
            cure = "partition by a column with shorter values"
        raise OutputError(
            f"cannot write to {folder.root}: {error.strerror or error}; "
            f"finished work is kept, {cure} and resume"
        ) from error


def verify_output(output: str | os.PathLike) -> list[str]:
    """Check an output of `transform_dataset` against its manifest.

    Returns
    -------
    list of str
        Problems, one line each; empty if every file is there, unchanged, and no other.

    Raises
    ------
    InputError
        If there is no complete output.
    """
    root = Path(output)
    manifest = read_sealed(root / MANIFEST)
    if manifest is None:
        raise InputError(
            f"{root} has no sound {MANIFEST}: the job that wrote it did not finish, run it again"
        )
    expected = {part["path"]: part for unit in manifest["units"] for part in unit["files"]}
    problems = []
    for path, part in expected.items():
        if not (root / path).is_file():
            problems.append(f"{root / path} is missing")
        elif _file_sha256(root / path) != part["sha256"]:
            problems.append(f"{root / path} is damaged: its SHA-256 is not that of the manifest")
    found = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
    problems += [f"{root / path} is not in the manifest" for path in sorted(found - {*expected, MANIFEST})]
    return problems


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Read JSON written by `seal`; None if it is not there or not whole."""
    try:
        data = path.read_bytes()
        content = json.loads(data)
        return content if seal(content) == data else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def lock_or_refuse(descriptor: int, message: str) -> None:
    """Lock an open file or directory until it is closed; OutputError where another process has done so."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(message) from error


def local_path(location: str | os.PathLike) -> str | None:
    """The path of a path or ``file:`` URI; None for a URI of another file system."""
    location = os.fspath(location)
    if "://" not in location:
        return location
    if not location.startswith("file://"):
        return None
    try:
        return fs.FileSystem.from_uri(location)[1]
    except pa.ArrowException as error:
        raise InputError(
            f"{location} is no URI of a local file ({first_line(error)}): give a path"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that appears whole, under a name that survives a power cut."""
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_frame(frame: "pd.DataFrame", path: str | os.PathLike) -> None:
    """Write a frame as a Parquet file that appears whole, in a directory that is made if need be.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, frame.to_parquet(index=False))
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error


def _sweep(root: Path, keep: set[str]) -> None:
    """Delete what workers that died have left, and make every folder's names safe."""
    for folder, _, names in os.walk(root, topdown=False):
        path = Path(folder)
        for name in names:
            if (path / name).relative_to(root).as_posix() not in keep:
                (path / name).unlink()
        if path != root and not any(path.iterdir()):
            path.rmdir()
        else:
            sync(path)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_whole(root: Path, part: Mapping[str, Any]) -> bool:
    """Whether a part that was recorded is there and has its size."""
    try:
        return (root / part["path"]).stat().st_size == part["size"]
    except FileNotFoundError:
        return False


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
