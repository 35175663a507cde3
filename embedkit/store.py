"""An EmbeddingSet on disk: Parquet tables under a checksummed manifest, in numbered versions.

::

    CURRENT                     name of the current version and the SHA-256 of its manifest
    v000001/manifest.json       size and SHA-256 of every file, columns, settings, parent version
    v000001/tables/*.parquet    one table per feature
    v000001/...                 attachments: network weights, history, pictures

A version is written to a temporary sibling, synced and renamed; only then does CURRENT move, so a reader sees
the old version or the new one, whole. The manifest is canonical JSON that holds its own digest, so no bit of
any file can change unnoticed. No file holds a time or a path: the same content gives the same bytes.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from embedkit.errors import EmbedkitError, InputError, OutputError, StoreError, StoreNotFoundError
from embedkit.layout import contents, current_line, parse_current, restore, seal, sha256, unseal
from embedkit.tables import EmbeddingSet

_VERSION_NAME = re.compile(r"v(\d{6,})")
_TEMPORARY = ".tmp-"


def publish(
    root: str | os.PathLike, embedding_set: EmbeddingSet, *, attachments: Mapping[str, bytes] | None = None
) -> str:
    """Store a set as the next version, and make it the current one.

    Parameters
    ----------
    root : path or URI
        A local directory (made if need be) or a URI known to `pyarrow.fs`. On a local file system publishing
        is atomic, and of two processes that publish at once the later one takes the next number. Elsewhere
        there is no rename: files come first, then the manifest, then CURRENT, and one process may publish.
    embedding_set : EmbeddingSet
    attachments : mapping of str to bytes, optional
        Further files by their path inside the version, such as ``"network.safetensors"``.

    Returns
    -------
    str
        Name of the version, such as ``"v000001"``.

    Raises
    ------
    OutputError
        If it cannot be written.
    StoreError
        If the root holds a damaged CURRENT.
    InputError
        If an attachment's name is no relative path, or is taken by the store itself.
    """
    files, manifest = contents(embedding_set, attachments or {})
    system, path = _resolve(root)
    try:
        if isinstance(system, fs.LocalFileSystem):
            return _publish_local(Path(path), files, manifest)
        return _publish_remote(system, path, files, manifest)
    except EmbedkitError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {os.fspath(root)}: {error.strerror or error}") from error


def load(root: str | os.PathLike, version: str | None = None) -> EmbeddingSet:
    """Load a stored set; every file read is checked against its SHA-256.

    Parameters
    ----------
    root : path or URI
    version : str, optional
        Name of a version; the current one by default.

    Raises
    ------
    StoreNotFoundError
        If there is no such set or version.
    StoreError
        If a file is missing, damaged, or of a newer format.
    """
    system, path, manifest = _open(root, version)
    return restore(manifest, lambda name: _read_checked(system, path, manifest, name), path)


def read_attachment(root: str | os.PathLike, name: str, version: str | None = None) -> bytes:
    """Read an attached file, checked against its SHA-256.

    Raises
    ------
    StoreNotFoundError
        If there is no such set, version or file.
    StoreError
        If it is damaged.
    """
    system, path, manifest = _open(root, version)
    if name not in manifest["files"]:
        raise StoreNotFoundError(f"{path} has no file {name!r}, it has {sorted(manifest['files'])}")
    return _read_checked(system, path, manifest, name)


def versions(root: str | os.PathLike) -> list[str]:
    """Name all versions, oldest first; none where there is no store."""
    return _versions(*_resolve(root))


def holds_other_files(root: str | os.PathLike) -> bool:
    """Whether a local directory holds what no store does; one that was killed at its first version may."""
    names = os.listdir(root)
    return not all(name.startswith(_TEMPORARY) or _VERSION_NAME.fullmatch(name) for name in names)


def current_version(root: str | os.PathLike) -> str:
    """Name the current version.

    Raises
    ------
    StoreNotFoundError
        If there is no stored set.
    StoreError
        If CURRENT or the manifest of that version is damaged.
    """
    return _open(root, None)[2]["version"]


def verify(root: str | os.PathLike) -> list[str]:
    """Check every version, every file and CURRENT.

    Returns
    -------
    list of str
        Problems, one line each; empty if the store is sound.

    Raises
    ------
    StoreNotFoundError
        If there is no stored set.
    """
    system, path = _resolve(root)
    names = _versions(system, path)
    problems = []
    try:
        _open(root, None)
    except StoreError as error:
        if not names and isinstance(error, StoreNotFoundError):
            raise
        problems.append(str(error))
    for name in names:
        try:
            problems += _verify_version(system, f"{path}/{name}", name)
        except StoreError as error:
            problems.append(str(error))
    for info in _entries(system, fs.FileSelector(path)):
        if info.base_name.startswith(_TEMPORARY):
            problems.append(
                f"{info.path} is left from an interrupted publish, or one is running: delete it if not"
            )
        elif info.base_name not in (*names, "CURRENT"):
            problems.append(f"{info.path} does not belong to the store: delete it")
    return problems


def _resolve(root: str | os.PathLike) -> tuple[fs.FileSystem, str]:
    root = os.fspath(root)
    if "://" not in root:
        return fs.LocalFileSystem(), os.path.abspath(root)
    try:
        system, path = fs.FileSystem.from_uri(root)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot open {root}: {error}") from error
    return system, path.rstrip("/")


def _entries(system: fs.FileSystem, selector: fs.FileSelector) -> list[fs.FileInfo]:
    return sorted(system.get_file_info(selector), key=lambda info: info.path)


def _versions(system: fs.FileSystem, path: str) -> list[str]:
    if system.get_file_info(path).type != fs.FileType.Directory:
        return []
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = [info.base_name for info in found if _VERSION_NAME.fullmatch(info.base_name)]
    return sorted(names, key=_number)


def _number(name: str) -> int:
    return int(name.removeprefix("v"))


def _read(system: fs.FileSystem, path: str) -> bytes:
    try:
        with system.open_input_stream(path) as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreNotFoundError(f"{path} does not exist") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def _read_current(system: fs.FileSystem, path: str) -> tuple[str, str]:
    try:
        return parse_current(_read(system, f"{path}/CURRENT"), path)
    except StoreNotFoundError as error:
        raise StoreNotFoundError(f"no stored set at {path}: {error}") from error


def _open(root: str | os.PathLike, version: str | None) -> tuple[fs.FileSystem, str, dict[str, Any]]:
    """File system, path and manifest of a version."""
    system, path = _resolve(root)
    digest = None
    if version is None:
        version, digest = _read_current(system, path)
    elif not _VERSION_NAME.fullmatch(version):
        raise StoreNotFoundError(f"{path} has no version {version!r}, it has {_versions(system, path)}")
    manifest = _read_manifest(system, f"{path}/{version}", version)
    if digest not in (None, manifest["sha256"]):
        raise StoreError(f"{path}/CURRENT does not fit the manifest of {version}: one of them is damaged")
    return system, f"{path}/{version}", manifest


def _read_manifest(system: fs.FileSystem, path: str, version: str) -> dict[str, Any]:
    manifest = unseal(_read(system, f"{path}/manifest.json"), path)
    if manifest["version"] != version:
        raise StoreError(f"{path} holds version {manifest['version']}: move it back to its name")
    return manifest


def _read_checked(system: fs.FileSystem, path: str, manifest: Mapping[str, Any], name: str) -> bytes:
    expected = manifest["files"][name]
    try:
        data = _read(system, f"{path}/{name}")
    except StoreNotFoundError as error:
        raise StoreError(f"{path}/{name} is missing: restore it from a copy") from error
    if len(data) != expected["size"]:
        raise StoreError(f"{path}/{name} is damaged: {len(data)} bytes, expected {expected['size']}")
    if sha256(data) != expected["sha256"]:
        raise StoreError(f"{path}/{name} is damaged: its SHA-256 is not that of the manifest")
    return data


def _verify_version(system: fs.FileSystem, path: str, version: str) -> list[str]:
    problems = []
    manifest = _read_manifest(system, path, version)
    for name in manifest["files"]:
        try:
            _read_checked(system, path, manifest, name)
        except StoreError as error:
            problems.append(str(error))
    expected = {f"{path}/{name}" for name in (*manifest["files"], "manifest.json")}
    for info in _entries(system, fs.FileSelector(path, recursive=True)):
        if info.type != fs.FileType.Directory and info.path not in expected:
            problems.append(f"{info.path} is not in the manifest: delete it")
    return problems


def _next_version(system: fs.FileSystem, path: str, manifest: dict[str, Any]) -> tuple[str, bytes]:
    """Name of the version after the last, and the manifest for it."""
    names = _versions(system, path)
    name = f"v{_number(names[-1]) + 1 if names else 1:06d}"
    try:
        parent = _read_current(system, path)[0]
    except StoreNotFoundError:
        parent = None
    return name, seal(manifest | {"version": name, "parent": parent})


def _current_line(system: fs.FileSystem, path: str, version: str) -> bytes:
    return current_line(version, _read_manifest(system, f"{path}/{version}", version))


def _publish_local(root: Path, files: Mapping[str, bytes], manifest: dict[str, Any]) -> str:
    system = fs.LocalFileSystem()
    temporary = root / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        for name, data in files.items():
            _write_synced(temporary / name, data)
        while True:
            version, sealed = _next_version(system, str(root), manifest)
            _write_synced(temporary / "manifest.json", sealed)
            for folder, _, _ in os.walk(temporary):
                sync(folder)
            try:
                os.rename(temporary, root / version)
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # else another process has taken this number: try the next
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Whoever comes last points at the newest version, so that a slower process cannot set CURRENT back.
    pointed = None
    while pointed != (newest := _versions(system, str(root))[-1]):
        _write_synced(temporary, _current_line(system, str(root), newest))
        os.replace(temporary, root / "CURRENT")
        sync(root)
        pointed = newest
    return version


def _publish_remote(
    system: fs.FileSystem, path: str, files: Mapping[str, bytes], manifest: dict[str, Any]
) -> str:
    version, sealed = _next_version(system, path, manifest)
    for name, data in (*files.items(), ("manifest.json", sealed)):
        _write(system, f"{path}/{version}/{name}", data)
    _write(system, f"{path}/CURRENT", _current_line(system, path, version))
    return version


def _write(system: fs.FileSystem, path: str, data: bytes) -> None:
    system.create_dir(path.rpartition("/")[0], recursive=True)
    with system.open_output_stream(path) as stream:
        stream.write(data)


def _write_synced(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: str | os.PathLike) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
