"""A case: inputs, ours and its rivals, the check against float64; and how it is measured: checked first, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from timing import FULL, QUICK, Clock, Limits, Rates, Samples, copy_rate, interleave, stopwatch


@dataclass(frozen=True)
class Setting:
    """How a run measures."""

    quick: bool
    """Small sizes and two rounds: every line of code, and no claim about time."""
    memory: bool
    """Measure peak memory in fresh processes, too."""
    cache: Path
    """For inputs that take long to make."""

    @property
    def limits(self) -> Limits:
        return QUICK if self.quick else FULL

    def side(self, n: int) -> int:
        """Rows or columns of a matrix that the full benchmark makes ``n``."""
        return min(n, max(192, n // 8)) if self.quick else n


@dataclass(frozen=True)
class Check:
    """How far an answer is from the float64 oracle."""

    error: float
    bound: float
    details: dict[str, float] = field(default_factory=dict)
    """Further numbers of the row."""
    complaint: str = ""
    """Why it fails although the error is within the bound."""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and not self.complaint


@dataclass(frozen=True)
class Rival:
    """What ours is timed against. The first rival of a case is the one its floor refers to."""

    name: str
    candidates: Sequence[tuple[str, Callable[[], Any]]]
    """Settings by name, cheapest first: the first whose answer is good enough is timed, and no other."""
    once: Sequence[tuple[int, Callable[[], Any]]] = ()
    """Parts too slow for repeats: each is timed once and added that many times."""
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """A case with its inputs made."""

    ours: Callable[[], Any]
    rivals: Sequence[Rival]
    check: Callable[[Any], Check]
    """Of the answer of ours."""
    check_rival: Callable[[Any], Check] | None = None
    """None: as ours."""
    rival_bound: float | None = None
    """Of the error of rivals. None: the bound of ours."""
    flops: float | None = None
    """Operations needed (see :mod:`flops`)."""
    traffic: float | None = None
    """Bytes read and written, where memory is the limit."""
    peak: Callable[[], int] | None = None
    """Peak anonymous memory in a fresh process."""
    clock: Clock = stopwatch
    """Of ours; rivals are timed by the stopwatch."""
    peak_known: bool = False
    """Without further work: report it always."""
    note: str = ""


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Setting], Problem]
    floor: float | None = None
    """Least ratio to the first rival that counts as a pass."""
    aim: float | None = None
    curves: Sequence[tuple[str, float]] = ()
    """Growth curves that the row is a point of, with its place on the axis."""


@dataclass(frozen=True)
class Timed:
    """One rival of a row."""

    rival: Rival
    setting: str
    check: Check | None
    """Of the setting that was timed; of the most accurate one where none was good enough."""
    samples: Samples | None
    """None: not timed, because no setting was good enough."""
    ours: Samples | None
    """Of ours, interleaved with it."""

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is: ratio of the medians."""
        return None if self.samples is None or self.ours is None else self.samples.median / self.ours.median


@dataclass(frozen=True)
class Row:
    case: Case
    status: Literal["timed", "failed", "skipped"]
    """failed: the answer is wrong.   skipped: a package is missing."""
    check: Check | None = None
    ours: Samples | None = None
    rivals: Sequence[Timed] = ()
    bound_seconds: float | None = None
    """Seconds that the needed operations or bytes take at the measured GEMM or copy rate."""
    bound_by: str = ""
    """GEMM or copy."""
    peak_bytes: int | None = None
    note: str = ""

    @property
    def fraction(self) -> float | None:
        """Of the GEMM or copy rate that ours reaches."""
        return None if self.ours is None or self.bound_seconds is None else self.bound_seconds / self.ours.median

    @property
    def verdict(self) -> str:
        ratio = self.rivals[0].ratio if self.rivals else None
        if ratio is None or self.case.floor is None:
            return ""
        if self.case.aim is not None and ratio >= self.case.aim:
            return "aim reached"
        return "floor reached" if ratio >= self.case.floor else "below"


def measure(case: Case, setting: Setting, rates: Rates) -> Row:
    """Check ours and its rivals; time those whose answers are good enough."""
    if setting.quick:
        case = replace(case, floor=None, aim=None)
    try:
        problem = case.prepare(setting)
    except ImportError as error:
        return Row(case, "skipped", note=f"needs {error.name}")
    check = problem.check(problem.ours())
    if not check.passed:
        return Row(case, "failed", check, note=check.complaint or f"error {check.error:.1e} exceeds {check.bound:.1e}")
    timer = partial(problem.clock, problem.ours)
    rivals = [_against(rival, problem, check.bound, timer, setting) for rival in problem.rivals]
    ours = next((r.ours for r in rivals if r.ours), None) or interleave({"ours": timer}, setting.limits)["ours"]
    bound_by, bound_seconds = "", None
    if problem.flops is not None:
        bound_by, bound_seconds = "GEMM", problem.flops / rates.gemm
    elif problem.traffic is not None:
        bound_by, bound_seconds = "copy", problem.traffic / copy_rate(int(problem.traffic))
    peak = problem.peak() if problem.peak and (setting.memory or problem.peak_known) else None
    return Row(case, "timed", check, ours, rivals, bound_seconds, bound_by, peak, problem.note)


def _against(rival: Rival, problem: Problem, bound: float, ours: Callable[[], float], setting: Setting) -> Timed:
    """Choose the rival's setting, and time it in turn with ours."""
    name, check, call = _choose(rival, problem, bound)
    if call is None and rival.candidates:
        return Timed(rival, name, check, None, None)
    pair = {"ours": ours}
    if call is not None:
        pair["rival"] = partial(stopwatch, call)
    samples = interleave(pair, setting.limits)
    repeated = samples["rival"].seconds if call else [0.0]
    once = sum(times * stopwatch(part) for times, part in rival.once)
    return Timed(rival, name, check, Samples([once + seconds for seconds in repeated]), samples["ours"])


def _choose(rival: Rival, problem: Problem, bound: float) -> tuple[str, Check | None, Callable[[], Any] | None]:
    """The first setting whose error is within the bound; or the most accurate one and None, not to be timed."""
    limit = bound if problem.rival_bound is None else problem.rival_bound
    best: tuple[str, Check | None, None] = ("", None, None)
    for name, call in rival.candidates:
        try:
            check = replace((problem.check_rival or problem.check)(call()), bound=limit)
        except RuntimeError:  # it did not converge
            continue
        if check.passed:
            return name, check, call
        if best[1] is None or check.error < best[1].error:
            best = (name, check, None)
    return best
