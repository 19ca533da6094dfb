"""What a run found: a table to read, JSON that holds everything, and growth curves."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

import torch
from case import Check, Row
from rich import box
from rich.console import Console
from rich.table import Table
from timing import Rates, Samples

import dcmerge_ext

_WIDTH = 220  # of the table, at most

# --- table -------------------------------------------------------------------------------------------------------------


def heading(rates: Rates) -> str:
    return (
        f"dcmerge_ext {dcmerge_ext.__version__} (cpu {dcmerge_ext.backends()['cpu']}), torch {torch.__version__}, {cpu_model()}, {rates.threads} threads; "
        f"float32 GEMM {rates.gemm / 1e9:.0f} GFLOP/s ({rates.gemm_one_thread / 1e9:.0f} on one thread), "
        f"copy {rates.copy / 1e9:.0f} GB/s"
    )


def table(rows: Sequence[Row]) -> Table:
    """A line for ours and one for each rival; medians, with the fastest and the slowest sample in brackets."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (
        ("case", "left"),
        ("", "left"),
        ("takes", "right"),
        ("ratio", "right"),
        ("floor / aim", "left"),
        ("error (bound)", "left"),
        ("further", "left"),
        ("of rate", "right"),
        ("memory", "right"),
    ):
        found.add_column(title, justify=cast(Literal["left", "right"], justify), no_wrap=True)
    for row in rows:
        found.add_row(
            row.case.name,
            "dcmerge_ext",
            row.status.upper() if row.ours is None else duration(row.ours),
            "",
            _targets(row),
            "" if row.check is None else f"{row.check.error:.1e} ({row.check.bound:.0e})",
            details(row.check),
            "" if row.fraction is None else f"{row.fraction:.0%} {row.bound_by}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB",
        )
        for rival in row.rivals:
            found.add_row(
                "",
                rival.rival.name + (f": {rival.setting}" if rival.setting else ""),
                "not timed" if rival.samples is None else duration(rival.samples),
                "" if rival.ratio is None else f"{rival.ratio:.2f}",
                "",
                "" if rival.check is None else f"{rival.check.error:.1e}",
                details(rival.check),
            )
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """What has to be said about single rows."""
    found = []
    for row in rows:
        parts = [row.note, *(f"{rival.rival.name} {rival.rival.note}" for rival in row.rivals if rival.rival.note)]
        if any(parts):
            found.append(f"{row.case.name}: {'; '.join(filter(None, parts))}")
    return found


def duration(samples: Samples) -> str:
    unit, factor = ("s", 1.0) if samples.median >= 1 else ("ms", 1e3)
    low, middle, high = (f"{factor * x:.3g}" for x in (samples.low, samples.median, samples.high))
    return f"{middle} {unit} ({low} - {high})"


def _targets(row: Row) -> str:
    numbers = " / ".join(f"{x:g}" for x in (row.case.floor, row.case.aim) if x is not None)
    return f"{numbers}: {row.verdict}" if row.verdict else numbers


def details(check: Check | None) -> str:
    return "" if check is None else ", ".join(f"{name} {value:.4g}" for name, value in check.details.items())


# --- files -------------------------------------------------------------------------------------------------------------


def write(out: Path, rows: Sequence[Row], rates: Rates, *, quick: bool) -> None:
    """``results.json`` and ``table.txt``."""
    out.mkdir(parents=True, exist_ok=True)
    values = {
        **environment(),
        "quick": quick,
        "rates": rates._asdict(),
        "rows": [_as_json(row) for row in rows],
    }
    (out / "results.json").write_text(json.dumps(values, indent=1) + "\n")
    warning = ["QUICK: small sizes, two rounds; no time below means anything"] if quick else []
    (out / "table.txt").write_text(as_text(heading(rates), *warning, table(rows), *notes(rows)))


def environment() -> dict[str, Any]:
    """When, with what, and where."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "dcmerge_ext": dcmerge_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "cpu": cpu_model(),
        "backends": dcmerge_ext.backends(),
    }


def as_text(*parts: str | Table) -> str:
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, markup=False, highlight=False, soft_wrap=True)
    for part in parts:
        console.print(part)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "case": row.case.name,
        "status": row.status,
        "floor": row.case.floor,
        "aim": row.case.aim,
        "reached": row.verdict,
        "curves": [list(curve) for curve in row.case.curves],
        "check": None if row.check is None else asdict(row.check),
        "ours_seconds": None if row.ours is None else row.ours.seconds,
        "rivals": [
            {
                "name": rival.rival.name,
                "setting": rival.setting,
                "check": None if rival.check is None else asdict(rival.check),
                "seconds": None if rival.samples is None else rival.samples.seconds,
                "ours_seconds": None if rival.ours is None else rival.ours.seconds,
                "ratio": rival.ratio,
                "note": rival.rival.note,
            }
            for rival in row.rivals
        ],
        "bound_by": row.bound_by,
        "bound_seconds": row.bound_seconds,
        "fraction": row.fraction,
        "peak_bytes": row.peak_bytes,
        "note": row.note,
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
