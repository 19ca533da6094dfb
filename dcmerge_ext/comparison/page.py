"""The page: one HTML file with everything in it, drawn by Vega-Lite (through Altair) in the reader's browser."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from dcmerge_ext.comparison.result import Comparison, Curve, Matrix
from dcmerge_ext.errors import InputError

try:
    import altair as alt
    import jinja2
    import vl_convert
except ImportError as error:
    raise InputError(
        f"the HTML report needs {error.name}; install it with: pip install 'dcmerge-ext[compare]' (--json needs nothing)"
    ) from error

_PAIRS = 10
_MERGED = "merged"
"""What the merged update is called among the tasks; no task has this label."""
_LABELS = 70
"""Matrices up to which each has its name beside the map."""
_LINES = alt.Legend(symbolType="stroke", symbolStrokeWidth=2)
_ROW, _SMALL_ROW = 13, 5
"""Height of a row of the map in pixels, with names and without."""
_LOST = alt.Scale(domain=[0, 1], scheme="viridis", reverse=True, clamp=True)
_SIGNED = alt.Scale(domain=[-1, 1], scheme="blueorange")
_EMBED = {
    "mode": "vega-lite",
    "bind": "#choice",
    "actions": {"export": True, "source": False, "compiled": False, "editor": False},
}


def render(comparison: Comparison) -> str:
    """The page of a comparison, self-contained."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    )
    names = labels(comparison.tasks)
    return page.render(
        comparison=comparison,
        names=names,
        most_lost=comparison.most_lost(_PAIRS),
        library=vl_convert.javascript_bundle(vl_version=alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]),  # type: ignore[call-arg]
        # a name must not end the script element
        chart=_chart(comparison, names).to_json(indent=None).replace("<", r"\u003c") if comparison.matrices else "",
        settings=_EMBED,
    )


def labels(paths: list[str]) -> list[str]:
    """A short name for each task: the last part of its path where that tells them, and the merged update, apart."""
    short = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
    return [
        name if short.count(name) == 1 and name != _MERGED else f"{i + 1}: {path}"
        for i, (name, path) in enumerate(zip(short, paths, strict=True))
    ]


def _chart(comparison: Comparison, names: list[str]) -> alt.VConcatChart:
    matrices = comparison.matrices
    worst = comparison.most_lost(1)
    first = worst[0][0].name if worst else matrices[0].name
    picked = alt.selection_point(
        name="matrix",
        fields=["matrix"],
        value=[{"matrix": first}],
        bind=alt.binding_select(options=[m.name for m in matrices], name="matrix: "),
        on="click",
        clear=False,
    )
    details = alt.vconcat(*_details(matrices, names, picked)).resolve_scale(color="independent")
    overview = alt.hconcat(_map(matrices, names, picked), details).resolve_scale(color="independent")
    return (
        alt.vconcat(overview, _depth(matrices, names))
        .resolve_scale(color="independent")
        .configure_view(stroke=None)
        .configure_axis(grid=False)
    )


def _map(matrices: list[Matrix], names: list[str], picked: alt.Parameter) -> alt.Chart:
    rows = [
        {"matrix": m.name, "task": names[i], "lost": _short(task.lost), "error": _short(task.error)}
        for m in matrices
        for i, task in enumerate(m.tasks)
        if task
    ]
    named = len(matrices) <= _LABELS
    axis = alt.Axis(title=None, labelLimit=320, labelOverlap=False) if named else None
    return (
        alt.Chart(alt.Data(values=rows), title="lost, by matrix and task (click a row)")
        .mark_rect()
        .encode(
            x=alt.X("task:N", sort=names, title=None, axis=alt.Axis(orient="top", labelAngle=-40, labelLimit=160)),
            y=alt.Y("matrix:N", sort=[m.name for m in matrices], axis=axis),
            color=alt.Color("lost:Q", scale=_LOST, title="lost"),
            stroke=alt.condition(picked, alt.value("#d62728"), alt.value(None)),
            tooltip=["matrix:N", "task:N", "lost:Q", "error:Q"],
        )
        .add_params(picked)
        .properties(width=max(120, 34 * len(names)), height=alt.Step(_ROW if named else _SMALL_ROW))
    )


def _details(matrices: list[Matrix], names: list[str], picked: alt.Parameter) -> list[alt.ConcatChart | alt.Chart]:
    return [
        _spectra(matrices, names, picked),
        alt.hconcat(
            _grid(matrices, names, picked, "blocks", "merged energy by block of the cover space", ("left", "right")),
            _grid(matrices, names, picked, "dir_sim", "DirSim between the tasks", ("task", "task ")),
        ).resolve_scale(color="independent"),
        _bars(matrices, names, picked),
    ]


