"""The demo in one picture."""

from __future__ import annotations

from typing import Any

import torch

from dcmerge_ext.demo.data import TASKS, Images
from dcmerge_ext.demo.merging import METHODS
from dcmerge_ext.demo.report import TITLES
from dcmerge_ext.demo.results import DemoResult, FamilyResult

_COLOURS = {
    "zero-shot": "#c9ced6",
    "averaging": "#93a1b5",
    "task_arithmetic": "#e0a458",
    "ties": "#6fa287",
    "dc_merge": "#2f6db5",
    "fine-tuned": "#3b3f46",
}
_LABELS = {"zero-shot": "zero-shot (base)", **METHODS, "fine-tuned": "fine-tuned, one model per task"}
_SHOWN = (8, 3, 6, 7)
"""Digits of the samples."""


def draw(result: DemoResult, images: Images) -> None:
    """Write ``result.picture``: samples of each task, accuracies, and normalized accuracy against the scale."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(
        {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure: Any = Figure(figsize=(12, 9.2), layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.35, 2 * 3.4])
        top.suptitle(
            "Five tasks: each another question about digits shown in another way", x=0.01, ha="left", weight="bold"
        )
        for task_index, axes in enumerate(top.subplots(1, len(TASKS), gridspec_kw={"wspace": 0.16})):
            _samples(axes, task_index, images)
        grid = bottom.subplots(len(result.families), 2, width_ratios=[2.1, 1])
        for family, (bars, curves) in zip(result.families, grid, strict=True):
            _bars(bars, family)
            _curves(curves, family, result.scales)
        handles, labels = grid[0][0].get_legend_handles_labels()
        bottom.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(result.picture, dpi=140)


def _samples(axes: Any, task_index: int, images: Images) -> None:
    """A few test digits as the task shows them, with the right answers."""
    task = TASKS[task_index]
    chosen = [int((images.digits == digit).nonzero()[0]) for digit in _SHOWN]
    shown = task.show(images.pixels[chosen])
    answers = task.question.label(images.digits[chosen]).tolist()
    gap = torch.full((8, 1), float("nan"))
    strip = torch.cat([torch.cat([image, gap], dim=1) for image in shown], dim=1)[:, :-1]
    axes.imshow(strip.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([9 * i + 3.5 for i in range(len(chosen))], [task.question.answers[a] for a in answers])
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"{task.title}: {task.question.text}", fontsize=9)


def _bars(axes: Any, family: FamilyResult) -> None:
    """Accuracy per task and their mean, one bar per model."""
    groups = [*(task.title for task in TASKS), "mean"]
    width = 0.84 / len(_LABELS)
    for i, (method, label) in enumerate(_LABELS.items()):
        row = family.row(method)
        positions = [g + (i - (len(_LABELS) - 1) / 2) * width for g in range(len(groups))]
        heights = [100 * x for x in (*row.accuracies, row.mean_accuracy)]
        axes.bar(positions, heights, width * 0.92, color=_COLOURS[method], label=label)
        axes.annotate(f"{heights[-1]:.0f}", (positions[-1], heights[-1] + 1), ha="center", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.axvline(len(TASKS) - 0.5, color="#d5d8dd", linewidth=0.8)
    axes.set_ylim(0, 103)
    axes.set_ylabel("accuracy on test images (%)")
    axes.set_title(TITLES[family.name], loc="left", weight="bold")


def _curves(axes: Any, family: FamilyResult, scales: list[float]) -> None:
    """Normalized accuracy on validation images against the scale; the chosen scale is marked."""
    for row in family.merges:
        if row.validation_curve is None or row.scale is None:
            continue
        curve = [100 * x for x in row.validation_curve]
        axes.plot(scales, curve, color=_COLOURS[row.method], linewidth=1.8)
        axes.plot(row.scale, curve[scales.index(row.scale)], "o", color=_COLOURS[row.method])
    axes.axhline(100, color=_COLOURS["fine-tuned"], linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(scales))
    axes.set_xlabel("scale of the merged update (dot: chosen)")
    axes.set_ylabel("normalized accuracy (%)")
    axes.set_title("Choosing the scale, on validation images", loc="left")
