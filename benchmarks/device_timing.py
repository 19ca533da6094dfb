"""Timing calls that run on a device: by CUDA events, or by the stopwatch where the host runs the kernels, as in the tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from timing import Limits, stopwatch

Manner = Literal["cold", "warm", "whole"]
"""cold: the device's time of one call, the second-level cache flushed before: bound by memory.
warm: the device's time of one call among several in a row.   whole: one call from an idle device on, as its caller waits
for it, with all that the host does in between."""

DEVICE = Limits(least=15, most=101, seconds=10.0, precision=0.01, shortest=0.0)

_SAMPLE = 1e-4
"""Seconds of a warm sample: events tell half a microsecond."""
_MOST_IN_A_ROW = 20
_MARGIN = 5e-5
"""Seconds by which the host must be ahead of the device at least."""
_LONGEST_LEAD = 0.1
_CYCLES = 10_000_000


class Clock(Protocol):
    """What times the calls of a run."""

    def timer(self, call: Callable[[], Any], manner: Manner) -> Callable[[], float]:
        """A function that calls and returns the seconds of one call."""


class HostClock:
    """For kernels that run on the host: every manner is the stopwatch."""

    def timer(self, call: Callable[[], Any], manner: Manner) -> Callable[[], float]:
        return partial(stopwatch, call)


class EventClock:
    """Events around a call, on torch's current stream of the current device.

    A call of a few microseconds is over before the host has asked for the next: what would be timed is the host. So the
    device is first kept busy (``torch.cuda._sleep``) for twice as long as the host takes to ask for everything. A call
    that waits for the device itself ends that lead; the host's work after its wait counts.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._filler = torch.ones(max(4 * cache, 1 << 28) // 4, device=device)
        torch.cuda._sleep(_CYCLES)
        self._cycles_per_second = _CYCLES / self._between(lambda: torch.cuda._sleep(_CYCLES), 1)

    def timer(self, call: Callable[[], Any], manner: Manner) -> Callable[[], float]:
        if manner == "whole":
            return partial(self._between, call, 1)
        host = self._host_seconds(call)
        times = 1
        if manner == "warm":
            alone = self._ahead(call, 1, host, flush=False)
            times = min(_MOST_IN_A_ROW, max(1, math.ceil(_SAMPLE / alone)))
        return partial(self._ahead, call, times, host, flush=manner == "cold")

    def _ahead(self, call: Callable[[], Any], times: int, host: float, *, flush: bool) -> float:
        torch.cuda.synchronize()
        if flush:
            self._filler.sum()  # read, not written: lines that must be written back would slow the call
        lead = min(2 * times * host + _MARGIN, _LONGEST_LEAD)
        torch.cuda._sleep(int(lead * self._cycles_per_second))
        return self._between(call, times, wait=False)

    def _between(self, call: Callable[[], Any], times: int, *, wait: bool = True) -> float:
        """Seconds of the device per call; ``wait``: until it is idle, before."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if wait:
            torch.cuda.synchronize()
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times

    def _host_seconds(self, call: Callable[[], Any]) -> float:
        """Of the second of two calls: the first may allocate."""
        seconds = 0.0
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
        torch.cuda.synchronize()
        return seconds
