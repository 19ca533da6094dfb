"""A merge, watched. Its output goes to a scratch directory and is thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec
import torch

from dcmerge_ext.checkpoints.config import MergeConfig
from dcmerge_ext.checkpoints.run import Prepared, compute_device, prepare, run
from dcmerge_ext.errors import InputError, RunError
from dcmerge_ext.profiling.rates import Rates, measure_rates
from dcmerge_ext.profiling.result import SCHEMA, Profile, stage_costs, tensor_costs
from dcmerge_ext.stages import OTHER, Event, collect, stage
from dcmerge_ext.version import __version__


class Profiled(NamedTuple):
    """A profile, and the events it sums up."""

    profile: Profile
    events: list[Event]


def profile(config: MergeConfig, prepared: Callable[[Prepared], Callable[[int], None]] | None = None) -> Profiled:
    """Merge as ``config`` says, in a scratch directory beside ``config.out``, which is neither looked at nor written.

    Args:
        prepared: called when the inputs are open; returns what is told of progress, see :func:`~dcmerge_ext.checkpoints.run.run`.
    Raises:
        InputError: as a merge, or there is no place for the scratch directory.   RunError: writing failed.
    """
    device, threads = compute_device(config.device), torch.get_num_threads()
    with _scratch(Path(config.out).expanduser()) as name:
        scratch = Path(name)
        with collect(device) as collector:
            started = time.perf_counter()
            with stage("plan"):
                ready = prepare(msgspec.structs.replace(config, out=str(scratch / "merged"), overwrite=False))
            planned = time.perf_counter() - started
            rates = _rates(device, scratch)
            started = time.perf_counter()
            with stage(OTHER):
                run(ready, prepared(ready) if prepared else lambda _: None)
            seconds = planned + time.perf_counter() - started
        rates = rates.best(_rates(device, scratch))  # other processes may have slowed the first measurement
    stages = stage_costs(collector.events, threads, rates)
    tensors = tensor_costs(collector.events, threads, ready.plan.tensors)
    idle = seconds - sum(cost.machine_seconds for cost in stages)
    found = Profile(
        schema=SCHEMA,
        version=__version__,
        method=ready.plan.method.name,
        tasks=ready.plan.num_tasks,
        save_as=ready.save_as,
        device=str(device),
        threads=threads,
        seconds=seconds,
        idle=max(0.0, idle),
        rates=rates,
        stages=stages,
        tensors=tensors,
    )
    return Profiled(found, collector.events)


def _scratch(out: Path) -> TemporaryDirectory[str]:
    """A new directory on the file system of ``out``."""
    parent = next(p for p in out.absolute().parents if p.exists())
    try:
        return TemporaryDirectory(prefix="dcmerge-profile-", dir=parent)
    except OSError as error:
        raise InputError(
            f"{parent}: no scratch directory can be made there ({error.strerror or error}); choose another place with --out"
        ) from error


def _rates(device: torch.device, scratch: Path) -> Rates:
    try:
        return measure_rates(device, scratch)
    except OSError as error:
        raise RunError(
            f"{scratch}: writing failed ({error.strerror or error}); free space or choose another place"
        ) from error
