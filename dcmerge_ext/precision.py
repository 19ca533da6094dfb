"""Autocast kept out: what the package computes has the precision that its documentation says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_DEVICES = ("cpu", "cuda")


def without_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, in which ``torch.autocast`` is off, as it is in torch's own decompositions."""

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        casting = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not casting:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in casting:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    # inspect.unwrap goes no further: who calls what it gives (an operator) is to be guarded, too
    del run.__wrapped__
    run.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return run
