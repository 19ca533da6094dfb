"""The T updates of one tensor, as a method sees them: what they are is known, their values are loaded one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import torch

from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update


class UpdateSpec(NamedTuple):
    """What headers tell of one update."""

    shape: tuple[int, ...]
    rank: int | None
    """Columns of the factors of a LowRank (0: the task does not touch this tensor); None for a dense update."""
    dtype: torch.dtype
    """Dtype the merge computes in: float32 or float64."""


class Updates(Sequence[Update]):
    """A sequence of T updates of one tensor. ``updates[i]`` may read a file: keep no more of them than needed.

    Values are float32 or float64 and finite; per-task weights are already multiplied in (a weight on a task's singular
    values, votes or values is a weight on its update).
    """

    def __init__(self, specs: Sequence[UpdateSpec], load: Callable[[int], Update], offset: int = 0) -> None:
        self.specs = tuple(specs)
        self._load = load
        self.offset = offset
        """Elements of the tensor before these, where they are a panel of its rows."""

    def __len__(self) -> int:
        return len(self.specs)

    @overload
    def __getitem__(self, index: int) -> Update: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Update]: ...
    def __getitem__(self, index: int | slice) -> Update | Sequence[Update]:
        if isinstance(index, slice):
            return [self._load(i) for i in range(*index.indices(len(self)))]
        return self._load(range(len(self))[index])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.specs[0].shape

    @property
    def all_lowrank(self) -> bool:
        return all(spec.rank is not None for spec in self.specs)

    @property
    def dtype(self) -> torch.dtype:
        """Widest compute dtype among the tasks."""
        return torch.float64 if any(spec.dtype == torch.float64 for spec in self.specs) else torch.float32

    @classmethod
    def of(cls, updates: Sequence[Update], weights: Sequence[float] | None = None, name: str = "") -> Updates:
        """Updates held in memory, checked: equal shapes, floating, finite.

        Raises:
            InputError: no updates, shapes that differ, or non-finite values, naming tensor and task.
            TypeError: an update that is not floating point.
        """
        where = f" of {name!r}" if name else ""
        if len(updates) == 0:
            raise InputError(f"updates{where}: needs at least one task, got none")
        factors = check_weights(weights, len(updates))
        for i, update in enumerate(updates):
            if not update.dtype.is_floating_point:
                raise TypeError(f"update {i}{where}: needs a floating dtype, got {update.dtype}")
            if update.shape != updates[0].shape:
                raise InputError(
                    f"update {i}{where} has shape {tuple(update.shape)}, update 0 has {tuple(updates[0].shape)}; "
                    "all tasks must come from one base"
                )
            if bad := count_nonfinite(update):
                raise InputError(f"update {i}{where} holds {bad} NaN or Inf values; repair or leave out that task")
        specs = [
            UpdateSpec(tuple(u.shape), u.rank if isinstance(u, LowRank) else None, compute_dtype(u.dtype))
            for u in updates
        ]

        def load(i: int) -> Update:
            update = updates[i].to(specs[i].dtype)
            return update if factors[i] == 1 else update * factors[i]

        return cls(specs, load)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_weights(weights: Sequence[float] | None, num_tasks: int) -> tuple[float, ...]:
    """One finite weight per task; None is all ones."""
    if weights is None:
        return (1.0,) * num_tasks
    values = tuple(float(w) for w in weights)
    if len(values) != num_tasks or not all(abs(w) < float("inf") for w in values):
        raise InputError(f"weights: needs one finite number for each of {num_tasks} tasks, got {list(weights)}")
    return values


def count_nonfinite(update: Update) -> int:
    """Number of NaN and Inf values (in both factors of a LowRank)."""
    if isinstance(update, LowRank):
        return count_nonfinite(update.left) + count_nonfinite(update.right)
    if math.isfinite(float(update.sum())):  # one pass and no mask; an overflowing sum of finite values is counted below
        return 0
    return update.numel() - int(update.isfinite().sum())
