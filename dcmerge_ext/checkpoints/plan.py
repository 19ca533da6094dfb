"""What will happen to every tensor, decided from headers alone. No data is read here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from dcmerge_ext.checkpoints.config import Action, MergeConfig, Override
from dcmerge_ext.checkpoints.patterns import whole_name
from dcmerge_ext.checkpoints.source import TensorSource, TensorSpec
from dcmerge_ext.checkpoints.tasks import Task
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.methods.base import Method, Preset
from dcmerge_ext.methods.registry import create, preset_of
from dcmerge_ext.updates import UpdateSpec, check_weights, compute_dtype

PANEL_ELEMENTS = 1 << 18
"""Elements of a row panel of an elementwise method. 1 MB in float32: base, task and sum stay in the second-level cache;
halving or doubling it costs about 10 %, four times as much 50 % (task arithmetic of 8 tasks)."""

PASS_ELEMENTS = 1 << 23
"""Elements of a row panel of a matrix that is merged in several passes: enough rows for products at full rate."""

_VOCABULARY = {
    1: re.compile(r"(lm_head|predictions(\.decoder)?)\.bias$"),
    2: re.compile(r"embed|wte|lm_head|predictions\.decoder|shared\.weight"),
}
"""Names of tensors with a row per token, by number of dimensions."""
_EXPERTS = re.compile(r"expert|moe")
_STATISTICS = re.compile(r"\.running_(mean|var)$")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output."""

    name: str
    base: TensorSpec
    out_dtype: torch.dtype
    action: Action
    reason: str
    method: Method | None = None
    scale: float = 1.0
    matrix_shape: tuple[int, ...] | None = None
    """Shape the method sees where it differs: a convolution flattened to (out, in * kernel)."""
    specs: tuple[UpdateSpec, ...] = ()
    """One per task; rank 0 where a task takes no part."""
    merged_rank: int | None = None
    """Rank of a LowRank result, known from headers."""

    @property
    def panelled(self) -> bool:
        """Merged in row panels: element by element, nothing needs the whole tensor."""
        return self.action != "merge" or (self.method is not None and self.method.elementwise)

    @property
    def in_passes(self) -> bool:
        """Merged in row panels by a method for matrices, after passes over all of them."""
        return (
            self.action == "merge"
            and self.method is not None
            and self.matrix_shape is None
            and self.method.in_panels(self.specs, len(self.specs))
        )

    def panels(self) -> list[slice | None]:
        """Row ranges to work through; one whole tensor where the method needs it."""
        shape = self.base.shape
        elements = PASS_ELEMENTS if self.in_passes else PANEL_ELEMENTS
        whole = not (self.panelled or self.in_passes) or self.matrix_shape is not None
        if whole or not shape or self.base.numel <= elements:
            return [None]
        rows = max(1, elements // max(1, prod(shape[1:])))
        return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


@dataclass(frozen=True)
class Plan:
    """A whole merge."""

    base: TensorSource
    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    method: Method
    scale: float
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...]
    """Things worth a warning that headers already show."""

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    def counts(self) -> dict[str, int]:
        """Tensors per action."""
        return {action: sum(t.action == action for t in self.tensors) for action in ("merge", "mean", "copy")}


def make_plan(
    base: TensorSource, tasks: Sequence[Task], config: MergeConfig, *, with_base: bool = True, in_memory: bool = False
) -> Plan:
    """Decide action, method and scale of every tensor and check everything that headers can show.

    Args:
        with_base: False when there is no base model: ``base`` then only lists what the adapters touch.
        in_memory: the caller has no --extra or --vocab to be pointed to.
    Raises:
        InputError: shapes, names or options that do not fit, naming file and tensor.
    """
    weights = check_weights(config.weights, len(tasks))
    method = create(config.method, config.options)
    notes = _check_names(tasks, config, in_memory)
    planner = _Planner(base, tasks, config, method, with_base, in_memory)
    tensors = tuple(planner.tensor(name) for name in sorted(base.specs))
    for override, used in planner.override_uses.items():
        if not used:
            notes.append(f"override {override!r} matches no tensor")
    scale = method.default_scale(len(tasks)) if config.scale is None else config.scale
    return Plan(base, tuple(tasks), weights, method, scale, tensors, tuple(notes))


