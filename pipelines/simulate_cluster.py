"""What ten billion rows on a hundred machines would take: costs measured here, simulated there.

The costs of one unit of work (a million rows, four string columns to 64 floats) are measured on this machine:
processor time, bytes read and written, time to plan a file, time to resume a unit, size of the manifest, and
what Dask's scheduler takes per task. The rest is a simulation of slots that take units one after another: a
unit takes as long as its slowest part (processor, its share of the machine's network, its share of the
storage), some are slower than others, and slots die at random and lose the unit they are at.

What comes out: vectors are 40 times as many bytes as the ids they stand for, so writing is the bottleneck, in
the storage first and the network next; dictionary pages (any compression) cut it to less than half for more
processor time, of which there is plenty. Work and output grow with the rows; the scheduler, the plan and the
manifest grow with the units, and the scheduler is the next to be felt: larger units (``unit_rows``) help.

Measured on two cores of an AMD EPYC: a unit takes 0.6 s of a processor, reads 7 MB and writes 269 MB; Dask
takes 3.4 ms to schedule it. For ten billion rows on a hundred machines of 16 cores that is 90 s in all: 53 s
of the storage (at 50 GB/s), 32 s of the scheduler, 21 s of the network, 4 s of the processors.

What was checked on real processes, in the tests: the bytes do not depend on where and how often a unit runs;
workers that are killed; drivers that are killed at every step to the disk; resuming. What is assumed: the
bandwidth of network and storage (options below), and that a hundred machines see one file system on which
renaming is atomic (NFS, Lustre, CephFS). Not checked: a scheduler under 1,600 workers; a real cluster.

    python pipelines/simulate_cluster.py
    python pipelines/simulate_cluster.py --rows 1e11 --machines 400 --storage 200
"""

import argparse
import heapq
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import distributed
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark_batch import make_set, write_input

from embedkit.serving.batch import transform_dataset

UNIT_ROWS = 1_048_576
GIGA = 1e9
_TINY_FILES = 200
_TASKS = 3_000


@dataclass(frozen=True)
class Costs:
    """Costs measured on this machine: seconds, and bytes.

    Attributes
    ----------
    cpu : float
        Processor time of a unit.
    read, written : float
        Bytes of a unit.
    plan : float
        Time to look at one file before the job begins, one after another.
    resume : float
        Time to find out that a unit is done.
    record : float
        Bytes of the manifest per unit.
    dispatch : float
        Time of the scheduler per task: all tasks pass through it, one after another.
    """

    cpu: float
    read: float
    written: float
    plan: float
    resume: float
    record: float
    dispatch: float


def measure(folder: Path, compression: str) -> Costs:
    """Run small jobs, and divide."""
    embedding_set = make_set()
    write_input(folder / "in", 2 * UNIT_ROWS)
    began = time.process_time()
    settings = {"replace": True, "workers": 1, "compression": compression}
    summary = transform_dataset(embedding_set, folder / "in", folder / "out", **settings)
    units = summary.rows / UNIT_ROWS
    cpu = (time.process_time() - began) / units
    read, written = (sum(f.stat().st_size for f in (folder / d).iterdir()) / units for d in ("in", "out"))
    (folder / "tiny").mkdir()
    row = pa.table({feature: pa.array([None], pa.string()) for feature in embedding_set})
    for number in range(_TINY_FILES):
        pq.write_table(row, folder / "tiny" / f"{number:04d}.parquet")
    began = time.perf_counter()
    transform_dataset(embedding_set, folder / "tiny", folder / "tiny-out", dry_run=True, **settings)
    plan = (time.perf_counter() - began) / _TINY_FILES
    transform_dataset(embedding_set, folder / "tiny", folder / "tiny-out", **settings)
    began = time.perf_counter()
    transform_dataset(embedding_set, folder / "tiny", folder / "tiny-out", resume=True, **settings)
    resume = max(0.0, (time.perf_counter() - began) / _TINY_FILES - plan)
    manifest = json.loads((folder / "tiny-out" / "_manifest.json").read_bytes())
    record = len(json.dumps(manifest["units"][0]))
    return Costs(cpu, read, written, plan, resume, record, measure_dispatch())


def measure_dispatch() -> float:
    """Seconds per task that does nothing, through one worker's scheduler."""
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        client.gather(client.map(abs, range(100), pure=False))
        began = time.perf_counter()
        client.gather(client.map(abs, range(_TASKS), pure=False))
        return (time.perf_counter() - began) / _TASKS


