"""What was measured, as plain values, and where it lies on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Probe:
    """The base with its linear head."""

    task: str
    seed: int
    classes: int
    train: int
    """Number of texts, as the next two."""
    validation: int
    test: int
    accuracy: float
    """On test texts: zero-shot as far as the encoder is concerned."""
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """One fine-tuned model on its own task, as it was saved."""

    task: str
    kind: str
    seed: int
    validation: float
    test: float
    seconds: float
    """Of training."""


@dataclass(frozen=True)
class Merged:
    """One merged model. Accuracies are shares in [0, 1], on test texts, in the order of ``tasks``."""

    label: str
    method: str
    options: dict[str, Any]
    kind: str
    seed: int
    tasks: list[str]
    scales: list[float]
    curve: list[float]
    """Normalized accuracy on validation texts, one per scale."""
    scale: float
    """The best of them."""
    accuracies: list[float]
    normalized: float
    default_scale: float
    accuracies_at_default: list[float]
    normalized_at_default: float
    dir_sim: float
    projected_dir_sim: float
    cos_sim: float
    """Of the merged update with each task's, means over the encoder's matrices and tasks; do not depend on the scale."""
    merge_seconds: float
    seconds: float
    """With search, test and similarities."""


@dataclass(frozen=True)
class Results:
    """Everything a run measured."""

    probes: list[Probe]
    tuned: list[Tuned]
    merged: list[Merged]

    @property
    def seeds(self) -> list[int]:
        return sorted({probe.seed for probe in self.probes})

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(probe.task for probe in self.probes))

    def probe(self, seed: int, task: str) -> Probe:
        return next(p for p in self.probes if (p.seed, p.task) == (seed, task))

    def fine_tuned(self, seed: int, kind: str, task: str) -> Tuned:
        return next(t for t in self.tuned if (t.seed, t.kind, t.task) == (seed, kind, task))

    def of(self, seed: int, kind: str, *, count: int | None = None) -> dict[str, Merged]:
        """Label -> the merge of ``count`` tasks. None: of all."""
        count = len(self.tasks) if count is None else count
        return {m.label: m for m in self.merged if (m.seed, m.kind, len(m.tasks)) == (seed, kind, count)}


class Place:
    """The folder of a run. What is complete stands under its final name, so that a run can go on where it was cut off."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.base = out / "base"
        self.results = out / "results.json"

    def data(self, seed: int, task: str) -> Path:
        return self.out / f"seed{seed}" / "data" / f"{task}.json"

    def head(self, seed: int, task: str) -> Path:
        return self.out / f"seed{seed}" / "heads" / f"{task}.safetensors"

    def tuned(self, seed: int, kind: str, task: str) -> Path:
        return self.out / f"seed{seed}" / kind / task

    def record(self, seed: int, name: str) -> Path:
        return self.out / f"seed{seed}" / "records" / f"{name}.json"

    def write(self, seed: int, name: str, record: Probe | Tuned | Merged) -> None:
        write_json(self.record(seed, name), asdict(record))

    def read(self, seed: int, name: str) -> dict[str, Any]:
        return json.loads(self.record(seed, name).read_text(encoding="utf-8"))

    def collect(self, tasks: Sequence[str], kinds: Sequence[str], merges: Sequence[tuple[int, str]]) -> Results:
        """The records of a complete run; ``merges``: seed and name of each."""
        seeds = sorted({seed for seed, _ in merges})
        return Results(
            [Probe(**self.read(seed, f"probe-{task}")) for seed in seeds for task in tasks],
            [Tuned(**self.read(seed, f"{kind}-{task}")) for seed in seeds for kind in kinds for task in tasks],
            [Merged(**self.read(seed, name)) for seed, name in merges],
        )


def write_json(file: Path, values: Any) -> None:
    """All or nothing: a file that exists is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
