"""The register of methods: by name, with their options validated and described."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from dcmerge_ext.errors import OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods.apply import merge_with
from dcmerge_ext.methods.base import Method, Preset

_METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> Callable[..., Update]:
    """Enter the method into the register; returns it as a function of updates and options."""
    _METHODS[cls.name] = cls

    def merge(updates: Sequence[Update], *, weights: Sequence[float] | None = None, **options: Any) -> Update:
        return merge_with(create(cls.name, options), {"": updates}, weights)[""]

    parameters = [
        inspect.Parameter("updates", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter("weights", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
    parameters += [
        inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.type)
        for o in describe_options(cls)
    ]
    merge.__name__ = merge.__qualname__ = cls.name
    merge.__module__ = cls.__module__
    merge.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    merge.__doc__ = (
        f"{inspect.getdoc(cls)}\n\nArgs:\n    updates: T updates of one matrix, tensors and/or LowRank.\n"
        "    weights: one factor per task, default 1.\n"
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


def explain(error: msgspec.ValidationError, cls: type[msgspec.Struct]) -> str:
    """What msgspec found wrong, with the option's name first and what it takes."""
    match = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", str(error), re.DOTALL)
    assert match is not None
    text = match[1].replace("`", "")
    if not match[2]:
        return text
    hint = get_type_hints(cls, include_extras=True).get(match[2])
    takes = f" (takes {_type_text(hint)})" if hint is not None else ""
    return f"{match[2]}: {text[0].lower()}{text[1:]}{takes}"


def list_methods() -> dict[str, type[Method]]:
    """Name -> method class, in alphabetical order."""
    return dict(sorted(_METHODS.items()))


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
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
    known = cls.__struct_fields__
    for option in options:
        if option not in known:
            listing = f"its options are {', '.join(known)}" if known else "it has no options"
            raise OptionError(f"method {name!r} has no option {option!r}{nearest(option, list(known))} ({listing})")
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
        raise OptionError(f"method {name!r}: {explain(error, cls)}") from error
    except UnicodeEncodeError as error:
        raise OptionError(f"method {name!r}: {error.object!r} is no text (half of a surrogate pair)") from error


def preset_of(cls: type[Method], options: Mapping[str, Any]) -> Preset | None:
    """The preset that the options name, if any."""
    name = options.get("official")
    if name is None:
        return None
    if not isinstance(name, str) or name not in cls.presets:
        raise OptionError(f"method {cls.name!r} has no preset {name!r}; it has: {', '.join(cls.presets) or 'none'}")
    return cls.presets[name]