@dataclass(frozen=True)
class Cluster:
    """Machines and what joins them; bandwidths in bytes per second."""

    machines: int
    cores: int
    network: float
    storage: float
    hours_between_failures: float


def simulate(units: int, costs: Costs, cluster: Cluster, seed: int = 0) -> tuple[float, int]:
    """Let units run on slots; return seconds, and how many units had to be done again.

    A unit's time varies as on shared machines: by a factor from a log-normal distribution, and one in a
    hundred is three times as slow. A slot that dies is back after a minute, without the unit it was at.
    """
    draw = random.Random(seed)
    slots = cluster.machines * cluster.cores
    moved = costs.read + costs.written
    network = moved * cluster.cores / cluster.network
    storage = moved * min(slots, units) / cluster.storage
    typical = max(costs.cpu, network, storage)
    deaths = 1 / (cluster.hours_between_failures * 3_600)
    free = [(0.0, slot) for slot in range(slots)]
    heapq.heapify(free)
    dispatched, end, again, waiting = 0.0, 0.0, 0, units
    while waiting:
        ready, slot = heapq.heappop(free)
        dispatched = max(dispatched, ready) + costs.dispatch
        seconds = typical * draw.lognormvariate(0, 0.15) * (3 if draw.random() < 0.01 else 1)
        if draw.random() < seconds * deaths:
            again += 1
            heapq.heappush(free, (dispatched + seconds * draw.random() + 60, slot))
            continue
        waiting -= 1
        end = max(end, dispatched + seconds)
        heapq.heappush(free, (dispatched + seconds, slot))
    return end, again


def report(rows: float, costs: Costs, cluster: Cluster) -> None:
    """Print what each part would take alone, and all of them together."""
    units = int(-(-rows // UNIT_ROWS))
    slots = cluster.machines * cluster.cores
    moved = units * (costs.read + costs.written)
    alone = {
        "processors": units * costs.cpu / slots,
        "network of the machines": moved / (cluster.network * cluster.machines),
        "storage": moved / cluster.storage,
        "scheduler": units * costs.dispatch,
        "plan, before the first unit": units * costs.plan,
        "commit: manifest": units * (costs.record / (100 * 1e6) + costs.resume),
    }
    seconds, again = simulate(units, costs, cluster)
    driver = alone["plan, before the first unit"] + alone["commit: manifest"]
    print(f"{rows:.3g} rows, {cluster.machines} machines of {cluster.cores} cores: {units:,} units of work")
    print(
        f"  read {units * costs.read / GIGA:,.0f} GB, write {units * costs.written / GIGA:,.0f} GB, ", end=""
    )
    print(f"manifest {units * costs.record / 1e6:,.1f} MB")
    for name, value in sorted(alone.items(), key=lambda item: -item[1]):
        print(f"  {name:28} {value:9.1f} s alone")
    print(f"  simulated: {seconds + driver:,.0f} s in all, {again} unit(s) done again after failures")


def main() -> None:
    """Measure here, simulate there, and show what grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=1e10)
    parser.add_argument("--machines", type=int, default=100)
    parser.add_argument("--cores", type=int, default=16, help="of each machine")
    parser.add_argument("--network", type=float, default=1.25, help="GB/s of each machine")
    parser.add_argument("--storage", type=float, default=50.0, help="GB/s of the shared storage")
    parser.add_argument("--hours-between-failures", type=float, default=1_000.0, help="of one slot")
    parser.add_argument("--compression", default="none", help="of the output: none, snappy, lz4 or zstd")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="simulate-"))
    try:
        costs = measure(folder, arguments.compression)
    finally:
        shutil.rmtree(folder)
    print("measured here, per unit of 1,048,576 rows:")
    print(f"  processor {costs.cpu:.2f} s, ", end="")
    print(f"read {costs.read / 1e6:.1f} MB, write {costs.written / 1e6:.1f} MB")
    print(f"  plan {costs.plan * 1e3:.2f} ms, resume {costs.resume * 1e3:.2f} ms, ", end="")
    print(f"schedule {costs.dispatch * 1e3:.2f} ms, manifest {costs.record:.0f} bytes")
    for scale in (0.1, 1, 10):
        cluster = Cluster(
            arguments.machines,
            arguments.cores,
            arguments.network * GIGA,
            arguments.storage * GIGA,
            arguments.hours_between_failures,
        )
        report(arguments.rows * scale, costs, cluster)


if __name__ == "__main__":
    main()
