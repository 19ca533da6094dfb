"""The sequence of the demo: train a base, fine-tune it for every task in two ways, merge in four, measure all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dcmerge_ext.demo import report, training
from dcmerge_ext.demo.data import QUESTIONS, TASKS, Splits, load_splits
from dcmerge_ext.demo.environment import prepare_folder, quiet_libraries, remove_own_files, repeatable, require_packages
from dcmerge_ext.demo.merging import METHODS, merge_family
from dcmerge_ext.demo.picture import draw
from dcmerge_ext.demo.results import DemoResult
from dcmerge_ext.errors import InputError, RunError

FAMILIES = ("full", "lora")
_LEARNING_RATE = 1e-3
_SEARCH_UNITS = 8
"""One look at the validation images, in training steps, for the progress bar."""


@dataclass(frozen=True)
class _Effort:
    base_steps: int
    steps: int
    """Fine-tuning steps per task."""
    scales: list[float]

    @property
    def units(self) -> int:
        """Total work in training steps."""
        searches = len(FAMILIES) * (len(METHODS) - 1) * len(self.scales)  # averaging has no scale to choose
        return self.base_steps + len(FAMILIES) * len(TASKS) * self.steps + searches * _SEARCH_UNITS


_FULL = _Effort(base_steps=300, steps=200, scales=[i / 10 for i in range(1, 31)])
_QUICK = _Effort(base_steps=60, steps=20, scales=[1.0, 2.0, 3.0])


def run_demo(
    out: Path, *, seed: int = 0, overwrite: bool = False, quick: bool = False, console: Console | None = None
) -> DemoResult:
    """Show on real handwritten digits what merging is for; leaves checkpoints, ``results.json`` and ``demo.png``.

    Takes about a minute on one CPU core, without a network. The number of cores does not change the result.

    Args:
        out: folder for the checkpoints (``base``, ``full/TASK``, ``lora/TASK``, ``merged/FAMILY_METHOD``), the results
            and the picture; must be new or empty.
        seed: of the split of the images, the initial weights and the order of training.
        overwrite: replace an earlier demo in ``out``; other files there are left alone.
        quick: a few training steps only, to check that everything runs; the accuracies mean nothing.
        console: where progress, tables and explanation go; None is standard output.
    Raises:
        InputError: a package of the extra ``demo`` is missing, or ``out`` or ``seed`` cannot be used; nothing was
            written.   RunError: writing failed; nothing is left.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: needs a whole number from 0 to {2**32 - 1}")
    require_packages()
    prepare_folder(out, overwrite)
    console = console or Console()
    started = time.perf_counter()
    try:
        with quiet_libraries(), repeatable():
            result = _run(out, seed, _QUICK if quick else _FULL, quick, console, started)
    except OSError as error:
        remove_own_files(out)
        raise RunError(f"{out}: writing failed ({error.strerror or error}); the demo left nothing there") from error
    except BaseException:
        remove_own_files(out)
        raise
    report.conclude(result, console)
    return result


def _run(out: Path, seed: int, effort: _Effort, quick: bool, console: Console, started: float) -> DemoResult:
    report.introduce(console)
    splits = load_splits(seed)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=effort.units)

        def stage(text: str) -> None:
            progress.update(bar, description=text)

        def step() -> None:
            progress.advance(bar)

        stage("training the base model")
        _train_base(out, splits, effort.base_steps, seed, step)
        for f, family in enumerate(FAMILIES):
            for i, task in enumerate(TASKS):
                stage(f"fine-tuning ({family}): {task.title}")
                _fine_tune(out, family, i, splits, effort.steps, 1000 * seed + 1 + f * len(TASKS) + i, step)
        families = [
            merge_family(out, family, splits, effort.scales, stage, lambda: progress.advance(bar, _SEARCH_UNITS))
            for family in FAMILIES
        ]
        progress.update(bar, description="done")
    result = DemoResult(
        out=out,
        seed=seed,
        quick=quick,
        scales=effort.scales,
        num_test=len(splits.test),
        num_validation=len(splits.validation),
        families=families,
        seconds=time.perf_counter() - started,
    )
    draw(result, splits.test)
    result.save()
    return result


def _train_base(out: Path, splits: Splits, steps: int, seed: int, step: Callable[[], None]) -> None:
    """All questions at once, about digits shown as they are."""
    model = training.build_model(seed)
    training.train(
        model, splits.base, QUESTIONS, lambda images: images,
        steps=steps, learning_rate=_LEARNING_RATE, seed=seed, advance=step,
    )  # fmt: skip
    training.save_model(model, out / "base")


def _fine_tune(
    out: Path, family: str, index: int, splits: Splits, steps: int, seed: int, step: Callable[[], None]
) -> None:
    """One question, about digits shown in one way."""
    task = TASKS[index]
    model = training.load_model(out / "base")
    if family == "lora":
        model = training.add_lora(model, seed)
    else:
        # All models share the base's answers, as CLIP models share their text head: what is merged is how they see.
        model.get_submodule("classifier").requires_grad_(False)
    training.train(
        model, splits.train, [task.question], task.show,
        steps=steps, learning_rate=_LEARNING_RATE, seed=seed, advance=step,
    )  # fmt: skip
    save = training.save_adapter if family == "lora" else training.save_model
    save(model, out / family / task.name)
