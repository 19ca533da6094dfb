"""How good a merge is."""

from __future__ import annotations

from collections.abc import Sequence

from dcmerge_ext.errors import InputError


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
    if len(merged) != len(finetuned) or len(merged) == 0:
        raise InputError(
            f"normalized_accuracy: needs one accuracy per task on both sides, got {len(merged)} of the merged model and "
            f"{len(finetuned)} of the fine-tuned models"
        )
    for i, accuracy in enumerate(finetuned):
        if not accuracy > 0:
            raise InputError(
                f"normalized_accuracy: the fine-tuned model of task {i} has accuracy {accuracy}, and the measure divides "
                "by it; leave that task out"
            )
    return sum(m / f for m, f in zip(merged, finetuned, strict=True)) / len(merged)
