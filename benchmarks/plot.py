"""Growth curves: ours, its rival, and the time that the needed operations take at the measured GEMM rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from case import Row


def draw(rows: Sequence[Row], out: Path) -> bool:
    """One panel per curve into ``out``. False: no curve has two points.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        for name, place in row.case.curves if row.status == "timed" else ():
            curves.setdefault(name, []).append((place, row))
    curves = {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items() if len(points) > 1}
    if not curves:
        return False
    figure: Any = Figure(figsize=(5 * len(curves), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        _panel(axes, name, points)
    figure.savefig(out, dpi=140)
    return True


def _panel(axes: Any, name: str, points: Sequence[tuple[float, Row]]) -> None:
    places = [place for place, _ in points]
    rows = [row for _, row in points]
    first = [row.rivals[0] for row in rows]
    for label, samples, colour in (
        (first[0].rival.name, [rival.samples for rival in first], "#93a1b5"),
        ("dcmerge_ext", [row.ours for row in rows], "#2f6db5"),
    ):
        taken = [(x, s) for x, s in zip(places, samples, strict=True) if s is not None]
        xs = [x for x, _ in taken]
        axes.plot(xs, [s.median for _, s in taken], "o-", color=colour, label=label, markersize=4)
        axes.fill_between(
            xs, [s.low for _, s in taken], [s.high for _, s in taken], color=colour, alpha=0.2, linewidth=0
        )
    axes.plot(places, [row.bound_seconds for row in rows], ":", color="#3b3f46", label="operations at the GEMM rate")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.minorticks_off()
    axes.set_title(name, fontsize=10)
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=8)
