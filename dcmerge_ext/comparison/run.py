"""A merged checkpoint against its tasks, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dcmerge_ext.checkpoints.blame import of_tensor
from dcmerge_ext.checkpoints.config import MergeConfig
from dcmerge_ext.checkpoints.execute import Executor, TensorResult, load_updates
from dcmerge_ext.checkpoints.files import unreadable
from dcmerge_ext.checkpoints.locate import locate
from dcmerge_ext.checkpoints.output import RECORD_NAME
from dcmerge_ext.checkpoints.patterns import whole_name
from dcmerge_ext.checkpoints.plan import Plan, TensorPlan, make_plan
from dcmerge_ext.checkpoints.run import compute_device, lora_scale_of, open_inputs
from dcmerge_ext.comparison.measure import Smooth, measure
from dcmerge_ext.comparison.record import Record, read_record
from dcmerge_ext.comparison.result import SCHEMA, Comparison, Matrix, Other, summarize
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.dc_merge import DCMerge
from dcmerge_ext.methods.registry import create
from dcmerge_ext.similarity import cos_sim
from dcmerge_ext.updates import Updates, check_weights
from dcmerge_ext.version import __version__


def compare(
    merged: str | Path,
    base: str | Path | None = None,
    tasks: Sequence[str | Path] | None = None,
    *,
    weights: Sequence[float] | None = None,
    match: str | None = None,
    rank: int | None = None,
    device: str = "auto",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """What a merge kept of each task, matrix by matrix, with the memory of a few tensors.

    Args:
        merged: a merged checkpoint or adapter. Its ``dcmerge.json`` names base, tasks, weights, method and options.
        base, tasks, weights: in place of what the record says, where the inputs have moved; needed where there is no
            record, for what another tool merged (base: not for adapters alone).
        match: regular expression for the whole name of the tensors to compare. None: all.
        rank: components of each task that count. None: the rank of an adapter, min(m, n) / T of a full fine-tune.
        device: "auto", "cpu" or "cuda".
        advance: told how many tensors are done, of how many.
    Returns:
        Comparison, with ``save_html`` and ``save_json``.
    Raises:
        InputError: inputs that are missing, or do not fit together.   ConvergenceError: an SVD failed (NaN).
    """
    path = locate(merged)
    record = read_record(path)
    config = _config(path, record, base, tasks, weights, device)
    plan = _plan(config, match)
    smooth = _smoothing(record)
    matrices: dict[str, Matrix] = {}
    others: dict[str, Other] = {}
    done: list[str] = []
    if rank is not None and rank < 1:
        raise OptionError(f"compare: rank must be 1 or more, got {rank}")

    def work(tensor: TensorPlan) -> TensorResult:
        with of_tensor(tensor.name):
            look(tensor)
        done.append(tensor.name)
        advance(len(done), len(changed))
        return TensorResult(tensor.name, tensor.action)

    def look(tensor: TensorPlan) -> None:
        stored = plan.base.read(tensor.name)
        everything = load_updates(plan, tensor, None, stored, executor.device)
        updates, result = Updates(everything.specs[:-1], lambda i: everything[i]), everything[-1]
        if tensor.action == "merge":
            found = measure(tensor.name, updates, result, rank, smooth, _round_off(plan, tensor, result))
            if any(found.ranks):  # else every task left it as it was
                matrices[tensor.name] = found
        else:
            near = [None if spec.rank == 0 else _cosine(updates[i], result) for i, spec in enumerate(updates.specs)]
            others[tensor.name] = Other(tensor.name, list(stored.shape), near)

    executor = Executor(plan, compute_device(config.device))
    changed = [t for t in plan.tensors if any(spec.rank != 0 for spec in t.specs[:-1])]
    executor.run(changed, work)
    changed.sort(key=lambda t: _by_number(t.name))
    compared = [matrices[t.name] for t in changed if t.name in matrices]
    return Comparison(
        SCHEMA,
        __version__,
        str(merged),
        config.base,
        list(config.tasks[:-1]),
        list(plan.weights[:-1]),
        record.method,
        record.options,
        record.scale,
        summarize(compared, plan.num_tasks - 1),
        compared,
        [others[t.name] for t in changed if t.name in others],
    )


def _config(
    path: Path,
    record: Record,
    base: str | Path | None,
    tasks: Sequence[str | Path] | None,
    weights: Sequence[float] | None,
    device: Any,
) -> MergeConfig:
    """The inputs as a configuration whose last task is the merged checkpoint itself."""
    before = record.config
    if tasks is None and before is None:
        raise InputError(
            f"{path}: has no {RECORD_NAME} that names its tasks; give them (--task), and the base (--base)"
        )
    earlier = before.tasks if before else []
    named = [str(task) for task in tasks] if tasks is not None else earlier
    if not named:
        raise InputError("compare: tasks is empty; give at least one")
    if before and len(named) != len(earlier):
        raise InputError(
            f"compare: {len(named)} tasks for a merge of {len(earlier)}; give all of them, in the order of {RECORD_NAME}"
        )
    if weights is None and record.weights is not None and len(record.weights) == len(named):
        weights = record.weights
    return MergeConfig(
        tasks=[*named, str(path)],
        out="",
        base=str(base) if base is not None else before.base if before else None,
        method="dc_merge",  # a method of matrices: what it would merge is what is compared
        weights=[*check_weights(weights, len(named)), 1.0],
        device=device,
        vocab=before.vocab if before else "error",
        extra="ignore",
        lora_scale=lora_scale_of(before) if before else "apply",
    )


def _plan(config: MergeConfig, match: str | None) -> Plan:
    base_path = None if config.base is None else locate(config.base)
    try:
        base, tasks = open_inputs([locate(task) for task in config.tasks], base_path, config.lora_scale)
    except OSError as error:
        raise unreadable(Path(error.filename or config.tasks[-1]), error) from error
    plan = make_plan(base, tasks, config, with_base=base_path is not None)
    if match is None:
        return plan
    chosen = tuple(t for t in plan.tensors if whole_name(match, t.name, "--match", OptionError))
    if not chosen:
        raise OptionError(f"--match {match}: fits the whole name of none of {len(plan.tensors)} tensors")
    return Plan(plan.base, plan.tasks, plan.weights, plan.method, plan.scale, chosen, plan.notes)


def _smoothing(record: Record) -> Smooth | None:
    if record.method != DCMerge.name:
        return None
    method = create(DCMerge.name, {k: v for k, v in record.options.items() if v is not None})
    assert isinstance(method, DCMerge)
    return method.smoothed


def _round_off(plan: Plan, tensor: TensorPlan, merged: Update) -> float:
    """Above the spectral norm of what rounding the stored weights W added: eps rms(W) / 2 (sqrt(m) + sqrt(n)).

    The rounding errors are as good as independent, of eps |w| / 2 at most and of half that in the mean square.
    """
    if isinstance(merged, LowRank):
        return 0.0
    (stored,) = plan.tasks[-1].raw(tensor.name, None)
    m, n = merged.shape[-2:]
    size = float(torch.linalg.vector_norm(stored, dtype=torch.float64)) / stored.numel() ** 0.5
    return float(torch.finfo(stored.dtype).eps / 2 * size * (m**0.5 + n**0.5))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10: shorter numbers first, which int() would not take at any length."""
    return [(len(part.lstrip("0")), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _cosine(update: Any, merged: Any) -> float:
    """CosSim of tensors of any shape."""
    a, b = (x.dense() if isinstance(x, LowRank) else x for x in (update, merged))
    return float(cos_sim(a.reshape(1, -1), b.reshape(1, -1)))
