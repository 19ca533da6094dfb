"""What an operation needs, what a device does at best, and the time that follows: predicted or measured rates alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from device_timing import Clock
from torch import Tensor

_CHAIN = 256  # launches in a row, to measure one: fewer than a stream holds


class Needs(NamedTuple):
    """Of one call, whatever the implementation does: every input read once, every result written once."""

    traffic: float
    """Bytes from and to memory."""
    flops: float = 0.0
    """Leading terms of the cheapest classical method."""
    dtype: torch.dtype = torch.float32
    """Of the flops."""
    launches: int = 1
    """Operations on the device that ours starts one after the other: the one number that is the implementation's."""


class DeviceRates(NamedTuple):
    """What a device does at best."""

    name: str
    copy: float
    """Bytes read and written per second by copying a tensor much larger than the caches."""
    float32: float
    """Floating-point operations per second of a large float32 matrix product, TF32 off."""
    float64: float
    launch: float
    """Seconds from one almost empty kernel to the next in a stream whose host is far ahead."""


H100 = DeviceRates("NVIDIA H100 SXM", copy=3.35e12, float32=67e12, float64=34e12, launch=2.5e-6)
"""Data sheet: memory bandwidth and peaks outside of the tensor cores, which kernels here do not use; the launch is assumed."""


class Roof(NamedTuple):
    """The least time of a call."""

    seconds: float
    bound_by: str
    """memory, arithmetic or launches: what takes longest."""


def roof(needs: Needs, rates: DeviceRates) -> Roof:
    """max(bytes / copy rate, flops / GEMM rate of their dtype, launches x seconds of one)."""
    arithmetic = needs.flops / (rates.float64 if needs.dtype == torch.float64 else rates.float32)
    parts = {
        "memory": needs.traffic / rates.copy,
        "arithmetic": arithmetic,
        "launches": needs.launches * rates.launch,
    }
    longest = max(parts, key=lambda part: parts[part])
    return Roof(parts[longest], longest)


def measure_device_rates(device: torch.device, clock: Clock, *, quick: bool) -> DeviceRates:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return DeviceRates(
        name,
        _copy_rate(device, clock, 1 << (20 if quick else 28)),
        _gemm_rate(device, clock, 256 if quick else 8192, torch.float32),
        _gemm_rate(device, clock, 256 if quick else 4096, torch.float64),
        _launch_seconds(device, clock),
    )


def _copy_rate(device: torch.device, clock: Clock, count: int) -> float:
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return 2 * count * source.element_size() / _best(clock, lambda: target.copy_(source))


def _gemm_rate(device: torch.device, clock: Clock, size: int, dtype: torch.dtype) -> float:
    a, b, out = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
    return 2.0 * size**3 / _best(clock, lambda: torch.mm(a, b, out=out))


def _launch_seconds(device: torch.device, clock: Clock) -> float:
    x = torch.zeros(1, device=device)

    def chain() -> Tensor:
        for _ in range(_CHAIN):
            x.add_(1)
        return x

    return _best(clock, chain) / _CHAIN


def _best(clock: Clock, call: Callable[[], Tensor], repeats: int = 7) -> float:
    """Fewest seconds: a rate to be compared with must not be understated."""
    timer = clock.timer(call, "warm")
    timer()
    return min(timer() for _ in range(repeats))
