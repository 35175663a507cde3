"""What runs the units of a job.

Engines only schedule: a unit is the same function, and gives the same bytes, anywhere.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from typing import Any

import pyarrow as pa

from embedkit import store
from embedkit.errors import InputError, StoreError, first_line, require
from embedkit.serving.output import JobFolder
from embedkit.serving.units import Job, Unit, transform_unit
from embedkit.tables import EmbeddingSet

ENGINES = ("plain", "dask")

# The disk is the limit long before; every thread needs some 40 MB.
_MAX_THREADS = 4


def check_engine(engine: str, scheduler: str | None) -> None:
    """Find out whether an engine can run, before anything is written.

    Raises
    ------
    InputError
        If there is no such engine, or it takes no scheduler.
    MissingExtraError
        If dask.distributed is not installed.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {ENGINES}, got {engine!r}")
    if engine == "dask":
        require("distributed", "dask")
    elif scheduler is not None:
        raise InputError(f'scheduler needs engine="dask", got {engine=} and {scheduler=}')


def run_units(
    job: Job,
    units: Sequence[Unit],
    embedding_set: EmbeddingSet,
    engine: str,
    scheduler: str | None = None,
    workers: int | None = None,
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Do units of work in any order.

    Parameters
    ----------
    job : Job
    units : sequence of Unit
    embedding_set : EmbeddingSet
        What to look up in.
    engine : "plain" or "dask"
        Threads of this process, or workers of dask.distributed.
    scheduler : str, optional
        Address of a Dask scheduler; by default a cluster starts on this machine.
    workers : int, optional
        Threads (by default one per processor, at most 4), or processes of that cluster (one per processor).

    Yields
    ------
    Unit and its record, as they are finished.

    Raises
    ------
    InputError, OutputError
        The error of the first unit that failed. Units that were running by then are finished and recorded.
    """
    if engine == "dask":
        yield from _run_dask(job, units, embedding_set, scheduler, workers or pa.cpu_count())
    else:
        yield from _run_plain(job, units, embedding_set, workers or min(_MAX_THREADS, pa.cpu_count()))


def _run_plain(
    job: Job, units: Sequence[Unit], embedding_set: EmbeddingSet, workers: int
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    pool = ThreadPoolExecutor(workers)
    futures: dict[Future, Unit] = {}
    try:
        futures.update((pool.submit(transform_unit, job, unit, embedding_set), unit) for unit in units)
        for future in as_completed(futures):
            if future.exception() is not None:
                break
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    failed = [future for future in futures if not future.cancelled() and future.exception() is not None]
    if failed:
        failed[0].result()  # futures are in the order of their units


def _run_dask(
    job: Job, units: Sequence[Unit], embedding_set: EmbeddingSet, scheduler: str | None, workers: int
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    distributed = require("distributed", "dask")
    stored = JobFolder(job.output).embeddings
    try:
        store.current_version(stored)
    except StoreError:
        store.publish(stored, embedding_set)
    with ExitStack() as stack:
        if scheduler is None:
            # One thread each: threads would wait for one another at Python's lock.
            scheduler = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address=":0",
                    silence_logs=logging.CRITICAL,  # what goes wrong is raised here, as one line
                )
            )
        try:
            client = stack.enter_context(distributed.Client(scheduler))
        except (OSError, ValueError) as error:
            raise InputError(f"there is no Dask scheduler at {scheduler}: {first_line(error)}") from error
        futures = client.map(transform_unit, [job] * len(units), units, pure=False)
        by_key = {future.key: unit for future, unit in zip(futures, units, strict=True)}
        try:
            for future, record in distributed.as_completed(futures, with_results=True):
                yield by_key[future.key], record
        finally:
            client.cancel(futures)
