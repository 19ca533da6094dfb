"""Regular expressions out of configurations: ``re`` would let some of them run for ever, ``regex`` has a time limit."""

from __future__ import annotations

import functools

import regex

from dcmerge_ext.errors import InputError

_SECONDS = 1.0
"""For one name. A pattern that means well takes microseconds."""


def whole_name(pattern: str, name: str, where: str, kind: type[InputError] = InputError) -> bool:
    """Whether the pattern matches the whole name.

    Args:
        where: whose pattern it is, for messages.   kind: of error to raise.
    Raises:
        InputError: no regular expression, or one that takes too long.
    """
    compiled = check_pattern(pattern, where, kind)
    try:
        return compiled.fullmatch(name, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise kind(
            f"{where}: pattern {pattern!r} takes longer than {_SECONDS:g} s on the name {name!r}; simplify it"
        ) from error


def check_pattern(pattern: str, where: str, kind: type[InputError] = InputError) -> regex.Pattern[str]:
    """The pattern, compiled.

    Raises:
        InputError: it is no regular expression.
    """
    try:
        return _compiled(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise kind(f"{where}: pattern {pattern!r} is not a regular expression ({error})") from error


@functools.lru_cache(maxsize=1_024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)
