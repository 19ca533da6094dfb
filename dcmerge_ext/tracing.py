"""Which form of a public operation runs: the function itself, or its stand-in where a trace is recorded.

torch.compile and torch.export cannot look inside the operations, whose course depends on the data: a trace records one
operator of :mod:`dcmerge_ext.torch_library` for each. Outside a trace none is called: the dispatcher adds 6 to 16 us a
call, and an operation on a few hundred elements takes 3 to 17.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_stand_ins: dict[str, Callable[..., Any]] = {}


def traceable(operation: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``operation``, replaced by its stand-in in a trace.

    ``inspect.unwrap`` gives the function that never is. An operator needs that one: ``is_compiling`` holds for the
    whole process, in a thread that merges while another one compiles, too.
    """
    name = operation.__name__

    @functools.wraps(operation)
    def choose(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            stand_in: Callable[_Arguments, _Result] = _stand_ins[name]
            return stand_in(*args, **kwargs)
        return operation(*args, **kwargs)

    return choose


def stands_for(
    operation: Callable[_Arguments, _Result],
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Make a function of the same signature the stand-in of a traceable ``operation``."""

    def enter(stand_in: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        _stand_ins[operation.__name__] = stand_in
        return stand_in

    return enter
