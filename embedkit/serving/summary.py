"""What a batch job reports: rows, time, and the shares of unknown and missing values."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.errors import InputError
from embedkit.serving.units import Unit


@dataclass(frozen=True)
class JobSummary:
    """What a batch job did.

    Attributes
    ----------
    output : Path
    committed : bool
        False for a dry run.
    rows : int or None
        Rows of the input; None if a dry run cannot know (CSV).
    files, units, units_reused : int
        Files of the input, units of work, and how many of these an earlier run had finished.
    columns : tuple of str
        Columns of the output.
    missing, unknown : mapping of str to int
        Rows per feature that hold no value, or one that was not learned; empty for a dry run.
    seconds : float
    """

    output: Path
    committed: bool
    rows: int | None
    files: int
    units: int
    units_reused: int
    columns: tuple[str, ...]
    missing: Mapping[str, int]
    unknown: Mapping[str, int]
    seconds: float

    @classmethod
    def of(
        cls,
        output: Path,
        columns: Sequence[str],
        units: Sequence[Unit],
        began: float,
        records: Mapping[int, Mapping[str, Any]] | None = None,
        reused: int = 0,
    ) -> "JobSummary":
        """Sum up a job that began at a time of `time.perf_counter`; without records it is a dry run."""
        done = [] if records is None else list(records.values())
        rows = [unit.rows for unit in units] if records is None else [record["rows"] for record in done]
        missing, unknown = _total_counts(done)
        return cls(
            output,
            committed=records is not None,
            rows=None if None in rows else sum(rows),
            files=len({unit.file.name for unit in units}),
            units=len(units),
            units_reused=reused,
            columns=tuple(columns),
            missing=missing,
            unknown=unknown,
            seconds=time.perf_counter() - began,
        )

    def __str__(self) -> str:
        rows = "rows not known before reading" if self.rows is None else f"{self.rows:,} rows"
        shape = f"{rows} in {self.files:,} file(s), {self.units:,} unit(s) of work, "
        shape += f"{len(self.columns)} columns out"
        if not self.committed:
            return f"dry run: {shape}; would write {self.output}"
        lines = [
            f"{self.output}: {shape}",
            f"{self.seconds:.1f} s, {self.rows / max(self.seconds, 1e-9):,.0f} rows/s, "
            f"{self.units_reused:,} unit(s) from an earlier run",
        ]
        for feature, unknown in self.unknown.items():
            shares = [_percent(number, self.rows) for number in (unknown, self.missing[feature])]
            lines.append(f"  {feature}: unknown {shares[0]}, missing {shares[1]}")
        return "\n".join(lines)

    def check_unknown(self, limit: float | None) -> None:
        """Raise InputError if more than this share of the rows of any feature is unknown."""
        above = {
            feature: _percent(count, self.rows)
            for feature, count in self.unknown.items()
            if limit is not None and count > limit * self.rows
        }
        if above:
            raise InputError(
                f"more than max_unknown={limit:.2%} of the rows are unknown in {above}: "
                "nothing was committed; learn these values, or raise max_unknown and resume"
            )


def _total_counts(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Missing and unknown rows per feature, summed over the records of units."""
    totals: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for record in records:
        for feature, pair in record["missing_and_unknown"].items():
            for total, number in zip(totals, pair, strict=True):
                total[feature] = total.get(feature, 0) + number
    return totals


def _percent(count: int, rows: int) -> str:
    return f"{count / max(rows, 1):.2%}"
