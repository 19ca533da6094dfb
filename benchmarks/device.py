"""The GPU benchmark, ``python -m benchmarks --device cuda``: its rows, what it prints and the files it writes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import device_kernels as kernels
import device_merges as merges
import report
import torch
from device_case import Bench, DeviceCase, DeviceRow, measure_row
from device_timing import DEVICE, EventClock
from rich import box
from rich.console import Console
from rich.table import Table
from roofline import H100, DeviceRates, measure_device_rates, roof
from timing import QUICK

import dcmerge_ext

# --- rows --------------------------------------------------------------------------------------------------------------


def suite(*, quick: bool) -> list[DeviceCase]:
    """Every row; ``quick``: small sizes, every line of code in seconds."""

    def side(n: int) -> int:
        return max(12, n // 4 if n <= 128 else n // 8) if quick else n

    def layer(n: int) -> int:
        return min(n, max(192, n // 8)) if quick else n

    single, double = torch.float32, torch.float64
    return [
        kernels.rademacher(side(768), side(768)),
        kernels.rademacher(side(4096), side(4096)),
        *(kernels.kth_magnitude(8, side(n) ** 2, dtype) for n in (768, 128) for dtype in (single, double)),
        *(
            kernels.magnitude_histogram(8 * side(768) ** 2, width, dtype)
            for width, dtype in ((16, single), (11, single), (16, double))
        ),
        *(kernels.elect(8, side(768), masked=masked) for masked in (True, False)),
        kernels.project(side(128), 8, double),
        kernels.project(2 * side(160), 20, double),
        *(kernels.orthonormalize(8, side(n)) for n in (768, 4096)),
        *(kernels.small_svd(batch // (4 if quick else 1), 16, double) for batch in (8, 64, 448)),
        *(kernels.small_svd(batch // (4 if quick else 1), side(n), single) for n in (64, 128) for batch in (8, 64)),
        *(kernels.newton_schulz(4 if quick else 64, side(n)) for n in (64, 128)),
        kernels.smooth_energy(448 // (4 if quick else 1), 16, double, "average"),
        kernels.smooth_energy(8, side(384), single, "linear"),
        # Launches of a merge: operators that are not views or allocations, counted once on the host.
        merges.full_fine_tunes(layer(768), layer(768), 8, launches=5700),
        merges.full_fine_tunes(layer(3072), layer(768), 8, launches=5800),
        merges.full_fine_tunes(layer(1024), layer(4096), 14, launches=8900),
        merges.lora(layer(768), layer(768), 8, launches=185),
        merges.lora(layer(4096), layer(4096), 8, launches=185, form="extrapolated"),
        merges.lora(layer(4096), layer(11008), 8, launches=185, form="llava"),
    ]


# --- command -----------------------------------------------------------------------------------------------------------


def main(patterns: Sequence[str], out: Path, *, quick: bool, predict: bool, names_only: bool) -> int:
    """Exit status: 0; 1 an answer is wrong; 2 no such row, or no device that runs the kernels."""
    chosen = [case for case in suite(quick=quick) if any(fnmatch(case.name, pattern) for pattern in patterns)]
    if not chosen:
        return _refuse(f"no case matches {' '.join(patterns)}; --list shows them")
    if names_only:
        sys.stdout.write("".join(f"{case.name}\n" for case in chosen))
        return 0
    if predict:
        sys.stdout.write(predicted(chosen))
        return 0
    if reason := why_not():
        return _refuse(f"--device cuda needs a GPU: {reason}; --predict shows the times predicted for an H100")
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(device, "cuda", EventClock(device), QUICK if quick else DEVICE)
    rows = run(chosen, bench, out, quick=quick)
    return 1 if any(row.status == "failed" for row in rows) else 0


def why_not() -> str:
    """Why nothing can be measured here; empty where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    state = dcmerge_ext.backends()["cuda"]
    return "" if state.startswith("available") else f"the CUDA kernels are {state}"


def run(chosen: Sequence[DeviceCase], bench: Bench, out: Path, *, quick: bool) -> list[DeviceRow]:
    """Measure and report; the files are written after every row, so that an interrupted run leaves what it had."""
    progress = Console(stderr=True)
    rates = measure_device_rates(bench.device, bench.clock, quick=quick)
    rows: list[DeviceRow] = []
    for case in chosen:
        progress.print(f"{len(rows) + 1}/{len(chosen)} {case.name}", markup=False, highlight=False)
        rows.append(measure_row(case, bench, rates))
        write(out, rows, rates, quick=quick)
    sys.stdout.write((out / "device.txt").read_text())
    return rows


def _refuse(message: str) -> int:
    sys.stderr.write(f"benchmarks: {message}\n")
    return 2


