"""Merging the fine-tuned models of the demo as ``dcmerge merge`` does, and measuring what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dcmerge_ext.checkpoints.run import merge_checkpoints
from dcmerge_ext.demo.data import TASKS, Splits
from dcmerge_ext.demo.results import FamilyResult, Row, first_best
from dcmerge_ext.demo.training import accuracies, accuracy, load_between, load_model, load_tuned
from dcmerge_ext.methods.registry import list_methods
from dcmerge_ext.metrics import normalized_accuracy

METHODS = {"averaging": "averaging", "task_arithmetic": "task arithmetic", "ties": "TIES", "dc_merge": "DC-Merge"}
"""Method -> its name in print, in the order of the tables."""


def merge_family(
    out: Path,
    family: str,
    splits: Splits,
    scales: list[float],
    stage: Callable[[str], None],
    advance: Callable[[], None],
) -> FamilyResult:
    """Merge the models in ``out/family`` by every method, at the best of ``scales`` on the validation images.

    Args:
        stage: is told what begins.   advance: is called once per scale tried.
    """
    base = load_model(out / "base")
    tuned = [load_tuned(out, family, task.name) for task in TASKS]
    tuned_test, tuned_validation = (
        [accuracy(model, images, task) for model, task in zip(tuned, TASKS, strict=True)]
        for images in (splits.test, splits.validation)
    )
    zero_shot = accuracies(base, splits.test)
    rows = [
        Row("zero-shot", zero_shot, normalized_accuracy(zero_shot, tuned_test)),
        Row("fine-tuned", tuned_test, normalized_accuracy(tuned_test, tuned_test)),
    ]
    tasks = [out / family / task.name for task in TASKS]
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    for method, label in METHODS.items():
        stage(f"merging ({family}): {label}")
        checkpoint = out / "merged" / f"{family}_{method}"
        default = list_methods()[method]().default_scale(len(tasks))
        report = merge_checkpoints(out / "base", tasks, checkpoint, method, 1.0, device="cpu")
        # base + scale * update is linear in the scale: one merge serves the whole search
        unit = load_model(checkpoint).state_dict()
        scale, curve = 1.0, None
        if method != "averaging":  # another scale would make it task arithmetic
            curve = []
            for candidate in scales:
                load_between(base, start, unit, candidate)
                curve.append(normalized_accuracy(accuracies(base, splits.validation), tuned_validation))
                advance()
            scale = scales[first_best(curve)]
            report = merge_checkpoints(out / "base", tasks, checkpoint, method, scale, device="cpu", overwrite=True)
        load_between(base, start, unit, default)
        at_default = normalized_accuracy(accuracies(base, splits.test), tuned_test)
        merged = accuracies(load_model(checkpoint), splits.test)
        rows.append(
            Row(
                method,
                merged,
                normalized_accuracy(merged, tuned_test),
                scale=scale,
                seconds=report.seconds,
                checkpoint=checkpoint.relative_to(out).as_posix(),
                default_scale=default,
                normalized_at_default=at_default,
                validation_curve=curve,
            )
        )
    return FamilyResult(family, rows)
