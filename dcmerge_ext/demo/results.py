"""What the demo found, as plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dcmerge_ext.demo.data import TASKS


@dataclass(frozen=True)
class Row:
    """One line of a table. Accuracies are shares in [0, 1], on test images."""

    method: str
    """"zero-shot", "fine-tuned", or a merging method."""
    accuracies: list[float]
    """One per task."""
    normalized_accuracy: float
    scale: float | None = None
    """Best on the validation images (averaging: 1, by definition); None where nothing was merged."""
    seconds: float | None = None
    """Time of the merge, from files to file."""
    checkpoint: str | None = None
    """The merged model, relative to the output folder."""
    default_scale: float | None = None
    normalized_at_default: float | None = None
    """Normalized accuracy on test images at the method's default scale, which needs no validation images."""
    validation_curve: list[float] | None = None
    """Normalized accuracy on validation images, one per scale tried; None where no scale was chosen."""

    @property
    def mean_accuracy(self) -> float:
        return fmean(self.accuracies)


@dataclass(frozen=True)
class FamilyResult:
    """One table: all tasks fine-tuned in one way, and their merges."""

    name: str
    """"full" or "lora"."""
    rows: list[Row]

    def row(self, method: str) -> Row:
        return next(row for row in self.rows if row.method == method)

    @property
    def merges(self) -> list[Row]:
        return [row for row in self.rows if row.scale is not None]


@dataclass(frozen=True)
class DemoResult:
    """Everything a run of the demo measured, and where its files are."""

    out: Path
    seed: int
    quick: bool
    scales: list[float]
    """Grid on which scales were chosen."""
    num_test: int
    """Test images of each task."""
    num_validation: int
    families: list[FamilyResult]
    seconds: float
    """Wall time of the whole run."""

    @property
    def picture(self) -> Path:
        return self.out / "demo.png"

    @property
    def results(self) -> Path:
        return self.out / "results.json"

    def family(self, name: str) -> FamilyResult:
        return next(family for family in self.families if family.name == name)

    def save(self) -> None:
        """Write ``results.json``."""
        values: dict[str, Any] = dataclasses.asdict(self)
        del values["out"]
        values["tasks"] = [{"name": task.name, "question": task.question.text} for task in TASKS]
        for family, saved in zip(self.families, values["families"], strict=True):
            for row, entry in zip(family.rows, saved["rows"], strict=True):
                entry["mean_accuracy"] = row.mean_accuracy
        self.results.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def first_best(values: Sequence[float]) -> int:
    """Index of the largest value; the first of equals."""
    return max(range(len(values)), key=lambda i: values[i])
