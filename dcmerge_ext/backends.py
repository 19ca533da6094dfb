"""Which implementation of :mod:`dcmerge_ext.ops` runs: a list with names, chosen per tensor device.

``cpu`` is the native C++ core, ``reference`` the same operations in plain torch (any device). Automatic choice takes
the native core on CPU tensors; a choice by name succeeds or raises, never something else.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from dcmerge_ext import _native, reference
from dcmerge_ext.errors import BackendUnavailable

ENVIRONMENT = "DCMERGE_BACKEND"
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("dcmerge_backend", default=None)
_warned: set[str] = set()


def backends() -> dict[str, str]:
    """Name -> what it is, or ``unavailable: why`` for those that cannot run here."""
    return {
        "reference": f"available: plain torch {torch.__version__}, any device",
        "cpu": f"available: {_native.description()}" if _native.loaded() else f"unavailable: {_native.why_not()}",
        "cuda": "unavailable: this version has no CUDA kernels; CUDA tensors run on reference",
    }


def available(name: str) -> bool:
    """Whether the backend can run here. Raises BackendUnavailable for a name that does not exist."""
    listing = backends()
    if name not in listing:
        raise BackendUnavailable(f"backend {name!r} does not exist; known: {', '.join(listing)}")
    return not listing[name].startswith("unavailable")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside the block (this thread and context only).

    Around a call of a function compiled by ``torch.compile`` it holds as for any other; inside such a function it
    breaks the graph, which ``fullgraph=True`` refuses.

    Raises:
        BackendUnavailable: on entry, when the backend does not exist or cannot run here, with the reason.
    """
    _require(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def for_device(device: torch.device) -> ModuleType:
    """The backend that runs on tensors of ``device``."""
    forced = _chosen.get() or os.environ.get(ENVIRONMENT)
    if forced:
        _require(forced)
        if forced == "cpu" and device.type != "cpu":
            raise BackendUnavailable(
                f"backend 'cpu' was chosen and the tensor lies on {device}; move it or choose another"
            )
        return _native if forced == "cpu" else reference
    if device.type == "cpu" and _native.loaded():
        return _native
    if device.type == "cpu":
        _warn_once(
            "cpu", f"the native CPU core is not available ({_native.why_not()}); plain torch runs instead, slower"
        )
    else:
        _warn_once(device.type, f"no native kernels for {device.type} tensors in this build; plain torch runs there")
    return reference


def _require(name: str) -> None:
    if not available(name):
        raise BackendUnavailable(f"backend {name!r} is {backends()[name]}")


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"dcmerge_ext: {message}", RuntimeWarning, stacklevel=5)
