"""Where a job reads: files of a dataset, their partition keys, and batches of their rows."""

import glob
import hashlib
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from embedkit.errors import InputError, did_you_mean, first_line

# Footers are small: waiting for the file system, not reading, is what takes time.
FOOTER_THREADS = 16
#: Directory name that stands for a null partition key, as in Hive.
NULL_KEY = "__HIVE_DEFAULT_PARTITION__"

_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv"}
_VISIBLE = re.compile(r"(?:[^._/][^/]*/)*[^._/][^/]*")
_READ_BUFFER = 1 << 20  # bytes
_TAIL = 1 << 16  # bytes
# What reading raises on a damaged file.
READ_ERRORS = (pa.ArrowException, OSError, EOFError)


@dataclass(frozen=True)
class SourceFile:
    """One file of a dataset.

    Attributes
    ----------
    name : str
        Path below the root of the dataset.
    path : str
        Path on its file system.
    size : int
        Bytes.
    """

    name: str
    path: str
    size: int

    @property
    def directory(self) -> str:
        """Directories between the root of the dataset and the file."""
        return self.name.rpartition("/")[0]

    @property
    def keys(self) -> dict[str, str | None]:
        """Keys and values in the names of the directories, ``key=value``; None for null."""
        pairs = [part.partition("=") for part in self.directory.split("/") if "=" in part]
        return {unquote(key): None if value == NULL_KEY else unquote(value) for key, _, value in pairs}


@dataclass(frozen=True)
class Source:
    """A dataset of Parquet or CSV files.

    Attributes
    ----------
    system : pyarrow.fs.FileSystem
    format : "parquet" or "csv"
    files : tuple of SourceFile
        In the order of their names.
    """

    system: fs.FileSystem
    format: str
    files: tuple[SourceFile, ...]


def open_source(location: str | os.PathLike) -> Source:
    """Find the files of a dataset.

    Parameters
    ----------
    location : path or URI
        A file, a directory (searched in all depths) or a pattern with ``*``, ``?``, ``[...]`` and ``**``.
        Names that begin with ``.`` or ``_`` are not found in a directory, as elsewhere.

    Raises
    ------
    InputError
        If there are no files, or files of two formats, or a name is not UTF-8.
    """
    location = os.fspath(location)
    root, pattern = _split_pattern(location)
    system, path = _resolve(root)
    info = system.get_file_info(path)
    if info.type == fs.FileType.File:
        return _of_one_format(system, [SourceFile(info.base_name, info.path, info.size)], location)
    if info.type != fs.FileType.Directory:
        raise InputError(f"{root} does not exist: give a file, a directory or a pattern that finds files")
    deep = pattern is None or "/" in pattern or "**" in pattern
    if isinstance(system, fs.LocalFileSystem):
        found = [name for name in _names_below(path, deep) if _is_wanted(name, pattern) and _format(name)]
        children = system.get_file_info([check_name(os.path.join(path, name)) for name in found])
    else:
        children = system.get_file_info(fs.FileSelector(path, recursive=deep))
    files = [
        SourceFile(child.path[len(path.rstrip("/")) + 1 :], child.path, child.size)
        for child in children
        if child.type == fs.FileType.File
    ]
    files = [file for file in files if _is_wanted(file.name, pattern)]
    return _of_one_format(system, [file for file in files if _format(file.name) is not None], location)


def check_name(path: str) -> str:
    """The path of a local file, if Arrow can open it; InputError where it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f"{os.fsencode(path)!r} is no name in UTF-8: rename it, or leave it out") from None
    return path


def _names_below(root: str, deep: bool) -> Iterator[str]:
    """Paths of files below a local directory; hidden ones are left out, and links to where they are in."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): give access to it") from error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        yield from (os.path.join(folder, name)[len(root.rstrip("/")) + 1 :] for name in names)
        visible = [name for name in folders if deep and not name.startswith((".", "_"))]
        folders[:] = [name for name in visible if not _is_loop(os.path.join(folder, name))]


def _is_loop(folder: str) -> bool:
    """Whether a directory is a link to one that it is in."""
    parents = Path(folder).parents
    return os.path.islink(folder) and os.path.realpath(folder) in map(os.path.realpath, parents)


def finds(location: str | os.PathLike, path: str) -> bool:
    """Whether a file of that path, without links, would be read with a local dataset."""
    root, pattern = _split_pattern(os.fspath(location))
    system, directory = _resolve(root)
    if not isinstance(system, fs.LocalFileSystem):
        return False
    directory = os.path.realpath(directory)
    if os.path.commonpath([directory, path]) != directory or not os.path.isdir(directory):
        return False
    return _is_wanted(os.path.relpath(path, directory), pattern)


def fingerprint(source: Source, file: SourceFile, footer_size: int | None = None) -> dict[str, object]:
    """Size and SHA-256 of the last bytes of a file, by which another file under its name shows.

    Those are the footer of a Parquet file, for whose rows there is `checksum`; of a CSV file they are all.
    """
    length = file.size if footer_size is None else min(file.size, max(_TAIL, footer_size + 8))
    try:
        with source.system.open_input_file(file.path) as stream:
            stream.seek(file.size - length)
            digest = hashlib.file_digest(stream, "sha256")
    except OSError as error:
        raise InputError(f"{file.path} cannot be read ({first_line(error)}): repair it") from error
    return {"size": file.size, "tail_sha256": digest.hexdigest()}