def _check_names(tasks: Sequence[Task], config: MergeConfig, in_memory: bool) -> list[str]:
    notes = []
    for task in tasks:
        if missing := task.missing:
            raise InputError(
                f"{task.label}: lacks tensor {missing[0]!r}{_and_more(missing)} of the base; "
                "give the fine-tuned model of this base, saved completely"
            )
        extra = task.extra
        if extra and config.extra == "error":
            remedy = "leave it out of the task" if in_memory else "pass --extra ignore (extra='ignore') to leave it out"
            raise InputError(f"{task.label}: tensor {extra[0]!r}{_and_more(extra)} is not in the base; {remedy}")
        if extra:
            notes.append(f"{task.label}: {len(extra)} tensors that the base does not have are left out")
    return notes


def _is_vocabulary(name: str, spec: TensorSpec) -> bool:
    pattern = _VOCABULARY.get(len(spec.shape))
    return pattern is not None and pattern.search(name) is not None


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class _Planner:
    def __init__(
        self,
        base: TensorSource,
        tasks: Sequence[Task],
        config: MergeConfig,
        method: Method,
        with_base: bool,
        in_memory: bool,
    ) -> None:
        self.base = base
        self.tasks = tasks
        self.config = config
        self.method = method
        self.with_base = with_base
        self.vocab_remedy = (
            "resize it to the base's"
            if in_memory
            else "choose --vocab base (keep the base's tensor) or --vocab skip (leave such a task out of this tensor)"
        )
        self.preset: Preset | None = preset_of(type(method), config.options)
        self.override_uses = {o.match: False for o in config.overrides}
        self._overridden = {o.match: self._override_method(o) for o in config.overrides}

    def tensor(self, name: str) -> TensorPlan:
        base = self.base.specs[name]
        override = next((o for o in self.config.overrides if whole_name(o.match, name, "override", OptionError)), None)
        if override is not None:
            self.override_uses[override.match] = True
        out_dtype = self._out_dtype(base.dtype)

        def copy(reason: str) -> TensorPlan:
            return TensorPlan(name, base, out_dtype, "copy", reason)

        if override is not None and override.action == "copy":
            return copy("override")
        if not base.dtype.is_floating_point:
            return copy("not floating point")
        specs = self._specs(name, base)
        if base.numel == 0:
            return copy("empty")
        if all(spec.rank == 0 for spec in specs):
            return copy("no task changes it")

        method = self.method if override is None else self._overridden[override.match]
        scale = self._scale(method, override)
        action, reason, flat = self._action(name, base, specs, method, override)
        if _STATISTICS.search(name) and override is None:
            # a variance must not be extrapolated: the mean of the models', whatever the scale
            action, reason, flat, scale = "mean", "running statistics", None, 1.0
        if flat is not None:
            specs = tuple(spec._replace(shape=flat) for spec in specs)
        if not self.with_base and any(spec.rank is None for spec in specs):
            # values, not updates: the mean of the values themselves
            action, reason, scale = "mean", "replaced outright by the adapters", 1.0
            self._check_mean_of_values(name, specs)
        merged_rank = None
        if action == "merge":
            try:
                method.check(specs, len(self.tasks))
            except OptionError as error:
                raise OptionError(f"tensor {name!r}: {error}") from error
        chosen = method if action == "merge" else create("averaging", {})
        if all(spec.rank is not None for spec in specs):
            merged_rank = chosen.merged_rank(specs, len(self.tasks))
        return TensorPlan(name, base, out_dtype, action, reason, chosen, scale, flat, specs, merged_rank)

    def _specs(self, name: str, base: TensorSpec) -> tuple[UpdateSpec, ...]:
        """The updates of a tensor, all of the base's shape."""
        specs = [task.spec(name) for task in self.tasks]
        untouched = UpdateSpec(base.shape, 0, compute_dtype(base.dtype))
        for i, (task, spec) in enumerate(zip(self.tasks, specs, strict=True)):
            if spec.shape == base.shape:
                continue
            shapes = f"{'x'.join(map(str, spec.shape)) or '()'}, the base has {base.text} ({self.base.where(name)})"
            if spec.shape[1:] != base.shape[1:] or not _is_vocabulary(name, base):
                raise InputError(
                    f"{task.where(name)}: tensor {name!r} has shape {shapes}; all tasks must be fine-tuned from this base"
                )
            if self.config.vocab == "error":
                raise InputError(
                    f"{task.where(name)}: vocabulary differs: tensor {name!r} has shape {shapes}; {self.vocab_remedy}"
                )
            if self.config.vocab == "base":
                return (untouched,) * len(specs)
            specs[i] = untouched
        return tuple(specs)

    def _action(
        self, name: str, base: TensorSpec, specs: Sequence[UpdateSpec], method: Method, override: Override | None
    ) -> tuple[Action, str, tuple[int, ...] | None]:
        """Action, why, and the shape a matrix method sees where it differs."""
        if override is not None and override.action == "mean":
            return "mean", "override", None
        conv_lora = len(base.shape) > 2 and any(spec.rank for spec in specs)
        flat = (base.shape[0], prod(base.shape[1:])) if conv_lora else None
        if method.elementwise:
            return "merge", "", flat
        forced = override is not None and (override.action == "merge" or override.method is not None)
        if self.preset and self.preset.mean_tensors and re.search(self.preset.mean_tensors, name) and not forced:
            return "mean", "excluded by the preset", None
        if len(base.shape) == 2 or conv_lora:
            return "merge", "", flat
        if len(base.shape) == 3 and _EXPERTS.search(name):
            return "merge", "stack of expert matrices", None
        if forced and len(base.shape) < 2:
            raise OptionError(f"tensor {name!r} is {base.text}; method {method.name!r} merges matrices")
        if forced:
            return "merge", "override", (base.shape[0], prod(base.shape[1:]))
        return "mean", "not a matrix", None

    def _check_mean_of_values(self, name: str, specs: Sequence[UpdateSpec]) -> None:
        if any(spec.rank == 0 for spec in specs):
            raise InputError(
                f"tensor {name!r} is replaced outright by some of the adapters only; give --base so that the others "
                "count with the base's values"
            )
        if any(weight != 1 for weight in self.config.weights or []):
            raise InputError(f"tensor {name!r} is replaced outright by the adapters; weights on it need --base")

    def _scale(self, method: Method, override: Override | None) -> float:
        if override is not None and override.scale is not None:
            return override.scale
        if self.config.scale is not None and method.name == self.method.name:
            return self.config.scale  # another method in an override keeps its own: scales do not compare
        return method.default_scale(len(self.tasks))

    def _override_method(self, override: Override) -> Method:
        name = override.method or self.config.method
        inherited: Mapping[str, Any] = self.config.options if override.method in (None, self.config.method) else {}
        try:
            return create(name, {**inherited, **override.options})
        except OptionError as error:
            raise OptionError(f"override {override.match!r}: {error}") from error

    def _out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.config.dtype == "keep" or not dtype.is_floating_point:
            return dtype
        converted: torch.dtype = getattr(torch, self.config.dtype)
        return converted


def survey_dtype(tensors: Sequence[TensorPlan]) -> torch.dtype:
    """Widest compute dtype of the tensors a whole-model method sees."""
    dtypes = [spec.dtype for t in tensors for spec in t.specs] + [compute_dtype(t.base.dtype) for t in tensors]
    return torch.float64 if torch.float64 in dtypes else torch.float32
