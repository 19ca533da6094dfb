"""What the experiment does: tasks, sizes, methods and scales, in full and in small."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import dcmerge_ext as dcm

from .data import TASKS, WITHOUT_EXTRAS, Sizes

KINDS = ("full", "lora")


@dataclass(frozen=True)
class Variant:
    """One line of a table: a method with options."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = KINDS
    subsets: bool = False
    """Also merged of fewer tasks."""


VARIANTS = (
    Variant("averaging", "averaging"),
    Variant("task_arithmetic", "task_arithmetic"),
    Variant("ties", "ties"),
    Variant("dare", "dare"),
    Variant("consensus", "consensus"),
    Variant("pcb", "pcb"),
    Variant("dc_merge", "dc_merge", subsets=True),
    Variant("dc_merge, smoothing=average", "dc_merge", {"smoothing": "average"}, ("full",)),
    Variant("dc_merge, smoothing=none", "dc_merge", {"smoothing": "none"}, ("lora",)),
    Variant("dc_merge, no mask", "dc_merge", {"block_size": 0}, subsets=True),
    Variant("tsv_m", "tsv_m"),
    Variant("iso_c", "iso_c"),
    Variant("iso_cts", "iso_cts"),
    Variant("score", "score"),
    Variant("esm", "esm"),
    Variant("esm, variant=roberta", "esm", {"variant": "roberta"}),
    Variant("wudi", "wudi"),
    Variant("doge", "doge"),
    Variant("knots", "knots", kinds=("lora",)),
    Variant("core_space", "core_space", kinds=("lora",)),
    Variant("robust_merge", "robust_merge", kinds=("lora",)),
)


@dataclass(frozen=True)
class Protocol:
    """The sizes of a run."""

    tasks: tuple[str, ...]
    sizes: Sizes
    width: int | None
    """Of a tiny untrained encoder. None: the published one."""
    steps: int
    """Fine-tuning steps per task."""
    multiples: tuple[float, ...]
    """Scales tried on the validation texts, in units of the method's default."""
    extensions: int
    """Further scales, as long as the best one lies at an end of those tried."""
    subsets: tuple[int, ...]
    """Numbers of tasks merged beside all of them, by the variants that ask for it."""


FULL = Protocol(
    tasks=tuple(task.name for task in TASKS),
    sizes=Sizes(train=3200, validation=240, test=480),
    width=None,
    steps=150,
    multiples=tuple(round(4 ** (k / 3), 3) for k in range(-3, 4)),
    extensions=4,
    subsets=(2, 4),
)
QUICK = Protocol(
    tasks=WITHOUT_EXTRAS,
    sizes=Sizes(train=140, validation=28, test=56),
    width=48,
    steps=3,
    multiples=(0.5, 1.0),
    extensions=1,
    subsets=(1,),
)


@dataclass(frozen=True)
class Merge:
    """One merge to be measured: of these tasks, in this order."""

    variant: Variant
    kind: str
    seed: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """For a file."""
        label = self.variant.label.replace(", ", "-").replace(" ", "_")
        return f"{self.kind}-{label}-{len(self.tasks)}"

    @property
    def default_scale(self) -> float:
        method = dcm.list_methods()[self.variant.method](**self.variant.options)
        return method.default_scale(len(self.tasks))


def merges(protocol: Protocol, seed: int) -> list[Merge]:
    """All merges of one seed. Which tasks a subset holds differs from seed to seed."""
    chosen = []
    for kind, variant in product(KINDS, VARIANTS):
        if kind in variant.kinds:
            for count in (*(protocol.subsets if variant.subsets else ()), len(protocol.tasks)):
                chosen.append(Merge(variant, kind, seed, subset(protocol.tasks, count, seed)))
    return chosen


def subset(tasks: tuple[str, ...], count: int, seed: int) -> tuple[str, ...]:
    """``count`` of the tasks; those of successive seeds follow each other. All of them: in their order."""
    return tasks if count == len(tasks) else tuple(tasks[(seed * count + i) % len(tasks)] for i in range(count))
