"""The tasks of the experiment: balanced splits without leaks, from the sources."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dcmerge_ext.errors import InputError

from . import sources
from .sources import Example


@dataclass(frozen=True)
class Task:
    """One question about short texts."""

    name: str
    question: str
    examples: Callable[[], Iterable[Example]]


@dataclass(frozen=True)
class Sizes:
    """Most examples of each split of a task; a task that has less gets a smaller training split."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Part:
    """One split: texts, and for each the index of its class."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Splits:
    """One task's data."""

    classes: list[str]
    train: Part
    validation: Part
    test: Part

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Splits:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return cls(saved["classes"], *(Part(**saved[part]) for part in ("train", "validation", "test")))


TASKS = (
    Task("language", "the language of a name of a place, language or currency", sources.language_names),
    Task("script", "the script of a character, by the sound in its Unicode name", sources.unicode_scripts),
    Task("fortune", "the topic of a fortune cookie", sources.fortune_topics),
    Task("country", "the country of a city", sources.city_countries),
    Task("docstring", "the package of a docstring's first line", sources.docstring_packages),
    Task("sentiment", "whether a word is liked", sources.word_sentiments),
)
WITHOUT_EXTRAS = ("script", "docstring")
"""Tasks whose sources come with Python and with what the package and its tests need anyway."""


def split(task: str, examples: Iterable[Example], sizes: Sizes, seed: int) -> Splits:
    """Balanced classes; validation, test and training texts in this order of a random order of groups.

    A text that occurs with two labels is left out, a text that occurs twice counts once (both regardless of case), and
    a group lies in one split as a whole.

    Raises:
        InputError: too few examples for validation and test, let alone training.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    distinct: dict[str, Example] = {}
    for example in examples:
        key = example.text.casefold()
        labels[key].add(example.label)
        distinct.setdefault(key, example)
    pool = [example for key, example in sorted(distinct.items()) if len(labels[key]) == 1]
    classes = sorted({example.label for example in pool})
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in pool:
        groups[example.group].append(example)
    order = sorted(groups)
    generator = random.Random(f"{task} {seed}")
    generator.shuffle(order)

    parts: dict[str, Part] = {}
    for name in ("validation", "test", "train"):
        quota = getattr(sizes, name) // max(1, len(classes))
        chosen: dict[str, list[str]] = {label: [] for label in classes}
        while order and any(len(texts) < quota for texts in chosen.values()):
            for example in groups[order.pop()]:
                if len(chosen[example.label]) < quota:
                    chosen[example.label].append(example.text)
        size = min(map(len, chosen.values()), default=0)
        if size == 0 or (size < quota and name != "train"):
            raise InputError(
                f"task {task!r}: its source has too few examples for {quota} of each of {len(classes)} classes in the "
                f"{name} split (one has {size}); is the source complete?"
            )
        pairs = [(text, classes.index(label)) for label, texts in chosen.items() for text in texts[:size]]
        generator.shuffle(pairs)
        parts[name] = Part([text for text, _ in pairs], [label for _, label in pairs])
    return Splits(classes, **parts)
