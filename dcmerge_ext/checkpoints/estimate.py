"""What a merge will cost: bytes, time by stage and peak memory, from headers and a second or two of trial runs."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from dcmerge_ext.checkpoints import disk
from dcmerge_ext.checkpoints.config import MergeConfig
from dcmerge_ext.checkpoints.execute import Executor
from dcmerge_ext.checkpoints.memory import plan_peak, workers
from dcmerge_ext.checkpoints.plan import PANEL_ELEMENTS, Plan, TensorPlan, make_plan, survey_dtype
from dcmerge_ext.checkpoints.source import StateDict
from dcmerge_ext.checkpoints.tasks import FullTask
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.apply import survey_model
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.updates import Updates, UpdateSpec

_TRIAL_PANELS = 4
_TRIAL_SIDE = 768
"""Of a trial matrix: large enough for the factorizations' usual rate, small enough for a fraction of a second each."""


@dataclass(frozen=True)
class Estimate:
    """By stage, as if none overlapped: a whole run is a little faster."""

    read_bytes: int
    """From the inputs, each pass over them counted."""
    written_bytes: int
    read_seconds: float
    """What lies in the page cache already, and what a second pass finds there, takes no time."""
    compute_seconds: float
    write_seconds: float
    peak_bytes: int
    """Anonymous memory above a bare torch process; mapped input files are not counted."""

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.compute_seconds + self.write_seconds


def estimate(plan: Plan, written_bytes: int, out: Path) -> Estimate:
    """Estimate a plan; runs the methods on small matrices, reads the end of an input file and writes beside ``out``."""
    total, once = (sum(count(t) * _read_bytes(t) for t in plan.tensors) for count in (_passes, lambda _: 1))
    files = sorted(path for path in _files(plan) if path.is_file())
    read_seconds = 0.0
    if files:
        fits = once < disk.available_memory()  # then further passes find it in the page cache
        if cold := once * (1 - disk.cached_fraction(files)) if fits else total:
            read_seconds = cold / disk.read_rate(files)
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    return Estimate(
        total,
        written_bytes,
        read_seconds,
        _compute_seconds(plan),
        written_bytes / disk.write_rate(place),
        plan_peak(plan),
    )


def _passes(tensor: TensorPlan) -> int:
    """How often the tensor is read."""
    if tensor.action != "merge" or tensor.method is None:
        return 1
    if tensor.in_passes:
        return 3  # each task for its own components, for the shared basis, for the result; the base more often
    return 1 + (tensor.method.num_surveys(survey_dtype([tensor])) if tensor.method.scope == "model" else 0)


def _read_bytes(tensor: TensorPlan) -> int:
    if tensor.action == "copy":
        return tensor.base.nbytes
    side = tensor.base.shape[0] + math.prod(tensor.base.shape[1:]) if tensor.base.shape else 1
    tasks = sum(tensor.base.numel if spec.rank is None else spec.rank * side for spec in tensor.specs)
    return tensor.base.nbytes + tasks * tensor.base.dtype.itemsize


def _files(plan: Plan) -> Iterable[Path]:
    names = [t.name for t in plan.tensors]
    found = {Path(plan.base.where(name)) for name in names}
    return found.union(Path(task.where(name)) for task in plan.tasks for name in names)


def _compute_seconds(plan: Plan) -> float:
    """Each method's cost of an element, from a trial run, and of an operation of its matrices, from another."""
    elements: dict[tuple[str, torch.dtype], int] = defaultdict(int)
    flops: dict[Method, float] = defaultdict(float)
    largest: dict[Method, TensorPlan] = {}
    for tensor in plan.tensors:
        if tensor.action == "copy" or tensor.method is None:
            continue
        streamed = tensor.method.name if tensor.panelled else "task_arithmetic"  # reading, adding, storing
        elements[streamed, tensor.base.dtype] += tensor.base.numel
        if not tensor.panelled:
            flops[tensor.method] += tensor.method.flops(_matrix_specs(tensor), plan.num_tasks)
            if tensor.method not in largest or tensor.base.numel > largest[tensor.method].base.numel:
                largest[tensor.method] = tensor
    methods = {t.method.name: t.method for t in plan.tensors if t.method is not None}
    seconds = 0.0
    for (name, dtype), count in elements.items():
        seconds += count * _seconds_per_element(name, methods.get(name), plan.num_tasks, dtype)
    for method, operations in flops.items():
        seconds += operations / _rate(method, _trial_specs(_matrix_specs(largest[method])), plan.num_tasks)
    return seconds


def _matrix_specs(tensor: TensorPlan) -> tuple[UpdateSpec, ...]:
    if tensor.matrix_shape is None:
        return tensor.specs
    return tuple(spec._replace(shape=tensor.matrix_shape) for spec in tensor.specs)


def _seconds_per_element(name: str, method: Method | None, num_tasks: int, dtype: torch.dtype) -> float:
    """Of an elementwise method, all that happens to an element in memory included."""
    rows, cols = _TRIAL_PANELS * PANEL_ELEMENTS // 1024, 1024
    models = [
        {f"{i}": torch.randn(rows, cols).to(dtype) for i in range(workers())} for _ in range(min(num_tasks, 4) + 1)
    ]
    base, *tasks = (StateDict(model, "trial") for model in models)
    options = {} if method is None else {f: getattr(method, f) for f in method.__struct_fields__}
    chosen = [tasks[i % len(tasks)] for i in range(num_tasks)]
    config = MergeConfig(tasks=["trial"] * num_tasks, out="trial", method=name, options=options)
    trial = make_plan(base, [FullTask(task, base) for task in chosen], config)

    def run() -> None:
        executor = Executor(trial, torch.device("cpu"))
        executor.run(trial.tensors, lambda tensor: executor.write(tensor, lambda *_: None))

    return _best(run) / (rows * cols * workers())


def _trial_specs(specs: tuple[UpdateSpec, ...]) -> tuple[UpdateSpec, ...]:
    """Of a smaller matrix of the same proportions."""
    m, n = specs[0].shape[-2:]
    side = _TRIAL_SIDE if any(spec.rank is None for spec in specs) else 2 * _TRIAL_SIDE
    factor = min(1.0, side / min(m, n))
    return tuple(
        spec._replace(shape=(min(round(m * factor), 3 * side), min(round(n * factor), 3 * side))) for spec in specs
    )


def _rate(method: Method, specs: tuple[UpdateSpec, ...], num_tasks: int) -> float:
    """Operations, as :meth:`Method.flops` counts them, per second."""
    generator = torch.Generator().manual_seed(0)

    def load(i: int) -> Update:
        m, n = specs[i].shape
        rank = specs[i].rank
        if rank is not None:
            return LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
        falling = torch.arange(1, 33) ** -0.5  # as the spectra of fine-tunes fall
        low = (torch.randn(m, 32, generator=generator) * falling) @ torch.randn(32, n, generator=generator)
        return low + torch.randn(m, n, generator=generator)

    loaded = [load(i) for i in range(len(specs))]
    updates = Updates(specs, lambda i: loaded[i])

    def run() -> None:
        state = survey_model(method, num_tasks, torch.float32, lambda s: method.survey("trial", updates, s))
        method.merge(updates, Context(num_tasks, "trial", state))

    operations = method.flops(specs, num_tasks)
    return operations / _best(run) if operations else math.inf


def _best(run: Callable[[], None]) -> float:
    """Fewest seconds of two; nothing is warned of meanwhile, for what a trial is made of concerns nobody."""
    times = []
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        for _ in range(2):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    finally:
        logging.disable(disabled)
    return min(times)
