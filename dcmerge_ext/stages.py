"""Named stages of a merge: where its time goes, for ``dcmerge profile``, torch.profiler and NVTX.

A stage is marked where the work is done. Marks cost 0.1 to 0.2 us while nobody looks. They see one another's nesting by thread
and belong to the tensor that a context variable names, which :func:`~dcmerge_ext.parallel.side_by_side` hands to its threads.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch.autograd import profiler as torch_profiler

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

WAIT = "wait"
"""A thread waits for others: no work, and no part of any sum over stages."""
OTHER = "other"


class Work(NamedTuple):
    """What a stage has to do, whatever the implementation does."""

    flops: float = 0.0
    bytes: float = 0.0


class Event(NamedTuple):
    """One pass through a stage."""

    stage: str
    tensor: str | None
    """None: belongs to no tensor."""
    thread: str
    started: int
    """Nanoseconds of ``time.perf_counter_ns``."""
    duration: int
    exclusive: int
    """Nanoseconds outside of stages inside this one."""
    work: Work
    threads: int
    """Torch's threads that this thread could use."""


@dataclass
class _Open:
    """A stage that a thread is in."""

    name: str
    inside: int = 0
    """Nanoseconds spent so far in stages inside."""


class Collector:
    """Gathers the events of all threads."""

    def __init__(self, device: torch.device) -> None:
        self.events: list[Event] = []
        self._waits = device.type == "cuda"
        self._here = threading.local()

    def enter(self, name: str) -> None:
        self._stack().append(_Open(name))

    def innermost(self) -> str:
        """The stage that this thread is in."""
        stack = self._stack()
        return stack[-1].name if stack else OTHER

    def leave(self, name: str, started: int, work: Work) -> None:
        if self._waits:  # for the kernels that the stage started
            torch.cuda.synchronize()
        duration = time.perf_counter_ns() - started
        stack = self._stack()
        inside = stack.pop().inside
        if stack:
            stack[-1].inside += duration
        thread = threading.current_thread().name
        threads = torch.get_num_threads()
        self.events.append(
            Event(name, _tensor.get(), thread, started, duration, duration - inside, work, threads)
        )  # an append is atomic

    def _stack(self) -> list[_Open]:
        try:
            stack: list[_Open] = self._here.stack
        except AttributeError:
            stack = self._here.stack = []
        return stack


_collector: Collector | None = None
_tensor: ContextVar[str | None] = ContextVar("dcmerge_tensor", default=None)
_OFF: AbstractContextManager[None] = nullcontext()
_NO_WORK = Work()


class _Range:
    """A stage that somebody looks at: a collector, torch.profiler, or a tool that shows NVTX ranges."""

    __slots__ = ("_collector", "_name", "_nvtx", "_record", "_started", "_work")

    def __init__(self, name: str, work: Work) -> None:
        self._name, self._work, self._collector = name, work, _collector
        self._record: torch_profiler.record_function | None = None

    def __enter__(self) -> None:
        if torch_profiler._is_profiler_enabled:
            self._record = torch_profiler.record_function(self._name)
            self._record.__enter__()  # type: ignore[no-untyped-call]
        self._nvtx = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if self._nvtx:
            torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]
        if self._collector is not None:
            self._collector.enter(self._name)
        self._started = time.perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._collector is not None:
            self._collector.leave(self._name, self._started, self._work)
        if self._nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        if self._record is not None:
            self._record.__exit__(kind, error, trace)


def stage(name: str, flops: float = 0.0, nbytes: float = 0.0) -> AbstractContextManager[None]:
    """A stage around a block. ``flops``, ``nbytes``: what it has to do, where that is known."""
    if _collector is None and not torch_profiler._is_profiler_enabled:
        return _OFF
    return _Range(name, Work(flops, nbytes))


def staged(
    name: str, work: Callable[..., Work] | None = None
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """A stage around a function. ``work`` tells from the same arguments what it has to do; asked when somebody looks."""

    def mark(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            if _collector is None and not torch_profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            with _Range(name, _NO_WORK if work is None else work(*args, **kwargs)):
                return function(*args, **kwargs)

        return run

    return mark


def innermost() -> str:
    """The stage that this thread is in, for threads that take a part of its work; :data:`OTHER` where none collects."""
    return OTHER if _collector is None else _collector.innermost()


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Tensor = TypeVar("_Tensor", bound=_Named)


def by_tensor(work: Callable[[_Tensor], _Result], name: str = OTHER) -> Callable[[_Tensor], _Result]:
    """``work`` on one tensor as a stage: what happens in it, on any thread, belongs to the tensor."""

    def run(tensor: _Tensor) -> _Result:
        token = _tensor.set(tensor.name)
        try:
            with stage(name):
                return work(tensor)
        finally:
            _tensor.reset(token)

    return run


@contextmanager
def collect(device: torch.device) -> Iterator[Collector]:
    """Gather the stages of all threads inside the block.

    On a CUDA ``device`` each stage waits for its kernels: times are true, and nothing overlaps any more.

    Raises:
        RuntimeError: inside another such block; a process has one collector.
    """
    global _collector
    if _collector is not None:
        raise RuntimeError("stages are being collected already; end that block first")
    _collector = Collector(device)
    try:
        yield _collector
    finally:
        _collector = None
