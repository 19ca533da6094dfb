"""What a merging method is, and the register of those that exist.

A method declares options (typed fields), scope and default scale, and implements ``merge``. It never sees files,
devices, other tensors or names beyond a key. To add one: a file here, an import in ``__init__.py``, a README row.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import msgspec
import torch

from dcmerge_ext.errors import OptionError
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


_METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> Callable[..., Update]:
    """Enter the method into the register; returns it as a function of updates and options."""
    _METHODS[cls.name] = cls

    def merge(updates: Sequence[Update], **options: Any) -> Update:
        from dcmerge_ext.merging import merge_updates  # the register is imported by it

        return merge_updates(updates, method=cls.name, **options)

    parameters = [inspect.Parameter("updates", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.type)
        for o in describe_options(cls)
    ]
    merge.__name__ = merge.__qualname__ = cls.name
    merge.__module__ = cls.__module__
    merge.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    merge.__doc__ = (
        f"{inspect.getdoc(cls)}\n\nArgs:\n    updates: T updates of one matrix, tensors and/or LowRank.\n"
        + "".join(f"    {o.name}: {o.meaning}\n" for o in describe_options(cls))
    )
    return merge


@dataclass(frozen=True)
class OptionInfo:
    """One option of a method, for people."""

    name: str
    type: str
    default: Any
    meaning: str


def describe_options(cls: type[Method]) -> list[OptionInfo]:
    """Every option of a method, in the order of its declaration."""
    hints = get_type_hints(cls, include_extras=True)
    infos = []
    for f in msgspec.structs.fields(cls):
        hint = hints[f.name]
        metas = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        meaning = next((m.description for m in metas if isinstance(m, msgspec.Meta) and m.description), "")
        infos.append(OptionInfo(f.name, _type_text(hint), f.default, meaning))
    return infos


def _type_text(hint: Any) -> str:
    """A type as a person writes it: ``int | list of int | None``, ``'mean' | 'sum'``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(_type_text(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    return "None" if hint is type(None) else str(hint.__name__)


def list_methods() -> dict[str, type[Method]]:
    """Name -> method class, in alphabetical order."""
    return dict(sorted(_METHODS.items()))


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def create(name: str, options: Mapping[str, Any]) -> Method:
    """The method with these options, validated.

    Raises:
        OptionError: unknown method or option (the nearest name is suggested), a value of the wrong type or range, or a
            preset together with an option it sets differently.
    """
    if name not in _METHODS:
        raise OptionError(
            f"unknown method {name!r}{nearest(name, list(_METHODS))} (known: {', '.join(sorted(_METHODS))})"
        )
    cls = _METHODS[name]
    known = [f.name for f in msgspec.structs.fields(cls)]
    for option in options:
        if option not in known:
            listing = f"its options are {', '.join(known)}" if known else "it has no options"
            raise OptionError(f"method {name!r} has no option {option!r}{nearest(option, known)} ({listing})")
    given = dict(options)
    if preset := preset_of(cls, given):
        for option, value in preset.options.items():
            if option in given and given[option] != value:
                raise OptionError(
                    f"option {option}={given[option]!r} conflicts with official={given['official']!r}, "
                    f"which sets {option}={value!r}; give one of them"
                )
            given[option] = value
    try:
        return msgspec.convert(given, cls)
    except msgspec.ValidationError as error:
        raise OptionError(f"method {name!r}: {error}") from error


def preset_of(cls: type[Method], options: Mapping[str, Any]) -> Preset | None:
    """The preset that the options name, if any."""
    name = options.get("official")
    if name is None:
        return None
    if name not in cls.presets:
        raise OptionError(f"method {cls.name!r} has no preset {name!r}; it has: {', '.join(cls.presets) or 'none'}")
    return cls.presets[name]


def survey_model(method: Method, num_tasks: int, dtype: torch.dtype, visit: Callable[[Any], None]) -> Any:
    """Run the survey passes of a model-scope method; ``visit(state)`` must survey every tensor into the state."""
    state = method.begin(num_tasks, dtype)
    for _ in range(method.num_surveys(dtype)):
        visit(state)
        state = method.finish(state)
    return state
