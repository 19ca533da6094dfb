"""A row of the GPU benchmark: what it needs, ours and its rivals, the check; and how it is measured: checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from case import Check
from device_timing import Clock, Manner
from roofline import DeviceRates, Needs, Roof, roof
from timing import Limits, Samples, interleave

from dcmerge_ext import use_backend


@dataclass(frozen=True)
class Bench:
    """Where and how a run measures."""

    device: torch.device
    backend: str
    """Forced for every call of ours."""
    clock: Clock
    limits: Limits


@dataclass(frozen=True)
class DeviceRival:
    """What ours is timed against."""

    name: str
    call: Callable[[], Any] | None
    """None: it cannot run here, and ``note`` says why."""
    check: Callable[[Any], Check] | None = None
    """None: as ours."""
    once: tuple[int, Callable[[], Any]] | None = None
    """A part too slow for repeats: timed once and added that many times."""
    note: str = ""


@dataclass(frozen=True)
class DeviceProblem:
    """A row with its inputs made."""

    ours: Callable[[], Any]
    check: Callable[[Any], Check]
    """Of the answer of ours, on the CPU: against float64, or bits against bits."""
    rivals: Sequence[DeviceRival]
    manner: Manner
    rival_bound: float | None = None
    """Of the error of rivals that are checked as ours is. None: the bound of ours."""


@dataclass(frozen=True)
class DeviceCase:
    name: str
    needs: Needs
    prepare: Callable[[Bench], DeviceProblem]


@dataclass(frozen=True)
class RivalResult:
    rival: DeviceRival
    check: Check | None
    samples: Samples | None
    """None: not timed; ``note`` says why."""
    ours: Samples | None
    """Of ours, interleaved with it."""
    note: str

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is: ratio of the medians."""
        return None if self.samples is None or self.ours is None else self.samples.median / self.ours.median


@dataclass(frozen=True)
class DeviceRow:
    case: DeviceCase
    status: Literal["timed", "failed"]
    """failed: the answer is wrong, or there is none."""
    roof: Roof
    manner: Manner | None = None
    check: Check | None = None
    ours: Samples | None = None
    rivals: Sequence[RivalResult] = ()
    note: str = ""

    @property
    def fraction(self) -> float | None:
        """Of the roof that ours reaches."""
        return None if self.ours is None else self.roof.seconds / self.ours.median


def measure_row(case: DeviceCase, bench: Bench, rates: DeviceRates) -> DeviceRow:
    """Check ours and its rivals; time those whose answers are good enough. An error fails the row, not the run."""
    bound = roof(case.needs, rates)
    try:
        with use_backend(bench.backend):
            problem = case.prepare(bench)
            check = problem.check(problem.ours())
            if not check.passed:
                note = check.complaint or f"error {check.error:.1e} exceeds {check.bound:.1e}"
                return DeviceRow(case, "failed", bound, problem.manner, check, note=note)
            rivals = [_against(rival, problem, check.bound, bench) for rival in problem.rivals]
            ours = next((rival.ours for rival in rivals if rival.ours), None)
            if ours is None:
                timer = bench.clock.timer(problem.ours, problem.manner)
                ours = interleave({"ours": timer}, bench.limits)["ours"]
    except RuntimeError as error:
        return DeviceRow(case, "failed", bound, note=f"{type(error).__name__}: {error}")
    return DeviceRow(case, "timed", bound, problem.manner, check, ours, rivals)


def _against(rival: DeviceRival, problem: DeviceProblem, bound: float, bench: Bench) -> RivalResult:
    """Check the rival, and time it in turn with ours."""
    if rival.call is None:
        return RivalResult(rival, None, None, None, rival.note)
    try:
        check = _check(rival, rival.call(), problem, bound)
        if not check.passed:
            note = check.complaint or f"error {check.error:.1e} exceeds {check.bound:.1e}"
            return RivalResult(rival, check, None, None, note)
        calls = {"ours": problem.ours, "rival": rival.call}
        timers = {name: bench.clock.timer(call, problem.manner) for name, call in calls.items()}
        samples = interleave(timers, bench.limits)
        times = samples["rival"]
        if rival.once is not None:
            parts, call = rival.once
            once = parts * bench.clock.timer(call, "whole")()
            times = Samples([once + seconds for seconds in times.seconds])
    except RuntimeError as error:  # out of memory, or no convergence
        return RivalResult(rival, None, None, None, f"{type(error).__name__}: {error}")
    return RivalResult(rival, check, times, samples["ours"], rival.note)


def _check(rival: DeviceRival, answer: Any, problem: DeviceProblem, bound: float) -> Check:
    if rival.check is not None:
        return rival.check(answer)
    return replace(problem.check(answer), bound=bound if problem.rival_bound is None else problem.rival_bound)
