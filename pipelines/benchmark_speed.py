"""How fast does embedkit learn and look up, beside its peers and beside the floor?

    pip install -r pipelines/requirements-speed.txt
    python pipelines/benchmark_speed.py --out speed --rossmann rossmann.parquet

Sections (`--only`, may be repeated):

training   the same network (8 categorical columns, layers 200-100, batch norm, dropout), batch size, epochs
           and number of threads for all, in float32; embedkit in bfloat16 as well. Data preparation apart.
           The floor is the bare matrix products of a step in float32, forward and backward.
transform  four string columns beside target encoders, the bare take and the bare write.
growth     training as rows, cardinality, columns or width grow.
quality    seconds until the held-out loss is as low as each peer ever gets it, on flights and, with
           `--rossmann`, on Rossmann's sales (columns as for `rossmann.py`); preparation included, and for
           embedkit every choice that its defaults make. Peers train on one-cycle schedules at the rates of
           `--rates`; the best counts.
automatic  what a fit costs beyond one that is given its learning rate, and what encoding the rows it was
           learned from costs beyond a fit.
memory     a fit of one epoch from Parquet and from memory, and of a column of millions of categories, and a
           lookup: seconds and peak memory, taken once.

Every training runs in a process of its own; the fastest repeat counts. A peer that needs other versions has
its own environment: `--python fastai=/path/to/python`. One that cannot run is left out, and the report says
so. Results: OUT/speed.md, OUT/SECTION.parquet, OUT/growth.png.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import benchmark_speed_ours as ours
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embedkit.demo import load_flights

FOLDER = Path(__file__).parent
SECTIONS = ("training", "transform", "growth", "quality", "automatic", "memory")
PEERS = ("fastai", "pytorch-widedeep", "pytorch-tabular")
CARDINALITIES = (10, 20, 50, 100, 500, 1000, 3000, 5000)
EPOCHS = (1, 2, 4, 8, 15)  # of embedkit towards a peer's loss; 15 is its default
FLIGHTS = ["date", "hour", "carrier", "origin", "dest", "tailnum", "flight"]
PRECISION = {"embedkit": "float32", "embedkit, bfloat16": "bfloat16"}
NETWORK = {"layers": [200, 100], "dropout": 0.1, "embedding_dropout": 0.2, "batch_size": 512}


class Runner:
    """Runs jobs in processes of their own, and remembers who could not."""

    def __init__(self, folder: Path, pythons: dict[str, str], threads: int) -> None:
        self.folder, self.pythons, self.threads = folder, pythons, threads
        self.left_out: dict[str, str] = {}

    def run(self, name: str, job: dict[str, Any], ours: str | None = None) -> dict[str, Any] | None:
        """The answer of a peer, or of embedkit's part `ours`; None from one that cannot run."""
        if name in self.left_out:
            return None
        path = self.folder / "job.json"
        path.write_text(json.dumps({**job, "threads": self.threads}))
        script = FOLDER / ("benchmark_speed_ours.py" if ours else "benchmark_speed_peers.py")
        command = [self.pythons.get(name, sys.executable), script, ours or name, path]
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, **threads}, capture_output=True, text=True
        )
        if done.returncode:
            error = done.stderr.strip().splitlines()[-1]
            if ours:
                raise SystemExit(f"embedkit failed: {error}")
            self.left_out[name] = error
            print(f"{name} is left out: {error}", flush=True)
            return None
        return json.loads(done.stdout.strip().splitlines()[-1])

    def split(self, frame: pd.DataFrame, n_held_out: int) -> dict[str, str]:
        """Rows in files: a job's `train` and `held_out`."""
        paths = {"train": self.folder / "train.parquet", "held_out": self.folder / "held_out.parquet"}
        frame[n_held_out:].to_parquet(paths["train"])
        frame[:n_held_out].to_parquet(paths["held_out"])
        return {name: str(path) for name, path in paths.items()}


def made_up(n: int) -> pd.DataFrame:
    """Eight string columns, each with a say in a number."""
    random, columns, y = np.random.default_rng(0), {}, 0.0
    for i, size in enumerate(CARDINALITIES):
        codes = random.integers(size, size=n)
        columns[f"c{i}"] = codes.astype(str)
        y = y + random.normal(size=size)[codes]
    y = y + random.normal(size=n)
    return pd.DataFrame(columns).assign(y=((y - y.mean()) / y.std()).astype(np.float32))


