"""Merging updates that are held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.base import Context, create, survey_model
from dcmerge_ext.updates import Updates


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
    named = updates if isinstance(updates, Mapping) else {"": updates}
    if not named:
        return {}
    checked = {name: Updates.of(sequence, weights, name) for name, sequence in named.items()}
    sizes = {len(u) for u in checked.values()}
    if len(sizes) > 1:
        raise InputError(f"merge_updates: every tensor needs the same number of tasks, got {sorted(sizes)}")
    num_tasks = sizes.pop()
    for u in checked.values():
        chosen.check(u.specs, num_tasks)
    dtype = max((u.dtype for u in checked.values()), key=lambda d: d.itemsize)

    def visit(state: Any) -> None:
        for name, u in checked.items():
            chosen.survey(name, u, state)

    state = survey_model(chosen, num_tasks, dtype, visit)
    merged = {name: chosen.merge(u, Context(num_tasks, name, state)) for name, u in checked.items()}
    return merged if isinstance(updates, Mapping) else merged[""]
