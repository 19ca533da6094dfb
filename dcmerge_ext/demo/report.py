"""The demo in words and tables. Every statement is computed from the results."""

from __future__ import annotations

import math
import shlex
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dcmerge_ext.demo.data import TASKS
from dcmerge_ext.demo.merging import METHODS
from dcmerge_ext.demo.results import DemoResult, FamilyResult

TITLES = {"full": "Full fine-tunes", "lora": "LoRA adapters"}
LABELS = {"zero-shot": "zero-shot", "fine-tuned": "fine-tuned", **METHODS}


def introduce(console: Console) -> None:
    """What is going to happen."""
    console.print(
        f"A small vision transformer learns real handwritten digits. It is then fine-tuned for {len(TASKS)} tasks, "
        "each another question about digits shown in another way:"
    )
    for task in TASKS:
        console.print(f"  {task.title:<12} {task.question.text}", highlight=False)
    console.print("Can one merged model do the work of all the fine-tuned ones?\n")


def conclude(result: DemoResult, console: Console) -> None:
    """Tables, explanation, and where everything is."""
    for family in result.families:
        console.print(_table(family))
    notes = Table.grid(padding=(0, 1, 0, 0))
    for line in explain(result):
        notes.add_row("-", Text(line))
    console.print(notes)
    console.print(
        f"\nPicture: {result.picture}   numbers: {result.results}", highlight=False, markup=False, soft_wrap=True
    )
    console.print(f"Done in {result.seconds:.0f} s. To make one of these merges by hand:", highlight=False)
    console.print(shlex.join(command(result)), highlight=False, markup=False, soft_wrap=True)


def _table(family: FamilyResult) -> Table:
    """One column per model, one line per task."""
    best = max(row.normalized_accuracy for row in family.merges)
    table = Table(
        title=f"\n{TITLES[family.name]}: accuracy on test images in %",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("task")
    for row in family.rows:
        bold = "bold" if row in family.merges and row.normalized_accuracy == best else None
        table.add_column(LABELS[row.method].replace(" ", "\n"), justify="right", style=bold, header_style=bold)
    for i, task in enumerate(TASKS):
        table.add_row(task.title, *(_number(row.accuracies[i]) for row in family.rows), end_section=task is TASKS[-1])
    table.add_row("mean accuracy", *(_number(row.mean_accuracy) for row in family.rows))
    table.add_row("normalized accuracy", *(_number(row.normalized_accuracy) for row in family.rows), end_section=True)
    table.add_row("best scale", *("" if row.scale is None else f"{row.scale:.1f}" for row in family.rows))
    table.add_row("norm. at default scale", *(_number(row.normalized_at_default) for row in family.rows))
    table.add_row("merge time (s)", *("" if row.seconds is None else f"{row.seconds:.2f}" for row in family.rows))
    return table


def explain(result: DemoResult) -> list[str]:
    """What the tables say, for someone who has never seen merging."""
    lines = [_explain_family(result, family) for family in result.families]
    seconds = [row.seconds for family in result.families for row in family.merges if row.seconds is not None]
    defaults = []
    for family in result.families:
        best = max(family.merges, key=lambda row: row.normalized_at_default or 0.0)
        defaults.append(
            f"{TITLES[family.name]}, {METHODS[best.method]} ({_number(best.normalized_at_default)}% at scale {best.default_scale:g})"
        )
    lines.append(
        f"Merging trains nothing: {fmean(seconds):.2f} s per merge on average. Only the scale was chosen, on "
        f"{result.num_validation} validation images; at default scales, which need none, the best are: {'; '.join(defaults)}."
    )
    lines.append(
        f"This is one seed with {result.num_test} test images: gaps under about {_number(_chance(result))} points may be chance. "
        "Another --seed draws other images and trains other models."
    )
    if result.quick:
        lines.append("Quick run: hardly any training, so these numbers say nothing about the methods.")
    return lines


def _explain_family(result: DemoResult, family: FamilyResult) -> str:
    ranked = sorted(family.merges, key=lambda row: -row.normalized_accuracy)
    kept = ", ".join(f"{METHODS[row.method]} {_number(row.normalized_accuracy)}%" for row in ranked)
    best, second = ranked[:2]
    gap = best.normalized_accuracy - second.normalized_accuracy
    if gap > _chance(result):
        verdict = f"{METHODS[best.method]} is ahead by {_number(gap)} points"
    else:
        verdict = f"the first two differ by {_number(gap)} points, which may be chance"
    return (
        f"{TITLES[family.name]}: the base alone is right in {_number(family.row('zero-shot').mean_accuracy)}% of "
        f"cases, the {len(TASKS)} fine-tuned models, each on its own task, in "
        f"{_number(family.row('fine-tuned').mean_accuracy)}%. One merged model for all tasks keeps this share of their "
        f"accuracy: {kept}; {verdict}."
    )


def command(result: DemoResult, family: str = "lora", method: str = "dc_merge") -> list[str]:
    """The command line that writes the same model as ``merged/FAMILY_METHOD``, to a folder beside it."""
    arguments = ["dcmerge", "merge", "--base", str(result.out / "base")]
    for task in TASKS:
        arguments += ["--task", str(result.out / family / task.name)]
    scale = result.family(family).row(method).scale
    return [*arguments, "--method", method, "--scale", f"{scale:g}", "--out", str(result.out / "merged" / "by_hand")]


def _chance(result: DemoResult) -> float:
    """Two standard errors of the difference of two mean accuracies, taken as independent: the largest of all merges."""
    means = [row.mean_accuracy for family in result.families for row in family.merges]
    answers = result.num_test * len(TASKS)
    return 2.0 * max(math.sqrt(2 * p * (1 - p) / answers) for p in means)


def _number(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
