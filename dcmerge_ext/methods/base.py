"""What a merging method is.

A method declares options (typed fields), scope and default scale, and implements ``merge``. It never sees files,
devices, other tensors or names beyond a key. To add one: a file here, an import in ``__init__.py``, a README row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import msgspec
import torch

from dcmerge_ext.lowrank import Update
from dcmerge_ext.updates import Updates, UpdateSpec


@dataclass(frozen=True)
class Context:
    """What a method may know beside the updates themselves."""

    num_tasks: int
    """T of the whole run."""
    key: str = ""
    """Names the tensor, for seeding."""
    state: Any = None
    """What the surveys of a model-scope method found."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numerical facts a method leaves for the run record (plain JSON values)."""


@dataclass(frozen=True)
class Preset:
    """A published configuration: a named set of ordinary options, plus how the reader treats adapters and names."""

    options: Mapping[str, Any]
    lora_scale: Literal["apply", "ignore"] = "apply"
    mean_tensors: str | None = None
    """Regular expression (searched in the name) of matrices that take the mean instead of the method."""


class SurveyState(Protocol):
    """What a survey pass gathers. Shares add up, so that threads and processes can survey side by side."""

    def fork(self) -> SurveyState:
        """An empty share of the same pass."""
        ...

    def join(self, share: Any) -> None:
        """Add a share."""
        ...


class Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all methods. Fields are the options; class variables are facts about the method."""

    name: ClassVar[str]
    paper: ClassVar[str]
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    elementwise: ClassVar[bool] = False
    """Every element is merged by itself: applies to all floating tensors, in row panels."""
    keeps_rank: ClassVar[bool] = False
    """LowRank updates merge to a LowRank of rank sum of the ranks."""
    presets: ClassVar[Mapping[str, Preset]] = {}

    @classmethod
    def kind(cls) -> str:
        """What the method works on, for people."""
        return "whole model" if cls.scope == "model" else "elementwise" if cls.elementwise else "matrices"

    def default_scale(self, num_tasks: int) -> float:
        """Coefficient of the merged update where the caller gives none."""
        return 1.0

    def check(self, specs: Sequence[UpdateSpec], num_tasks: int) -> None:
        """Raise OptionError where an option does not suit these updates. Called from headers, before any data."""

    def num_surveys(self, dtype: torch.dtype) -> int:
        """Passes over the whole model that must come before ``merge`` (model scope)."""
        return 0

    def begin(self, num_tasks: int, dtype: torch.dtype) -> Any:
        """State of the first survey: a :class:`SurveyState`."""
        return None

    def survey(self, key: str, updates: Updates, state: Any) -> None:
        """See one tensor (or a panel of it) and add to ``state``, in any order."""

    def finish(self, state: Any) -> Any:
        """End a survey pass: the state of the next one, or the result that ``merge`` finds in ``ctx.state``."""
        return state

    def merge(self, updates: Updates, ctx: Context) -> Update:
        """The merged update, without the scale."""
        raise TypeError(f"{type(self).__name__} does not implement merge")

    def in_panels(self, specs: Sequence[UpdateSpec], num_tasks: int) -> bool:
        """Whether these updates are too large to be held whole, and merged by :meth:`prepare`. From headers."""
        return False

    def prepare(
        self, specs: Sequence[UpdateSpec], panels: Callable[[], Iterable[Updates]], ctx: Context
    ) -> Callable[[Updates], Update]:
        """What merges the row panels of one tensor, after passes over all of them.

        Args:
            specs: of the whole tensor.   panels: starts a pass, in order.
        """
        raise TypeError(f"{type(self).__name__} does not implement prepare")

    def merged_rank(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int | None:
        """Rank of the LowRank that LowRank updates merge to, from headers; None where the result is dense."""
        return sum(spec.rank or 0 for spec in specs) if self.keeps_rank else None

    def flops(self, specs: Sequence[UpdateSpec], num_tasks: int) -> float:
        """Rough count for the plan's estimate of time. 0: bound by reading and writing."""
        return 0.0

    def workspace(self, specs: Sequence[UpdateSpec], num_tasks: int) -> int:
        """Rough peak of memory held during ``merge``, in elements of the compute dtype."""
        numel = 1
        for size in specs[0].shape:
            numel *= size
        return 3 * numel
