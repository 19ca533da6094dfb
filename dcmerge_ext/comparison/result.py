"""The numbers of a comparison. Their JSON form is described in docs/compare.md; ``schema`` counts its changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dcmerge_ext.checkpoints.output import new_file

SCHEMA = 1


class Curve(msgspec.Struct, frozen=True):
    """A spectrum, sampled."""

    index: list[int]
    """From 1."""
    values: list[float]


class Spectra(msgspec.Struct, frozen=True):
    """Singular values of one matrix; of a stack of matrices the means over it."""

    merged: Curve
    tasks: list[Curve | None]
    smoothed: list[Curve | None] | None
    """As they entered the merge; None where the method smooths nothing."""


class TaskInMatrix(msgspec.Struct, frozen=True):
    """One task in one matrix; P_t takes the subspaces of its r_t leading singular vectors, left and right."""

    norm: float
    """Frobenius norm of the (weighted) update."""
    dir_sim: float
    """DirSim of the update's components and those of the merged update, -1 .. 1."""
    cos_sim: float
    """CosSim of the update and the merged update, -1 .. 1."""
    projected_dir_sim: float
    """DirSim with what the merged update does in the task's space (DC-Merge, eq. 6)."""
    projected_cos_sim: float
    lost: float
    """1 - projected_dir_sim, at most 1: the share of the task's directions that the merged update lost."""
    error: float
    """min over c >= 0 of |update - c P_t(merged)| / |update|: what cannot be had back from the merged update."""
    truncation_error: float
    """|update - its r_t components| / |update|, of which ``error`` is never less."""


class Matrix(msgspec.Struct, frozen=True):
    """One matrix of the model."""

    name: str
    shape: list[int]
    ranks: list[int]
    """Components r_t of each task that count; 0 where the task does not touch the matrix."""
    tasks: list[TaskInMatrix | None]
    dir_sim: list[list[float | None]]
    """Between the updates of the tasks, T x T."""
    cos_sim: list[list[float | None]]
    """Between the components of the tasks' updates, T x T."""
    blocks: list[list[float | None]]
    """Share of the merged update's squared norm in block (i, j) of the cover space, left basis of task i, right of j."""
    outside: float
    """Share outside the cover space."""
    spectra: Spectra


class Other(msgspec.Struct, frozen=True):
    """A tensor that is no matrix: CosSim with the update of each task, None where there is none."""

    name: str
    shape: list[int]
    cos_sim: list[float | None]


class TaskSummary(msgspec.Struct, frozen=True):
    """Means over the matrices that the task touches, None where there are none."""

    lost: float | None
    dir_sim: float | None
    cos_sim: float | None
    projected_dir_sim: float | None
    projected_cos_sim: float | None
    error: float | None


class Comparison(msgspec.Struct, frozen=True):
    """A merged checkpoint against the tasks that went into it."""

    schema: int
    version: str
    """Of dcmerge_ext."""
    merged: str
    base: str | None
    tasks: list[str]
    weights: list[float]
    method: str | None
    """None: the merged checkpoint does not say."""
    options: dict[str, Any]
    scale: float | None
    summary: list[TaskSummary]
    """One per task."""
    matrices: list[Matrix]
    others: list[Other]

    def most_lost(self, count: int) -> list[tuple[Matrix, int, float]]:
        """The pairs (matrix, task) that lost most, with what they lost."""
        pairs = [(m, i, t.lost) for m in self.matrices for i, t in enumerate(m.tasks) if t]
        return sorted(pairs, key=lambda pair: -pair[2])[:count]

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    def save_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the numbers.

        Raises:
            InputError: the file exists already.   RunError: writing failed.
        """
        with new_file(path, overwrite) as partial:
            partial.write_bytes(self.to_json())

    def save_html(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the page; it needs the packages of the extra ``compare``.

        Raises:
            InputError: those are missing, or the file exists already.   RunError: writing failed.
        """
        from dcmerge_ext.comparison.page import render  # optional packages

        with new_file(path, overwrite) as partial:
            partial.write_text(render(self), encoding="utf-8")


def summarize(matrices: list[Matrix], num_tasks: int) -> list[TaskSummary]:
    """Means over matrices."""
    found = []
    for i in range(num_tasks):
        parts = [m.tasks[i] for m in matrices]
        present = [part for part in parts if part]
        means = {
            name: sum(getattr(part, name) for part in present) / len(present) if present else None
            for name in TaskSummary.__struct_fields__
        }
        found.append(TaskSummary(**means))
    return found