# --- report ------------------------------------------------------------------------------------------------------------


def predicted(chosen: Sequence[DeviceCase]) -> str:
    """Markdown: what every row needs, and its roof on an H100."""
    rates = H100
    lines = [
        f"**Predicted, not measured**, for an {rates.name}: memory {rates.copy / 1e12:.3g} TB/s, "
        f"{rates.float32 / 1e12:.0f} TFLOP/s in float32 and {rates.float64 / 1e12:.0f} in float64 (without tensor cores; "
        f"with them float64 reaches 67), {rates.launch * 1e6:.2g} us per dependent launch. The longest of the three counts.",
        "",
        "| row | MB | MFLOP | launches | at least | bound by |",
        "|---|---|---|---|---|---|",
    ]
    for case in chosen:
        bound = roof(case.needs, rates)
        lines.append(
            f"| {case.name} | {_number(case.needs.traffic / 1e6)} | {_number(case.needs.flops / 1e6)} "
            f"| {case.needs.launches} | {_seconds(bound.seconds)} | {bound.bound_by} |"
        )
    return "\n".join(lines) + "\n"


def heading(rates: DeviceRates) -> str:
    return (
        f"dcmerge_ext {dcmerge_ext.__version__} (cuda {dcmerge_ext.backends()['cuda']}), torch {torch.__version__}, "
        f"{rates.name}; measured: copy {rates.copy / 1e9:.0f} GB/s, GEMM {rates.float32 / 1e12:.3g} TFLOP/s in float32 "
        f"(TF32 off), {rates.float64 / 1e12:.3g} in float64, {rates.launch * 1e6:.2g} us per launch"
    )


def table(rows: Sequence[DeviceRow]) -> Table:
    """A line for ours and one for each rival; medians, with the fastest and the slowest sample in brackets."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    left = ("case", "", "timed", "error (bound)", "roof")
    for title in ("case", "", "timed", "takes", "ratio", "roof", "reached", "error (bound)"):
        found.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    for row in rows:
        found.add_row(
            row.case.name,
            "dcmerge_ext",
            row.manner or "",
            row.status.upper() if row.ours is None else report.duration(row.ours),
            "",
            f"{_seconds(row.roof.seconds)} {row.roof.bound_by}",
            "" if row.fraction is None else f"{row.fraction:.0%}",
            "" if row.check is None else f"{row.check.error:.1e} ({row.check.bound:.0e})",
        )
        for rival in row.rivals:
            found.add_row(
                "",
                rival.rival.name,
                "",
                "not timed" if rival.samples is None else report.duration(rival.samples),
                "" if rival.ratio is None else f"{rival.ratio:.2f}",
                "",
                "",
                "" if rival.check is None else f"{rival.check.error:.1e}",
            )
    return found


def notes(rows: Sequence[DeviceRow]) -> list[str]:
    """What has to be said about single rows."""
    found = []
    for row in rows:
        parts = [row.note, *(f"{rival.rival.name}: {rival.note}" for rival in row.rivals if rival.note)]
        if any(parts):
            found.append(f"{row.case.name}: {'; '.join(filter(None, parts))}")
    return found


def write(out: Path, rows: Sequence[DeviceRow], rates: DeviceRates, *, quick: bool) -> None:
    """``device.json`` and ``device.txt``."""
    out.mkdir(parents=True, exist_ok=True)
    values = {
        **report.environment(),
        "quick": quick,
        "rates": rates._asdict(),
        "rows": [_as_json(row) for row in rows],
    }
    (out / "device.json").write_text(json.dumps(values, indent=1) + "\n")
    warning = ["QUICK: small sizes, two rounds; no time below means anything"] if quick else []
    (out / "device.txt").write_text(report.as_text(heading(rates), *warning, table(rows), *notes(rows)))


def _as_json(row: DeviceRow) -> dict[str, Any]:
    return {
        "case": row.case.name,
        "status": row.status,
        "timed": row.manner,
        "check": None if row.check is None else asdict(row.check),
        "ours_seconds": None if row.ours is None else row.ours.seconds,
        "rivals": [
            {
                "name": rival.rival.name,
                "check": None if rival.check is None else asdict(rival.check),
                "seconds": None if rival.samples is None else rival.samples.seconds,
                "ours_seconds": None if rival.ours is None else rival.ours.seconds,
                "ratio": rival.ratio,
                "note": rival.note,
            }
            for rival in row.rivals
        ],
        "needs": {**row.case.needs._asdict(), "dtype": kernels.name_of(row.case.needs.dtype)},
        "roof_seconds": row.roof.seconds,
        "bound_by": row.roof.bound_by,
        "fraction": row.fraction,
        "note": row.note,
    }


def _number(x: float) -> str:
    return "0" if x == 0 else f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
