"""Whether a place can be written to, before the work that leads to it."""

import os
import tempfile
from pathlib import Path

from embedkit import store
from embedkit.errors import InputError, OutputError, StoreNotFoundError


def check_output(root: str | os.PathLike, data: str | None = None) -> None:
    """Make sure that a stored set can be written, before the work that leads to it; leaves nothing behind.

    Parameters
    ----------
    root : path or URI
        Root of a stored set, to be made or to get another version.
    data : path or URI, optional
        What is learned from.

    Raises
    ------
    InputError
        If the set would be read with the data.
    OutputError
        If it cannot be written, or is there and is no stored set.
    StoreError
        If it is a stored set that is damaged.
    """
    from embedkit.serving.output import local_path
    from embedkit.serving.sources import finds

    root = os.fspath(root)
    local = None if data is None else local_path(root)
    if local is not None and finds(data, os.path.realpath(f"{local}/v000001/tables/x.parquet")):
        raise InputError(f"{root} lies in {data} and would be read with it: choose another place")
    if "://" in root:
        store.versions(root)
        return
    path = Path(root)
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write to {root}: it is a file, choose another name")
    if path.is_dir() and any(path.iterdir()):
        try:
            store.current_version(path)
        except StoreNotFoundError as error:
            if store.holds_other_files(path):
                raise OutputError(
                    f"cannot write to {root}: it holds other files and no stored set, choose another name"
                ) from error
    check_writable(path)


def check_file(
    path: str | os.PathLike, data: str, out: str | None = None, checkpoint: str | None = None
) -> None:
    """Make sure that a file can be written, before the work that leads to it; leaves nothing behind.

    Parameters
    ----------
    path : path
        A file to be made, or to be replaced.
    data : path or URI
        What is learned from.
    out : path or URI, optional
        Root of the set that is stored, too.
    checkpoint : path, optional
        Directory of the training so far, which is removed after it.

    Raises
    ------
    InputError
        If the file has no name or is no local one, is of the data or would be read with it, or has its place
        in, or around, the stored set or the checkpoint.
    OutputError
        If it cannot be written.
    """
    from embedkit.serving.output import local_path

    path = os.fspath(path)
    if not path:
        raise InputError("a file to write has no name: give a path")
    if "://" in path:
        raise InputError(f"{path} is not on this machine: give a path, and copy the file from there")
    real = Path(os.path.realpath(path))
    if _is_read(str(real), data):
        raise InputError(f"{path} is read, or would be, as {data}: choose another place")
    for place, what in ((out, "the stored set"), (checkpoint, "the training so far")):
        local = None if place is None else local_path(place)
        if local is None:
            continue
        root = Path(os.path.realpath(local))
        if root in (real, *real.parents):
            raise InputError(f"{path} would be part of {place}, {what}: choose another place")
        if real in root.parents:
            raise InputError(f"{path} has to be the folder of {place}, {what}: choose another place")
    check_writable(path)


def _is_read(real: str, data: str) -> bool:
    """Whether a path without links is one of the files of the data, or would be found with them."""
    from embedkit.serving.output import local_path
    from embedkit.serving.sources import finds, open_source

    local = local_path(data)
    if local is None:
        return False
    if real == os.path.realpath(local) or finds(local, real):
        return True
    return os.path.isdir(local) and real in {os.path.realpath(file.path) for file in open_source(local).files}


def check_writable(path: str | os.PathLike) -> None:
    """Make sure that a new directory or file can be made; leaves nothing behind.

    Raises
    ------
    OutputError
        If it cannot.
    """
    path = Path(path)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        if existing != path or path.is_dir():
            tempfile.TemporaryDirectory(prefix=".embedkit-", dir=existing).cleanup()
        else:
            path.open("ab").close()
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror} ({existing})") from error
