"""How good a merge is: the accuracy it keeps, and how well its directions agree with those of the tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dcmerge_ext.errors import InputError
from dcmerge_ext.similarity import (
    basis_coefficients,
    cos_sim,
    dir_sim,
    projected_cos_sim,
    projected_dir_sim,
    r_matrix,
)

__all__ = [
    "basis_coefficients",
    "cos_sim",
    "dir_sim",
    "normalized_accuracy",
    "normalized_accuracy_improvement",
    "projected_cos_sim",
    "projected_dir_sim",
    "r_matrix",
]


def normalized_accuracy(merged: Sequence[float], finetuned: Sequence[float]) -> float:
    """Share of the fine-tuned models' accuracy that a merged model keeps: mean over tasks of merged_i / finetuned_i.

    Source: DC-Merge (arXiv 2603.06242), section 4. A mean of ratios, not a ratio of means: every task counts the same.

    Args:
        merged: T accuracies of the merged model, one per task, all in one unit (shares or per cent).
        finetuned: T accuracies of the models fine-tuned for each task, in the same order and unit.
    Returns:
        1.0 where the merged model equals the fine-tuned models; above 1 where it beats them.
    Raises:
        InputError: no tasks, two lengths, or a fine-tuned accuracy that is not above zero.
    """
    _check_lengths("normalized_accuracy", merged=merged, finetuned=finetuned)
    if bad := [m for m in merged if not math.isfinite(m)]:
        raise InputError(f"normalized_accuracy: the merged model has accuracy {bad[0]}; it must be a finite number")
    for i, accuracy in enumerate(finetuned):
        if not accuracy > 0:
            raise InputError(
                f"normalized_accuracy: the fine-tuned model of task {i} has accuracy {accuracy}, and the measure divides "
                "by it; leave that task out"
            )
    return sum(m / f for m, f in zip(merged, finetuned, strict=True)) / len(merged)


def normalized_accuracy_improvement(
    merged: Sequence[float], finetuned: Sequence[float], base: Sequence[float]
) -> list[float]:
    """NAI: the share of what fine-tuning gained that a merged model keeps, (merged_i - base_i) / (finetuned_i - base_i).

    Source: DC-Merge (arXiv 2603.06242). Unstable where fine-tuning hardly helps: the divisor is what it gained.

    Args:
        merged: T accuracies of the merged model, one per task, all in one unit (shares or per cent).
        finetuned: T accuracies of the models fine-tuned for each task, in the same order and unit.
        base: T accuracies of the base model, likewise.
    Returns:
        T numbers: 1.0 where the merged model equals the fine-tuned one, 0.0 where it equals the base, negative below it.
    Raises:
        InputError: no tasks, lengths that differ, or a fine-tuned accuracy that is not above the base's.
    """
    _check_lengths("normalized_accuracy_improvement", merged=merged, finetuned=finetuned, base=base)
    for i, (tuned, start) in enumerate(zip(finetuned, base, strict=True)):
        if not tuned > start:
            raise InputError(
                f"normalized_accuracy_improvement: fine-tuning took task {i} from accuracy {start} to {tuned}, and the "
                "measure divides by the gain; leave that task out"
            )
    return [(m - b) / (f - b) for m, f, b in zip(merged, finetuned, base, strict=True)]


_WHOSE = {"merged": "the merged model", "finetuned": "the fine-tuned models", "base": "the base model"}


def _check_lengths(function: str, **accuracies: Sequence[float]) -> None:
    lengths = {name: len(values) for name, values in accuracies.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        got = " and ".join(f"{length} of {_WHOSE[name]}" for name, length in lengths.items())
        raise InputError(f"{function}: needs one accuracy per task and model, got {got}")