def training(runner: Runner, rows: int, epochs: int, repeats: int) -> pd.DataFrame:
    """Rows a second of the fastest epoch of each."""
    n_held_out = min(10_000, rows // 5)
    job = {**NETWORK, **runner.split(made_up(rows + n_held_out), n_held_out)}
    job |= {"binary": False, "lr": 3e-3, "epochs": epochs}
    n = rows // NETWORK["batch_size"] * NETWORK["batch_size"]
    records: dict[str, dict[str, float]] = {}
    for repeat in range(repeats):
        for name in (*PEERS, "torch", *PRECISION):  # taken in turn: a machine's slow minutes hit all
            own = {"precision": PRECISION.get(name, "float32")}
            found = runner.run(name, job | own, ours="training" if name in PRECISION else None)
            if found is None:
                continue
            seconds, losses = np.array(found["curve"]).T
            rate = n / np.diff(seconds, prepend=0.0).min()
            best = records.setdefault(name, {"rows_per_second": 0.0, "preparation": np.inf})
            best["rows_per_second"] = max(best["rows_per_second"], rate)
            best["preparation"] = min(best["preparation"], found["prepared"])
            best["held_out_loss"] = losses[-1]
            print(f"training {repeat + 1}: {name} {rate:,.0f} rows/s", flush=True)
    width = sum(min(50, round(1.6 * (size + 2) ** 0.56)) for size in CARDINALITIES)
    for name, rate in ours.floor(width, NETWORK["layers"], NETWORK["batch_size"]).items():
        records[f"floor, {name}"] = {"rows_per_second": rate}
    return pd.DataFrame.from_dict(records, orient="index").rename_axis("who").reset_index()


def transform(runner: Runner, rows: int, repeats: int) -> pd.DataFrame:
    """Rows a second of lookups and of target encoders."""
    records = ours.transform(rows, repeats)
    frame = ours.strings(rows)
    job = runner.split(frame.assign(y=np.random.default_rng(0).normal(size=rows)), 0) | {"repeats": repeats}
    for name in ("TargetEncoder", "category_encoders"):
        found = runner.run(name, job)
        if found is not None:
            records.append({"way": name, **found})
    return pd.DataFrame(records)


def data_of_quality(rossmann: Path | None, n_rows: int) -> Iterator[tuple[str, pd.DataFrame, bool]]:
    """Name, rows in random order with the target as `y`, and whether it is a class."""
    flights = load_flights().rename(columns={"late": "y"})[[*FLIGHTS, "y"]]
    tables = [("flights", flights, True)]
    if rossmann is not None:
        from rossmann import COLUMNS, load

        table = load(rossmann)
        log = np.log(table["Sales"])
        tables.append(("Rossmann", table[COLUMNS].assign(y=(log - log.mean()) / log.std()), False))
    for name, table, binary in tables:
        table = table.sample(min(n_rows, len(table)), random_state=0)
        yield name, table.astype(dict.fromkeys(table.columns.drop("y"), str)), binary


def quality(
    runner: Runner, rossmann: Path | None, n_rows: int, epochs: int, rates: Sequence[float]
) -> pd.DataFrame:
    """The best held-out loss of each peer, when it was there, and when embedkit was."""
    records = []
    for data, table, binary in data_of_quality(rossmann, n_rows):
        job = {**NETWORK, **runner.split(table, len(table) // 5), "binary": binary}
        found = runner.run("embedkit", {**job, "epochs": EPOCHS}, ours="quality")
        mine = found["curve"]
        records += [
            {"data": data, "who": f"embedkit, {n} epochs", "best_loss": loss, "seconds": seconds}
            for n, (seconds, loss) in zip(EPOCHS, mine, strict=True)
        ]
        for name in (*PEERS, "torch"):
            runs = [runner.run(name, {**job, "lr": rate, "epochs": epochs}) for rate in rates]
            points = [
                (loss, run["prepared"] + seconds) for run in runs if run for seconds, loss in run["curve"]
            ]
            if not points:
                continue
            best, seconds = min(points)
            there = [s for s, loss in mine if loss <= best]
            records.append(
                {
                    "data": data,
                    "who": name,
                    "best_loss": best,
                    "seconds": seconds,
                    "embedkit_seconds": min(there) if there else np.nan,
                    "embedkit_default_seconds": mine[-1][0] if mine[-1][1] <= best else np.nan,
                }
            )
            print(f"quality: {data}, {name}: {best:.4f} after {seconds:.1f} s", flush=True)
    return pd.DataFrame(records)


def automatic(runner: Runner, n_rows: int, repeats: int) -> pd.DataFrame:
    """Seconds of fits on flights, the learning rate chosen or given, and of `fit_transform`, all chosen."""
    records = []
    for n in sorted({min(n, n_rows) for n in (5_000, 20_000, n_rows)}):
        ((_, table, _),) = data_of_quality(None, n)
        job = {**runner.split(table, 0), "binary": True, "repeats": repeats}
        records.append({"rows": len(table), **runner.run("embedkit", job, ours="automatic")})
        print(f"automatic: {records[-1]}", flush=True)
    return pd.DataFrame(records)


def memory(runner: Runner, n_rows: int, n_levels: int) -> pd.DataFrame:
    """Fits of 8 columns from files and from memory, and of one long column from files."""
    records, path = [], runner.folder / "rows.parquet"
    for name, size, columns, streams in (
        ("8 columns", n_rows, eight_columns, (True, False)),
        ("a long column", 2 * n_levels, partial(long_column, n_levels), (True,)),
    ):
        categorical = write_rows(path, size, columns)
        for stream in streams:
            job = {"train": str(path), "stream": stream, "categorical": categorical}
            found = runner.run("embedkit", job, ours="memory")
            records.append({"table": name, "rows": size, "from": "files" if stream else "memory", **found})
            print(f"memory: {records[-1]}", flush=True)
    return pd.DataFrame(records)


def eight_columns(first: int, n: int, random: np.random.Generator) -> dict[str, Any]:
    """Six columns of categories and two of numbers."""
    shop, town = random.integers(20_000, size=n), random.integers(300, size=n)
    columns: dict[str, Any] = {"shop": np.char.add("shop ", shop.astype(str))}
    columns["town"] = np.char.add("town ", town.astype(str))
    columns |= {f"c{size}": random.integers(size, size=n) for size in (7, 12, 50, 1000)}
    columns |= {"x0": random.normal(size=n), "x1": random.normal(size=n)}
    return columns | {"y": np.sin(shop) + np.sin(town) + 0.1 * columns["x0"] + random.normal(0, 0.5, size=n)}


def long_column(n_levels: int, first: int, n: int, random: np.random.Generator) -> dict[str, Any]:
    """A column of categories, each of which comes back only when all others have been, and a number."""
    user = np.arange(first, first + n) % n_levels
    y = np.sin(user) + random.normal(size=n)
    return {"c_user": np.char.add("user ", user.astype(str)), "x0": random.normal(size=n), "y": y}


def write_rows(path: Path, n_rows: int, columns: Callable[..., dict[str, Any]]) -> list[str]:
    """Write made-up rows, a million at a time; the names of their categorical columns."""
    random, writer = np.random.default_rng(0), None
    for first in range(0, n_rows, 1_000_000):
        table = pa.table(columns(first, min(1_000_000, n_rows - first), random))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    return [name for name in table.column_names if name[0] != "x" and name != "y"]


def plot_growth(table: pd.DataFrame, path: Path) -> None:
    """Rows a second beside the floor, a panel for each thing that grows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    groups = table.groupby("growing", sort=False)
    for axes, (what, points) in zip(
        figure.subplots(1, groups.ngroups, squeeze=False)[0], groups, strict=True
    ):
        axes.plot(points["value"], points["rows_per_second"], "o-", label="embedkit")
        axes.plot(points["value"], points["floor"], "--", color="grey", label="bare products")
        axes.set_xscale("log", base=10 if points["value"].max() > 1000 else 2)
        axes.set(xlabel=what, ylim=(0, None))
    figure.axes[0].set_ylabel("rows a second")
    figure.axes[0].legend(loc="center left")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def as_markdown(tables: dict[str, pd.DataFrame], threads: int, left_out: dict[str, str]) -> str:
    """The report."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s), torch {version('torch')}"
    lines = ["# Speed", "", f"{machine}. The fastest of all repeats counts.", ""]
    lines += [f"{name} was left out: `{error}`" for name, error in left_out.items()]
    for section, table in tables.items():
        table = table.copy()
        if section == "training":
            peers = table.loc[table["who"].isin(PEERS), "rows_per_second"]
            in_float32 = ~table["who"].str.contains("bfloat16")
            table["times_the_fastest_peer"] = (table["rows_per_second"] / peers.max()).where(in_float32)
        if section == "quality" and "embedkit_seconds" in table:
            table["times_sooner"] = table["seconds"] / table["embedkit_seconds"]
            table["times_sooner_default"] = table["seconds"] / table["embedkit_default_seconds"]
        lines += [f"## {section.capitalize()}", "", *_rows(table), ""]
    return "\n".join(lines)


def _rows(table: pd.DataFrame) -> list[str]:
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in table) + " |",
        "|---" * table.shape[1] + "|",
    ]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return lines


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("speed"), help="folder for results")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PATH", help="interpreter of a peer"
    )
    parser.add_argument("--rossmann", type=Path, help="Rossmann's sales, Parquet or CSV")
    parser.add_argument("--rows", type=int, default=200_000, help="of training and quality")
    parser.add_argument("--transform-rows", type=int, default=1_000_000)
    parser.add_argument(
        "--largest", type=int, default=10_000_000, help="of rows and cardinality in growth and memory"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of training")
    parser.add_argument("--quality-epochs", type=int, default=10, help="of the peers in quality")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pa.set_cpu_count(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), dict(pair.split("=", 1) for pair in args.python), args.threads)
        for section in args.only or SECTIONS:
            if section == "training":
                table = training(runner, args.rows, args.epochs, args.repeats)
            elif section == "transform":
                table = transform(runner, args.transform_rows, args.repeats + 2)
            elif section == "growth":
                table = pd.DataFrame(ours.growth(args.largest))
                plot_growth(table, args.out / "growth.png")
            elif section == "quality":
                table = quality(runner, args.rossmann, args.rows, args.quality_epochs, args.rates)
            elif section == "automatic":
                table = automatic(runner, args.rows, args.repeats)
            else:
                table = memory(runner, 2 * args.largest, args.largest)
            table.to_parquet(args.out / f"{section}.parquet")
            tables[section] = table
            report = as_markdown(tables, args.threads, runner.left_out)
            (args.out / "speed.md").write_text(report)
    print(f"\n{report}\nwrote {args.out}/speed.md")


if __name__ == "__main__":
    main()
