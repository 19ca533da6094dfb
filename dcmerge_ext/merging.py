"""Merging updates that are held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.apply import merge_with
from dcmerge_ext.methods.registry import create


@overload
def merge_updates(
    updates: Sequence[Update], method: str = "dc_merge", weights: Sequence[float] | None = None, **options: Any
) -> Update: ...
@overload
def merge_updates(
    updates: Mapping[str, Sequence[Update]],
    method: str = "dc_merge",
    weights: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, Update]: ...
def merge_updates(
    updates: Sequence[Update] | Mapping[str, Sequence[Update]],
    method: str = "dc_merge",
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Update | dict[str, Update]:
    """Merge T updates of one matrix, or of each matrix of a mapping. No scale is applied.

    Args:
        updates: sequence of T updates (..., m, n), tensors and/or LowRank; leading dimensions batch. Or a mapping from
            names to such sequences, all with the same T: the scope of whole-model methods is then the mapping.
        method: a name from :func:`dcmerge_ext.list_methods`.
        weights: one factor per task, default 1.
        options: of the method.
    Returns:
        The merged update in float32 (float64 for float64 input): a LowRank if all inputs are and the method keeps rank,
        otherwise a tensor. For a mapping, name -> merged update.
    Raises:
        OptionError: unknown method or option.   InputError: shapes that differ, non-finite values, no tasks.
    """
    chosen = create(method, options)
    if isinstance(updates, Mapping):
        return merge_with(chosen, updates, weights)
    return merge_with(chosen, {"": updates}, weights)[""]
