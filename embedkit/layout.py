"""What the files of a stored set hold: the bytes of its tables and of the manifest that seals them."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.crosses import Cross
from embedkit.errors import InputError, StoreError
from embedkit.tables import EmbeddingSet, EmbeddingTable, NumericColumn

# Sets without crosses are written in version 1, which earlier releases read.
FORMAT_VERSION = 2

_T = TypeVar("_T")
_Read = Callable[[str], bytes]
_CURRENT_LINE = re.compile(rb"(v\d{6,}) ([0-9a-f]{64})\n")
_KEYS = {"features", "numerics", "features_in", "metadata", "files", "version", "parent"}
_RESERVED = ("tables", "crosses", "manifest.json")
_MAX_FILE_NAME = 100


def contents(
    embedding_set: EmbeddingSet, attachments: Mapping[str, bytes]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files but the manifest, and the manifest less what depends on the version."""
    files: dict[str, bytes] = {}
    features = []
    for table in embedding_set.values():
        file = f"tables/{_file_name(table.feature, files)}"
        files[file] = _table_bytes(table.to_arrow(), ["kind"])
        features.append(_describe(table, file))
    for name, data in attachments.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or "/".join(parts) != name or parts[0] in _RESERVED:
            raise InputError(
                f"attachment {name!r} must be a relative path outside tables/, crosses/ and manifest.json"
            )
        files[name] = bytes(data)
    crosses = []
    for i, cross in enumerate(embedding_set.crosses):
        files[f"crosses/{i}.parquet"] = _table_bytes(cross.to_arrow())
        crosses.append({"features": list(cross.features), "file": f"crosses/{i}.parquet"})
    manifest = {
        "format_version": FORMAT_VERSION if crosses else 1,
        "features": features,
        "numerics": [asdict(column) for column in embedding_set.numerics],
        "features_in": list(embedding_set.features_in),
        "metadata": embedding_set.metadata,
        "files": {name: {"size": len(data), "sha256": sha256(data)} for name, data in files.items()},
    }
    return files, manifest | ({"crosses": crosses} if crosses else {})


def restore(manifest: Mapping[str, Any], read: _Read, where: str) -> EmbeddingSet:
    """Build the set that a manifest describes; `read` gives the checked bytes of a file by its name."""
    try:
        tables = [_restore_table(read, entry, where) for entry in manifest["features"]]
        numerics = [NumericColumn(**entry) for entry in manifest["numerics"]]
        crosses = [
            _restored(
                lambda table, entry=entry: Cross.from_arrow(entry["features"], table), read, entry, where
            )
            for entry in manifest.get("crosses", ())
        ]
        names = manifest["features_in"]
        return EmbeddingSet(tables, numerics, manifest["metadata"], features_in=names, crosses=crosses)
    except (InputError, KeyError, TypeError) as error:
        raise StoreError(f"{where}/manifest.json does not describe a set: {error!r}") from error


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Read a manifest, if it is whole and of a format that this version knows."""
    try:
        manifest = json.loads(data)
        written = manifest["format_version"]
        newer = written > FORMAT_VERSION
        sound = newer or (data == seal(manifest) and manifest.keys() >= _KEYS)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise StoreError(f"{where}/manifest.json is damaged: restore it from a copy")
    if newer:
        raise StoreError(
            f"{where} was written by a newer embedkit, in format version {written}: "
            f"this one reads up to {FORMAT_VERSION}, upgrade embedkit"
        )
    return manifest


def current_line(version: str, manifest: Mapping[str, Any]) -> bytes:
    """What CURRENT holds: the name of a version, and the digest of its manifest."""
    return f"{version} {manifest['sha256']}\n".encode()


def parse_current(data: bytes, where: str) -> tuple[str, str]:
    """Name of the current version, and the digest that its manifest must have."""
    match = _CURRENT_LINE.fullmatch(data)
    if match is None:
        raise StoreError(f"{where}/CURRENT is damaged: restore it, or load a version by its name")
    version, digest = match.groups()
    return version.decode(), digest.decode()


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as canonical JSON that holds the SHA-256 of itself without that entry."""
    unsealed = {key: value for key, value in manifest.items() if key != "sha256"}
    return _canonical_json(unsealed | {"sha256": sha256(_canonical_json(unsealed))})


def _canonical_json(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _file_name(feature: str, taken: Mapping[str, bytes]) -> str:
    """A file name for any feature name, also where the file system ignores case."""
    name = plain_name(feature, _MAX_FILE_NAME)
    lowered = {PurePosixPath(file).name.lower() for file in taken}
    if f"{name}.parquet".lower() in lowered:
        name = f"{name[:_MAX_FILE_NAME]}-{sha256(feature.encode())[:16]}"
    return f"{name}.parquet"


def plain_name(text: str, longest: int = 200) -> str:
    """A file name for any text; of one of more than `longest` bytes its beginning and a digest."""
    name = quote(text, safe=" ")
    return name if len(name) <= longest else f"{name[:longest]}-{sha256(text.encode())[:16]}"


def _table_bytes(table: pa.Table, repeating: Sequence[str] = ()) -> bytes:
    sink = pa.BufferOutputStream()
    # Vectors hardly repeat and hardly compress: plain pages are as small and faster to read.
    pq.write_table(table, sink, compression="none", use_dictionary=list(repeating) or False)
    return sink.getvalue().to_pybytes()


def _restored(make: Callable[[pa.Table], _T], read: _Read, entry: Mapping[str, Any], where: str) -> _T:
    data = read(entry["file"])
    try:
        # Plain pages are copied, not decoded: threads would bring nothing.
        return make(pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False))
    except (pa.ArrowException, InputError, OSError) as error:
        raise StoreError(f"{where}/{entry['file']} is not a table of vectors: {error}") from error


def _restore_table(read: _Read, entry: Mapping[str, Any], where: str) -> EmbeddingTable:
    table = _restored(EmbeddingTable.from_arrow, read, entry, where)
    if _describe(table, entry["file"]) != entry:
        raise StoreError(
            f"{where}/{entry['file']} does not fit its manifest: expected {entry}, found {table}"
        )
    return table


def _describe(table: EmbeddingTable, file: str) -> dict[str, Any]:
    return {
        "name": table.feature,
        "file": file,
        "type": str(table.categories.type),
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
    }