def _spectra(matrices: list[Matrix], names: list[str], picked: alt.Parameter) -> alt.Chart:
    rows: list[dict[str, Any]] = []

    def add(matrix: Matrix, curve: Curve | None, task: str, kind: str) -> None:
        if curve is not None:
            values = [_short(x) for x in curve.values]
            rows.append({"matrix": matrix.name, "task": task, "kind": kind, "index": curve.index, "sigma": values})

    for matrix in matrices:
        for i, name in enumerate(names):
            add(matrix, matrix.spectra.tasks[i], name, "update")
            if matrix.spectra.smoothed:
                add(matrix, matrix.spectra.smoothed[i], name, "smoothed")
        add(matrix, matrix.spectra.merged, _MERGED, "update")
    return (
        alt.Chart(alt.Data(values=rows), title="singular values")
        .transform_filter(picked)
        .transform_flatten(["index", "sigma"])
        .transform_filter("datum.sigma > 0")
        .mark_line(point={"size": 12})
        .encode(
            x=alt.X("index:Q", scale=alt.Scale(type="log", nice=False), title="index", axis=alt.Axis(format="d")),
            y=alt.Y("sigma:Q", scale=alt.Scale(type="log"), title=None, axis=alt.Axis(format=".0e", tickCount=5)),
            color=alt.Color("task:N", scale=_task_scale([*names, _MERGED]), title=None, legend=_LINES),
            strokeDash=alt.StrokeDash(
                "kind:N", scale=alt.Scale(domain=["update", "smoothed"], range=[[1, 0], [5, 3]]), legend=None
            ),
            tooltip=["task:N", "kind:N", "index:Q", "sigma:Q"],
        )
        .properties(width=440, height=230)
    )


def _grid(
    matrices: list[Matrix],
    names: list[str],
    picked: alt.Parameter,
    what: str,
    title: str,
    axes: tuple[str, str],
) -> alt.LayerChart:
    """A T x T map of the picked matrix."""
    rows = [
        {"matrix": m.name, axes[0]: [a for a in names for _ in names], axes[1]: names * len(names), "value": flat}
        for m in matrices
        for flat in [[None if x is None else _short(x) for row in getattr(m, what) for x in row]]
    ]
    base = (
        alt.Chart(alt.Data(values=rows), title=title)
        .transform_filter(picked)
        .transform_flatten([*axes, "value"])
        .transform_filter("datum.value !== null")
        .encode(
            y=alt.Y(f"{axes[0]}:N", sort=names, title=None if "task" in axes else "left basis of"),
            x=alt.X(f"{axes[1]}:N", sort=names, title=None if "task" in axes else "right basis of"),
        )
        .properties(width=max(90, 26 * len(names)), height=max(90, 26 * len(names)))
    )
    scale = _SIGNED if what == "dir_sim" else alt.Scale(scheme="blues", domain=[0, 1], type="sqrt")
    cells = base.mark_rect().encode(
        color=alt.Color("value:Q", scale=scale, title=None), tooltip=[f"{axes[0]}:N", f"{axes[1]}:N", "value:Q"]
    )
    dark = "datum.value > 0.45" if what == "blocks" else "abs(datum.value) > 0.6"
    text = base.mark_text(fontSize=9).encode(
        text=alt.Text("value:Q", format=".2f"), color=alt.condition(dark, alt.value("white"), alt.value("black"))
    )
    return cells + text


def _bars(matrices: list[Matrix], names: list[str], picked: alt.Parameter) -> alt.Chart:
    measures = ["dir_sim", "cos_sim", "projected_dir_sim", "projected_cos_sim", "error", "truncation_error"]
    rows = [
        {
            "matrix": m.name,
            "task": names[i],
            "measure": measures,
            "value": [_short(getattr(task, name)) for name in measures],
        }
        for m in matrices
        for i, task in enumerate(m.tasks)
        if task
    ]
    return (
        alt.Chart(alt.Data(values=rows), title="merged against each task")
        .transform_filter(picked)
        .transform_flatten(["measure", "value"])
        .mark_bar()
        .encode(
            x=alt.X("value:Q", title=None),
            y=alt.Y("measure:N", sort=measures, title=None),
            yOffset=alt.YOffset("task:N", sort=names),
            color=alt.Color("task:N", scale=_task_scale(names), title=None),
            tooltip=["task:N", "measure:N", "value:Q"],
        )
        .properties(width=440, height=alt.Step(max(3, 18 // len(names))))
    )


def _depth(matrices: list[Matrix], names: list[str]) -> alt.Chart:
    rows = [
        {"matrix": m.name, "number": n, "task": names[i], "kept": _short(task.projected_dir_sim)}
        for n, m in enumerate(matrices, 1)
        for i, task in enumerate(m.tasks)
        if task
    ]
    return (
        alt.Chart(alt.Data(values=rows), title="projected DirSim over the model")
        .mark_line(point={"size": 15})
        .encode(
            x=alt.X("number:Q", title="matrix, in the order of names", axis=alt.Axis(format="d")),
            y=alt.Y("kept:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("task:N", scale=_task_scale(names), title=None),
            tooltip=["matrix:N", "task:N", "kept:Q"],
        )
        .properties(width=900, height=200)
    )


def _task_scale(names: list[str]) -> alt.Scale:
    """The same colour for a task in every picture; the merged update is black."""
    colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"]  # Okabe and Ito
    return alt.Scale(
        domain=names,
        range=["#000000" if name == _MERGED else colours[i % len(colours)] for i, name in enumerate(names)],
    )


def _short(x: float) -> float:
    """Four significant digits: what a picture shows."""
    return float(f"{x:.4g}")
