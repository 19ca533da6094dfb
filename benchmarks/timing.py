"""Timing two sides fairly, in one process; and the rates of the machine that the times are held against."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

Clock = Callable[[Callable[[], Any]], float]
"""Seconds that one call takes."""


class Limits(NamedTuple):
    """When enough rounds were timed."""

    least: int
    """Rounds, unless ``seconds`` run out before; never fewer than 2."""
    most: int
    seconds: float
    """After which no further round begins."""
    precision: float
    """Relative standard error of the median of the ratios that is small enough."""
    shortest: float
    """Seconds of one sample: a faster side is called so often in a row, and the mean counts."""


FULL = Limits(least=7, most=41, seconds=25.0, precision=0.01, shortest=0.05)
QUICK = Limits(least=2, most=2, seconds=10.0, precision=1.0, shortest=0.0)


@dataclass(frozen=True)
class Samples:
    """Seconds per call of every sample, in the order they were made."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)


def stopwatch(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleave(timers: Mapping[str, Callable[[], float]], limits: Limits) -> dict[str, Samples]:
    """Rounds of one sample of each side in turn, until the ratios to the first side are known well enough.

    Interleaved, because the speed of a shared machine drifts: what slows one side down slows down its neighbour. A
    short call is repeated within its sample, as in a merge of many layers: a single one would be timed with the caches
    and the sleeping threads that half a second of the other side leaves behind.
    """
    taken: dict[str, list[float]] = {name: [] for name in timers}
    calls = {name: max(1, math.ceil(limits.shortest / max(timer(), 1e-6))) for name, timer in timers.items()}
    started = time.perf_counter()
    while not _enough(list(taken.values()), time.perf_counter() - started, limits):
        for name, timer in timers.items():
            taken[name].append(statistics.fmean(timer() for _ in range(calls[name])))
    return {name: Samples(seconds) for name, seconds in taken.items()}


def _enough(taken: Sequence[Sequence[float]], elapsed: float, limits: Limits) -> bool:
    first, *others = taken
    if len(first) < 2:
        return False
    if len(first) >= limits.most or elapsed > limits.seconds:
        return True
    ratios = [[b / a for a, b in zip(first, other, strict=True)] for other in others]
    return len(first) >= limits.least and max(map(_median_error, ratios or [list(first)])) < limits.precision


def _median_error(values: Sequence[float]) -> float:
    """Relative standard error of the median: 0.93 interquartile ranges over the root of the number (normal errors)."""
    lower, middle, upper = statistics.quantiles(values, n=4)
    return float(0.93 * (upper - lower) / len(values) ** 0.5 / middle)


# --- rates -------------------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """What the machine does at best."""

    threads: int
    """Of torch."""
    gemm: float
    """Floating-point operations per second of a large square float32 matrix product, all threads."""
    gemm_one_thread: float
    copy: float
    """Bytes read and written per second by copying a tensor much larger than the caches, all threads."""


def measure_rates(quick: bool = False) -> Rates:
    size = 256 if quick else 2048
    return Rates(
        torch.get_num_threads(),
        _gemm_rate(size),
        _gemm_rate_of_one_thread(size),
        copy_rate(1 << 24 if quick else 1 << 29),
    )


def _gemm_rate(size: int) -> float:
    a, b, out = (torch.randn(size, size, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out))


def _gemm_rate_of_one_thread(size: int) -> float:
    """In a process of its own: ``torch.set_num_threads`` would leave MKL with other settings than a user has."""
    one = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(size)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one).stdout)


@cache
def copy_rate(moved: int) -> float:
    """Bytes per second of a copy that reads ``moved`` / 2 bytes and writes as many, all threads.

    By size, because a copy that fits in a cache is several times faster than one that does not.
    """
    source = torch.ones(max(1, moved // 8))
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _best(lambda: target.copy_(source))


def _best(call: Callable[[], Any], repeats: int = 7) -> float:
    """Fewest seconds: a rate to be compared with must not be understated."""
    call()
    return min(stopwatch(call) for _ in range(repeats))


# --- environment -------------------------------------------------------------------------------------------------------


def misleading_settings() -> list[str]:
    """Settings that make idle threads sleep at once: LAPACK then takes 2.5 times as long, which would flatter us."""
    found = []
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        found.append("OMP_WAIT_POLICY=passive")
    if os.environ.get("GOMP_SPINCOUNT", "").strip() == "0":
        found.append("GOMP_SPINCOUNT=0")
    return found


if __name__ == "__main__":
    sys.stdout.write(str(_gemm_rate(int(sys.argv[1]))))
