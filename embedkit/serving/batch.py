"""Batch jobs: a dataset of any size becomes a dataset of features, in flat memory, whole or not at all."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs
from tqdm import tqdm

from embedkit import store as stored
from embedkit.errors import InputError, OutputError
from embedkit.serving.engines import check_engine, run_units
from embedkit.serving.output import (
    MANIFEST,
    JobFolder,
    is_whole,
    local_path,
    read_sealed,
    verify_output,
    writing,
)
from embedkit.serving.plan import make_plan
from embedkit.serving.sources import Source, finds, open_source
from embedkit.serving.summary import JobSummary
from embedkit.serving.units import Job, Unit, output_schema, read_checksum
from embedkit.tables import EmbeddingSet

__all__ = ["JobSummary", "transform_dataset", "verify_output"]

FORMAT_VERSION = 1
LAYOUTS = ("wide", "vector")
COMPRESSIONS = ("none", "snappy", "lz4", "zstd")

# That look whether rows are what they were: reading, not waiting for Python, is what takes time.
_CHECKING_THREADS = 8
# Bytes: the folder of a job beside it has a longer name, and few file systems take more than 255.
_LONGEST_NAME = 200
# Whether the record of an earlier run is of a unit.
_IsOf = Callable[[Mapping[str, Any] | None, Unit], bool]


def transform_dataset(
    store: str | os.PathLike | EmbeddingSet,
    input: str | os.PathLike,
    output: str | os.PathLike,
    *,
    version: str | None = None,
    columns: Sequence[str] | None = None,
    replace: bool = False,
    layout: str = "wide",
    partition_by: Sequence[str] | None = None,
    compression: str = "none",
    max_unknown: float | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    engine: str = "plain",
    scheduler: str | None = None,
    workers: int | None = None,
    unit_rows: int = 1_048_576,
    progress: bool = False,
) -> JobSummary:
    """Turn a dataset into a Parquet dataset of features.

    The output is a directory that appears when everything in it is complete, with the SHA-256 of every file
    in ``_manifest.json``. Until then work is kept in a hidden directory beside it, where a job that was
    killed can be taken up again. The same input gives the same bytes on every engine and with any number of
    interruptions.

    Parameters
    ----------
    store : path, URI or EmbeddingSet
        The learned tables.
    input : path or URI
        A Parquet or CSV file, a directory of them (partitioned by ``key=value`` directories or not), or a
        pattern. Every CSV file is one unit of work; Parquet files are cut at row groups.
    output : path
        A directory on a file system that all workers see. Its name may end in ``.parquet``.
    version : str, optional
        Version of the store; the current one by default.
    columns : sequence of str, optional
        Columns of the input to write too; all by default.
    replace : bool
        Leave out the columns that were looked up. Numbers that are scaled always replace the raw ones.
    layout : "wide" or "vector"
        A float32 column per number, or a fixed-size list ``{feature}_embedding`` per categorical feature.
    partition_by : sequence of str, optional
        Columns whose values name the directories of the output; ``()`` for none. By default those of the
        input are kept.
    compression : "none", "snappy", "lz4" or "zstd"
        "none" writes plain pages, the fastest; every other codec is used on dictionary-encoded pages, which
        take about a third of the space.
    max_unknown : float or str, optional
        Largest share of rows of any feature that may be unknown: 0.05 or ``"5%"``. Above it nothing is
        committed.
    resume : bool
        Go on with an interrupted job; start one if there is none; do nothing if it is complete.
    overwrite : bool
        Replace an output, and discard an interrupted job that was a different one.
    dry_run : bool
        Only look at the files and report what would be done.
    engine, scheduler, workers
        See `embedkit.serving.engines.run_units`.
    unit_rows : int
        Rows of a unit of work at most, where row groups allow it.
    progress : bool
        Show a progress bar.

    Returns
    -------
    JobSummary

    Raises
    ------
    InputError
        If a setting or the input is not usable, or `max_unknown` is exceeded; names file and row group.
    OutputError
        If the output exists, another job writes to it, or there is no room.
    StoreError
        If the store is damaged.
    """
    began = time.perf_counter()
    limit = None if max_unknown is None else _fraction(max_unknown)
    _check_settings(layout, compression, columns, partition_by, workers, unit_rows)
    check_engine(engine, scheduler)
    embedding_set, version = _load(store, version)
    source, folder = open_source(input), JobFolder(_local(output))
    _check_output(folder, source, input)
    job, units = make_plan(
        source,
        embedding_set,
        output=str(folder.output),
        columns=columns,
        replace=replace,
        layout=layout,
        partition_by=partition_by,
        compression=compression,
        unit_rows=unit_rows,
    )
    settings = _settings(job, version, output_schema(embedding_set, job.kept, layout).names)
    summarize = partial(JobSummary.of, folder.output, settings["columns"], units, began)
    is_of = partial(_is_of, job, embedding_set)
    if dry_run:
        if not resume or _finished(folder, settings, units, overwrite, is_of) is None:
            _check_free(folder, settings, resume=resume, overwrite=overwrite)
        return summarize()
    with writing(folder), folder.lock():
        finished = _finished(folder, settings, units, overwrite, is_of) if resume else None
        if finished is not None:
            folder.remove()
            summary = summarize(finished, len(units))
            summary.check_unknown(limit)
            return summary
        _prepare(folder, settings, resume=resume, overwrite=overwrite)
        records = _reusable(folder, units, is_of)
        todo = [unit for unit in units if unit.index not in records]
        with _progress_bar(units, records, progress) as bar:
            for unit, record in run_units(job, todo, embedding_set, engine, scheduler, workers):
                records[unit.index] = record
                bar.update(record["rows"])
        summary = summarize(records, len(units) - len(todo))
        summary.check_unknown(limit)
        folder.commit(_manifest(settings, units, records))
    return summary


def _load(store: str | os.PathLike | EmbeddingSet, version: str | None) -> tuple[EmbeddingSet, str | None]:
    """The set, and the name of its version (None if it does not come from a store)."""
    if isinstance(store, EmbeddingSet):
        if version is not None:
            raise InputError(f"version is for a store on disk, got an EmbeddingSet and {version=}")
        return store, None
    version = version or stored.current_version(store)
    return stored.load(store, version), version


def _check_settings(
    layout: str,
    compression: str,
    columns: Sequence[str] | None,
    partition_by: Sequence[str] | None,
    workers: int | None,
    unit_rows: int,
) -> None:
    choices = {"layout": (layout, LAYOUTS), "compression": (compression, COMPRESSIONS)}
    for name, (value, known) in choices.items():
        if value not in known:
            raise InputError(f"{name} must be one of {known}, got {value!r}")
    for name, names in {"columns": columns, "partition_by": partition_by}.items():
        if isinstance(names, str) or not all(isinstance(item, str) for item in names or ()):
            hint = f": write [{names!r}]" if isinstance(names, str) else ""
            raise InputError(f"{name} must be a list of names, got {names!r}{hint}")
        if len(set(names or ())) < len(names or ()):
            raise InputError(f"{name} names a column twice: {list(names)}")
    hidden = [name for name in partition_by or () if name.startswith((".", "_"))]
    if hidden:
        raise InputError(
            f"partition_by names {hidden}: readers of datasets skip directories that begin with '.' or '_'; "
            "rename the column"
        )
    for name, number in {"workers": workers, "unit_rows": unit_rows}.items():
        if number is not None and not (isinstance(number, int) and number >= 1):
            raise InputError(f"{name} must be a whole number >= 1, got {number!r}")


def _fraction(value: float | str) -> float:
    """0.05 or "5%" as a fraction of all rows."""
    try:
        number = float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise InputError(f'max_unknown must be a fraction from 0 to 1, or a share like "5%", got {value!r}')
    return number


def _local(output: str | os.PathLike) -> str:
    path = local_path(output)
    if path is None:
        raise InputError(
            f"output must be on a file system where files can be renamed, got {output}: "
            "write to a local or mounted directory and copy it"
        )
    return path


def _check_output(folder: JobFolder, source: Source, input: str | os.PathLike) -> None:
    """Raise where the output holds the input or would be read with it, or holds what no job has written."""
    output = folder.output
    if len(os.fsencode(output.name)) > _LONGEST_NAME:
        raise OutputError(
            f"the name of output {output} has {len(os.fsencode(output.name))} bytes: choose one of at most "
            f"{_LONGEST_NAME}"
        )
    if isinstance(source.system, fs.LocalFileSystem):
        for file in source.files:
            path = Path(os.path.realpath(file.path))
            if {output, folder.root} & {path, *path.parents}:
                raise InputError(f"output {output} holds the input {path}: choose another output")
        if finds(input, str(output / "part.parquet")):
            raise InputError(
                f"output {output} lies in the input {input} and would be a part of it: choose another output"
            )
    if output.is_dir() and any(output.iterdir()) and "units" not in (read_sealed(output / MANIFEST) or ()):
        raise OutputError(
            f"{output} holds other files than those of a job, or has no sound {MANIFEST}: choose another "
            "output, or remove it"
        )
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: choose another output")


def _settings(job: Job, version: str | None, columns: Sequence[str]) -> dict[str, Any]:
    """What has an influence on the output, less the units of work."""
    return {
        "format_version": FORMAT_VERSION,
        "embeddings": job.digest,
        "store_version": version,
        "layout": job.layout,
        "compression": job.compression,
        "columns": list(columns),
        "kept": [[field.name, str(field.type)] for field in job.kept],
        "keys": {name: str(dtype) for name, dtype in job.key_types.items()},
        "partition_by": None if job.partition_by is None else list(job.partition_by),
        "unit_rows": job.unit_rows,
    }


def _finished(
    folder: JobFolder,
    settings: Mapping[str, Any],
    units: Sequence[Unit],
    overwrite: bool,
    is_of: _IsOf,
) -> dict[int, dict[str, Any]] | None:
    """Records of a complete output that is just what this job would make; None if there is no such output."""
    manifest = read_sealed(folder.output / MANIFEST)
    if manifest is None or any(manifest.get(key) != value for key, value in settings.items()):
        return None
    records = manifest["units"]
    if len(records) != len(units) or not all(_run(is_of, records, units)):
        return None
    parts = [part for record in records for part in record["files"]]
    lost = [part["path"] for part in parts if not is_whole(folder.output, part)]
    if lost and overwrite:
        return None
    if lost:
        raise OutputError(f"{folder.output} is damaged: {lost[0]} is gone or of another size; overwrite it")
    return dict(enumerate(records))


def _prepare(folder: JobFolder, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Make the folder ready for this job, or refuse to."""
    if not _check_free(folder, settings, resume=resume, overwrite=overwrite):
        folder.clear()
        folder.start(settings)