def checksum(source: Source, file: SourceFile, row_groups: range, columns: Collection[str]) -> int:
    """CRC-32 of the bytes of some columns of a Parquet file, by which a changed cell shows.

    Raises
    ------
    InputError
        If they cannot be read.
    """
    footer, crc = read_footer(source, file)[0], 0
    try:
        with source.system.open_input_file(file.path) as stream:
            for group in map(footer.row_group, row_groups):
                for chunk in map(group.column, range(group.num_columns)):
                    if chunk.path_in_schema.partition(".")[0] in columns or chunk.path_in_schema in columns:
                        stream.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                        for block in _blocks(stream, chunk.total_compressed_size):
                            crc = zlib.crc32(block, crc)
    except READ_ERRORS as error:
        raise InputError(f"{file.path} cannot be read ({first_line(error)}): repair it") from error
    return crc


def _blocks(stream: pa.NativeFile, size: int) -> Iterator[bytes]:
    for start in range(0, size, _READ_BUFFER):
        yield stream.read(min(_READ_BUFFER, size - start))


def read_footer(source: Source, file: SourceFile) -> tuple[pq.FileMetaData, pa.Schema]:
    """Footer of a Parquet file.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        with pq.ParquetFile(source.system.open_input_file(file.path)) as parquet:
            return parquet.metadata, parquet.schema_arrow
    except READ_ERRORS as error:
        raise InputError(
            f"{file.path} is not a readable Parquet file ({first_line(error)}): repair it"
        ) from error


def read_parquet(
    source: Source,
    file: SourceFile,
    row_groups: range,
    columns: Sequence[str],
    as_dictionary: Sequence[str],
    rows: int,
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Read some columns of some row groups, in batches of at most `rows` rows, and say where each is from.

    Parameters
    ----------
    as_dictionary : sequence of str
        String columns to keep dictionary-encoded, the fast path of lookups.

    Raises
    ------
    InputError
        If a row group cannot be read, or holds text that is not UTF-8.
    """
    place = file.path
    try:
        with pq.ParquetFile(
            source.system.open_input_file(file.path),
            read_dictionary=list(as_dictionary),
            buffer_size=_READ_BUFFER,
            page_checksum_verification=True,
        ) as parquet:
            for group in row_groups:
                place = f"{file.path}, row group {group}"
                # Units run side by side: more threads in each of them would only take more memory.
                for batch in parquet.iter_batches(
                    rows, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    batch.validate(full=True)
                    yield place, batch.select(columns)
    except READ_ERRORS as error:
        raise InputError(
            f"{place} cannot be read ({first_line(error)}): repair the file and resume"
        ) from error


def require_columns(file: SourceFile, wanted: Sequence[str], available: Sequence[str]) -> None:
    """Raise InputError where a file lacks columns."""
    missing = [name for name in wanted if name not in available]
    if missing:
        hint = did_you_mean(missing, available)
        raise InputError(f"{file.path} lacks column(s) {missing}{hint}: it has {list(available)}")


def _resolve(location: str) -> tuple[fs.FileSystem, str]:
    if "://" not in location:
        return fs.LocalFileSystem(), check_name(os.path.abspath(location))
    try:
        return fs.FileSystem.from_uri(location)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot open {location}: {first_line(error)}") from error


def _is_wanted(name: str, pattern: str | None) -> bool:
    """Whether a path below the root of a dataset is one that a job reads."""
    return bool(_VISIBLE.fullmatch(name)) and (pattern is None or bool(re.fullmatch(_regex(pattern), name)))


def _of_one_format(system: fs.FileSystem, files: Sequence[SourceFile], location: str) -> Source:
    formats = {_format(file.name) for file in files}
    if len(formats) != 1 or None in formats:
        raise InputError(
            f"{location} holds {len(files)} file(s) of format {sorted(map(str, formats))}: "
            f"expected files of one kind out of {sorted(_SUFFIXES)}"
        )
    return Source(system, formats.pop(), tuple(sorted(files, key=lambda file: file.name)))


def _split_pattern(location: str) -> tuple[str, str | None]:
    """Root without wildcards, and the pattern below it (None if there is none)."""
    if not glob.has_magic(location) or ("://" not in location and os.path.exists(location)):
        return location, None
    parts = location.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if location.startswith("/") else "."), "/".join(parts[first:])


def _regex(pattern: str) -> str:
    """Regular expression of a pattern in which ``*`` stays inside a name and ``**/`` does not."""
    tokens = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return "".join(
        tokens.get(piece) or (piece.replace("[!", "[^") if i % 2 else re.escape(piece))
        for i, piece in enumerate(pieces)
    )


def _format(name: str) -> str | None:
    return next((kind for suffix, kind in _SUFFIXES.items() if name.lower().endswith(suffix)), None)
