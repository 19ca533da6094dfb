"""The numbers of a profile. Their JSON form is described in docs/profile.md; ``schema`` counts its changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from dcmerge_ext.checkpoints.output import new_file
from dcmerge_ext.checkpoints.plan import TensorPlan
from dcmerge_ext.profiling.rates import Rates
from dcmerge_ext.stages import WAIT, Event

SCHEMA = 1


class Achieved(msgspec.Struct, frozen=True):
    """Part of the machine's rates: 1 is the machine at its best. None where the stage's work is not known."""

    product: float | None
    """Flops, against a float32 matrix product."""
    bytes: float | None
    """Bytes, against the rate of reading files (read), writing them (write) or copying memory (all other stages)."""


class StageCost(msgspec.Struct, frozen=True):
    """One stage, outside of the stages inside it."""

    stage: str
    calls: int
    seconds: float
    """Of all threads together."""
    machine_seconds: float
    """Each thread's seconds times its part of torch's threads: adds up to at most the wall time."""
    flops: float
    bytes: float
    achieved: Achieved


class TensorCost(msgspec.Struct, frozen=True):
    """One tensor of the model."""

    name: str
    shape: list[int]
    action: str
    machine_seconds: float
    flops: float
    bytes: float
    stages: dict[str, float]
    """Stage -> machine seconds."""


class Profile(msgspec.Struct, frozen=True):
    """Where the time of one merge went."""

    schema: int
    version: str
    method: str
    tasks: int
    save_as: str
    device: str
    threads: int
    """Torch's."""
    seconds: float
    """Wall time, from opening the inputs to the finished output."""
    idle: float
    """``seconds`` less the machine seconds of all stages: cores that no thread of the merge used."""
    rates: Rates
    stages: list[StageCost]
    """Longest first."""
    tensors: list[TensorCost]
    """Longest first."""

    def json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def save_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the JSON.

        Raises:
            InputError: the file exists, or its place cannot be written.   RunError: writing failed.
        """
        with new_file(path, overwrite) as partial:
            partial.write_bytes(self.json())


class _Sum:
    """Of events."""

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = self.machine_seconds = self.flops = self.bytes = 0.0
        self.stages: dict[str, float] = defaultdict(float)

    def add(self, event: Event, machine_seconds: float) -> None:
        self.calls += 1
        self.seconds += event.exclusive / 1e9
        self.machine_seconds += machine_seconds
        self.flops += event.work.flops
        self.bytes += event.work.bytes
        self.stages[event.stage] += machine_seconds


def stage_costs(events: Iterable[Event], threads: int, rates: Rates) -> list[StageCost]:
    """Longest first. Waiting is no cost: it is in the idle time, or in that of the threads waited for."""
    sums: dict[str, _Sum] = defaultdict(_Sum)
    for event in events:
        if event.stage != WAIT:
            sums[event.stage].add(event, _machine_seconds(event, threads))
    costs = [
        StageCost(
            name, total.calls, total.seconds, total.machine_seconds, total.flops, total.bytes, _achieved(name, total, rates)
        )
        for name, total in sums.items()
    ]  # fmt: skip
    return sorted(costs, key=lambda cost: -cost.machine_seconds)


def tensor_costs(events: Iterable[Event], threads: int, tensors: Sequence[TensorPlan]) -> list[TensorCost]:
    """Longest first; tensors that took no time, such as those that an adapter does not hold, are left out."""
    plans = {tensor.name: tensor for tensor in tensors}
    sums: dict[str, _Sum] = defaultdict(_Sum)
    for event in events:
        if event.stage != WAIT and event.tensor is not None:
            sums[event.tensor].add(event, _machine_seconds(event, threads))
    costs = [
        TensorCost(
            name, list(plans[name].base.shape), plans[name].action, total.machine_seconds, total.flops, total.bytes,
            dict(sorted(total.stages.items(), key=lambda item: -item[1])),
        )
        for name, total in sums.items()
    ]  # fmt: skip
    return sorted(costs, key=lambda cost: -cost.machine_seconds)


def _machine_seconds(event: Event, threads: int) -> float:
    return event.exclusive / 1e9 * min(event.threads, threads) / threads


def _achieved(name: str, total: _Sum, rates: Rates) -> Achieved:
    if name in ("read", "write"):  # rates of one thread
        most = total.seconds * (rates.read if name == "read" else rates.write)
    else:
        most = total.machine_seconds * rates.copy
    products = total.machine_seconds * rates.product
    return Achieved(
        total.flops / products if total.flops and products else None,
        total.bytes / most if total.bytes and most else None,
    )