def _check_free(folder: JobFolder, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Refuse to write over what is there; whether to go on with an interrupted job."""
    if folder.output.exists() and not overwrite:
        raise OutputError(f"{folder.output} exists: choose another output, or overwrite it")
    found = folder.settings()
    differing = [] if found is None else [key for key, value in settings.items() if found.get(key) != value]
    if found is not None and resume and not differing:
        return True
    if found is not None and not overwrite:
        why = f"was started with other {differing}" if resume else "is not finished"
        raise OutputError(f"a job for {folder.output} {why}: resume it as it was, or overwrite to begin anew")
    return False


def _reusable(folder: JobFolder, units: Sequence[Unit], is_of: _IsOf) -> dict[int, dict[str, Any]]:
    """Records of the units that an earlier run has finished."""
    records = [folder.recorded(unit.index) for unit in units]
    fits = _run(is_of, records, units)
    return {unit.index: record for unit, record, fit in zip(units, records, fits, strict=True) if fit}


def _is_of(job: Job, embedding_set: EmbeddingSet, record: Mapping[str, Any] | None, unit: Unit) -> bool:
    """Whether a record is of a unit, whose rows are what they were."""
    if record is None or any(record[key] != value for key, value in unit.identity.items()):
        return False
    return record.get("crc32") == read_checksum(job, unit, embedding_set)


def _run(function: Callable[..., bool], *arguments: Sequence[Any]) -> list[bool]:
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        return list(pool.map(function, *arguments))


def _manifest(
    settings: Mapping[str, Any], units: Sequence[Unit], records: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    ordered = [
        {key: value for key, value in records[unit.index].items() if key != "sha256"} for unit in units
    ]
    return {**settings, "rows": sum(record["rows"] for record in ordered), "units": ordered}


def _progress_bar(units: Sequence[Unit], records: Mapping[int, Mapping[str, Any]], show: bool) -> tqdm:
    rows = [unit.rows for unit in units]
    total = None if None in rows else sum(rows)
    done = sum(record["rows"] for record in records.values())
    return tqdm(total=total, initial=done, unit="row", unit_scale=True, disable=not show)
