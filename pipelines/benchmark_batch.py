"""How fast a batch job is, and how much memory it takes, against plain pyarrow on the same files.

Four string columns (7 to 50,000 categories) become 64 floats. Plain pyarrow reads the same columns and writes
64 columns of random floats that are ready in memory before the clock starts: there is no lookup, no hash and
no sync to the disk. It is timed with its own defaults (dictionary pages, snappy), with the settings of the
job (plain pages), and with these until the disk has taken its files, which is what the job waits for. Every
measurement is a process of its own; memory is the peak of its resident set, as Linux counts it. Where a run
takes far longer than its processor time, it waited: for the disk, or for other work.

A Dask worker is a process of one thread, so two of them are twice as much of the same. Their time includes
the start of the cluster; their memory is that of the process that schedules.

    python pipelines/benchmark_batch.py --millions 2 8 32 --folder /tmp/benchmark
    python pipelines/benchmark_batch.py --millions 32 --dask 1 2 --only dask --compression zstd
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.serving.batch import transform_dataset
from embedkit.tables import EmbeddingSet, EmbeddingTable
from embedkit.vocabulary import Vocabulary

CARDINALITIES = {"weekday": 7, "store": 1_000, "tailnum": 4_000, "customer": 50_000}
EMBEDDING_DIM = 16
FILE_ROWS = 2_000_000
# Of the job's output; plain pyarrow writes the same.
ROW_GROUP_ROWS = 131_072


def make_set() -> EmbeddingSet:
    """Random vectors for every column."""
    rng = np.random.default_rng(0)
    tables = []
    for feature, cardinality in CARDINALITIES.items():
        categories = pa.array([f"{feature}-{i:06d}" for i in range(cardinality)])
        counts = np.ones(cardinality + 2, dtype=np.int64)
        vectors = rng.normal(size=(cardinality + 2, EMBEDDING_DIM))
        tables.append(EmbeddingTable(Vocabulary(feature, categories, counts), vectors))
    return EmbeddingSet(tables)


def write_input(folder: Path, rows: int) -> None:
    """Draw rows in files of two million; one value in fifty is missing, one in fifty unknown."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        rng = np.random.default_rng(number)
        size = min(FILE_ROWS, rows - start)
        columns = {}
        for feature, cardinality in CARDINALITIES.items():
            values = pa.array([*(f"{feature}-{i:06d}" for i in range(cardinality)), "never seen", None])
            codes = rng.integers(0, cardinality, size)
            codes[rng.random(size) < 0.02] = cardinality
            codes[rng.random(size) < 0.02] = cardinality + 1
            columns[feature] = values.take(pa.array(codes))
        pq.write_table(pa.table(columns), folder / f"{number:03d}.parquet", row_group_size=2 * ROW_GROUP_ROWS)


def job(source: Path, output: Path, options: dict[str, Any]) -> Callable[[], Any]:
    """The batch job."""
    return partial(transform_dataset, source.with_name("store"), source, output, replace=True, **options)


def plain(source: Path, output: Path, options: dict[str, Any]) -> Callable[[], Any]:
    """Plain pyarrow: read the columns, write as many rows of ready random floats."""
    rng = np.random.default_rng(1)
    width = EMBEDDING_DIM * len(CARDINALITIES)
    values = rng.normal(size=(width, ROW_GROUP_ROWS)).astype(np.float32)
    ready = pa.table({f"f{i:02d}": column for i, column in enumerate(values)})

    def run() -> None:
        output.mkdir()
        for file in sorted(source.iterdir()):
            with pq.ParquetWriter(output / file.name, ready.schema, **options) as writer:
                for batch in pq.ParquetFile(file).iter_batches(ROW_GROUP_ROWS):
                    writer.write_table(ready.slice(0, batch.num_rows))

    return run


def synced(source: Path, output: Path, options: dict[str, Any]) -> Callable[[], Any]:
    """Plain pyarrow, done when its files are safe on the disk."""
    write = plain(source, output, options)

    def run() -> None:
        write()
        for path in output.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    return run


def measured(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> tuple[float, float, float]:
    """Seconds, seconds of processors, and the peak of the memory in MB, of what `prepare` returns."""
    run = prepare(*arguments)
    before, began = os.times(), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - began, os.times()
    return seconds, sum(after[:4]) - sum(before[:4]), peak_megabytes()


def peak_megabytes() -> float:
    """The most memory that this process has held, files mapped into it included."""
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(peak) / 1024


def measure(
    prepare: Callable[..., Callable[[], Any]], source: Path, output: Path, options: dict[str, Any]
) -> tuple[float, float, float]:
    """Do `measured` in a new process, and throw the output away."""
    shutil.rmtree(output, ignore_errors=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(measured, prepare, source, output, options).result()
    shutil.rmtree(output)
    return result


def main() -> None:
    """Measure every size and print one line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, nargs="+", default=[2, 8], help="rows")
    parser.add_argument("--folder", type=Path, default=Path("benchmark_batch"), help="for temporary files")
    parser.add_argument("--repeat", type=int, default=1, help="the fastest of so many runs counts")
    parser.add_argument(
        "--dask", type=int, nargs="*", default=[], help="numbers of Dask workers to measure too"
    )
    parser.add_argument("--compression", default="none", help="of the Dask runs: none, snappy, lz4 or zstd")
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    arguments = parser.parse_args()
    plain_pages = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    dask = {"engine": "dask", "compression": arguments.compression}
    runs: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("pyarrow, its defaults", plain, {}),
        ("pyarrow, plain pages", plain, plain_pages),
        ("pyarrow, synced", synced, plain_pages),
        ("job, 1 thread", job, {"workers": 1}),
        ("job, all threads", job, {}),
        ("job, snappy", job, {"compression": "snappy"}),
        *((f"job, dask {n}", job, {**dask, "workers": n}) for n in arguments.dask),
    ]
    runs = [run for run in runs if arguments.only in run[0]]
    print(f"{'':24} {'rows':>10} {'seconds':>8} {'cpu':>6} {'rows/s':>10} {'peak MB':>8}")
    for millions in arguments.millions:
        source, rows = arguments.folder / f"in-{millions}", millions * 1_000_000
        shutil.rmtree(source, ignore_errors=True)
        write_input(source, rows)
        if not source.with_name("store").exists():
            make_set().save(source.with_name("store"))
        for name, prepare, options in runs:
            output = arguments.folder / "out"
            results = [measure(prepare, source, output, options) for _ in range(arguments.repeat)]
            seconds, cpu, peak = *min(results)[:2], max(peak for *_, peak in results)
            print(f"{name:24} {rows:10,} {seconds:8.2f} {cpu:6.1f} ", end="")
            print(f"{rows / seconds:10,.0f} {peak:8.0f}", flush=True)
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
