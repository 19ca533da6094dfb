"""A merged adapter that PEFT loads: float32 factors with every scale folded in, lora_alpha = r."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext.checkpoints.adapter import CONFIG_NAME, PREFIX, WEIGHT_NAMES, WRAPPED, LoraFactors
from dcmerge_ext.checkpoints.execute import Executor, Sink, TensorResult
from dcmerge_ext.checkpoints.plan import Plan, TensorPlan
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.checkpoints.tasks import AdapterTask
from dcmerge_ext.checkpoints.weight_files import Layout, WeightFiles
from dcmerge_ext.checkpoints.work import Work
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.svd import truncated_svd


@dataclass(frozen=True)
class _Module:
    """A LoRA module of the output."""

    tensor: TensorPlan
    path: str
    lora: LoraFactors
    transposed: bool
    """The base stores the weight as (in, out); PEFT's factors are (out, in) all the same."""
    rank: int

    @property
    def key_a(self) -> str:
        return f"{PREFIX}{self.path}.{'lora_embedding_A' if self.lora.kind == 'embedding' else 'lora_A.weight'}"

    @property
    def key_b(self) -> str:
        return f"{PREFIX}{self.path}.{'lora_embedding_B' if self.lora.kind == 'embedding' else 'lora_B.weight'}"

    def specs(self) -> dict[str, TensorSpec]:
        first, *rest = self.lora.shape
        a: tuple[int, ...] = (self.rank, *rest)
        b: tuple[int, ...] = (first, self.rank, *([1] * (len(rest) - 1)))
        if self.lora.kind == "embedding":
            a, b = (self.rank, first), (*rest, self.rank)
        return {self.key_a: TensorSpec(a, torch.float32), self.key_b: TensorSpec(b, torch.float32)}

    def tensors(self, merged: Update, scale: float) -> dict[str, Tensor]:
        """The factors of scale * merged, padded with zeros where fewer components were found."""
        if not isinstance(merged, LowRank) or merged.rank > self.rank:
            U, S, Vh = truncated_svd(merged, self.rank)
            root = S.sqrt()
            merged = LowRank(U * root[..., None, :], root[..., :, None] * Vh)
        merged = merged.to("cpu", torch.float32)
        if self.lora.kind == "embedding" or self.transposed:
            merged = merged.mT
        specs = self.specs()
        a = torch.zeros(self.rank, merged.shape[1])
        b = torch.zeros(merged.shape[0], self.rank)
        a[: merged.rank], b[:, : merged.rank] = merged.right, merged.left * scale
        return {self.key_a: a.reshape(specs[self.key_a].shape), self.key_b: b.reshape(specs[self.key_b].shape)}


class AdapterOutput:
    """Layout of the adapter, from headers."""

    def __init__(self, plan: Plan, adapter_rank: int | None) -> None:
        self.plan = plan
        adapters = [task for task in plan.tasks if isinstance(task, AdapterTask)]
        self.adapters = adapters
        if len(adapters) != plan.num_tasks:
            full = next(task for task in plan.tasks if not isinstance(task, AdapterTask))
            raise InputError(
                f"{full.label}: a full fine-tune changes tensors that an adapter cannot hold; use --save-as full"
            )
        self.modules: dict[str, _Module] = {}
        self.values: dict[str, TensorPlan] = {}
        for tensor in plan.tensors:
            if tensor.action == "copy":
                continue
            owner = next((task for task in adapters if tensor.name in task.modules), None)
            if owner is None:
                self.values[tensor.name] = tensor
            else:
                self.modules[tensor.name] = self._module(tensor, owner, adapter_rank)

    def _module(self, tensor: TensorPlan, owner: AdapterTask, adapter_rank: int | None) -> _Module:
        lora = owner.adapter.modules[owner.modules[tensor.name]]
        rank = tensor.merged_rank
        if rank is None and adapter_rank is None:
            raise InputError(
                f"tensor {tensor.name!r}: the merged update has full rank; pass --adapter-rank R to truncate it to an "
                "adapter of rank R, or use --save-as full"
            )
        side = min(lora.shape[0], torch.Size(lora.shape[1:]).numel())
        limits = [r for r in (rank, adapter_rank) if r is not None]
        if rank is None or min(limits) < rank:
            limits.append(side)
        return _Module(
            tensor,
            self._own_name(tensor.name).removesuffix(".weight"),
            lora,
            owner.transposed(tensor.name),
            max(1, min(limits)),
        )

    def _own_name(self, name: str) -> str:
        """All names follow the first adapter, which may leave out or add a leading component of the base's."""
        return self.adapters[0].own_name(name)

    def _value_key(self, name: str) -> str:
        own = self._own_name(name)
        module, _, leaf = own.rpartition(".")
        wrapped = name.rpartition(".")[0] + ".weight" in self.modules
        return f"{PREFIX}{module}{WRAPPED}{leaf}" if wrapped else PREFIX + own

    def specs(self) -> dict[str, TensorSpec]:
        specs = {self._value_key(name): TensorSpec(t.base.shape, t.out_dtype) for name, t in self.values.items()}
        for module in self.modules.values():
            specs.update(module.specs())
        return specs

    def config(self) -> dict[str, Any]:
        """The first adapter's configuration with rank, scale and targets of the merged one."""
        ranks = {m.path: m.rank for m in self.modules.values()}
        common = Counter(ranks.values()).most_common(1)[0][0] if ranks else self.adapters[0].adapter.config.get("r", 8)
        # PEFT matches patterns at the end of a path; ^ makes one exact, where some path ends like another.
        exact = "^" if any(path.endswith(f".{other}") for path in ranks for other in ranks) else ""
        pattern = {exact + path: rank for path, rank in sorted(ranks.items()) if rank != common}
        saved = sorted({m for task in self.adapters for m in task.adapter.config.get("modules_to_save") or []})
        biases = sorted({task.adapter.config.get("bias") or "none" for task in self.adapters} - {"none"})
        return {
            **self.adapters[0].adapter.config,
            "r": common,
            "lora_alpha": common,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "target_modules": _targets(sorted(ranks)),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": saved or None,
            "bias": biases[0] if biases else "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
        }

    def layout(self) -> Layout:
        return {WEIGHT_NAMES[0]: self.specs()}

    def write(self, executor: Executor, work: Work) -> list[TensorResult]:
        """Merge every tensor into its place. Returns what happened to each."""
        tensors = [t for t in self.plan.tensors if t.name in self.modules or t.name in self.values]
        names = {name: list(module.specs()) for name, module in self.modules.items()}
        names.update({name: [self._value_key(name)] for name in self.values})

        def merge(tensor: TensorPlan, files: WeightFiles) -> TensorResult:
            if tensor.name in self.modules:
                return executor.merge(tensor, _store_factors(files, self.modules[tensor.name]), whole=True)
            return executor.write(tensor, lambda name, rows, values: files.write(self._value_key(name), rows, values))

        results = work.fill(executor, tensors, self.layout(), names, merge)
        if work.processes.first:
            (work.directory / CONFIG_NAME).write_text(json.dumps(self.config(), indent=2, sort_keys=True) + "\n")
        return results


def _targets(paths: list[str]) -> list[str] | str:
    """PEFT matches a listed target at the end of a path, so a path of one component needs an exact pattern."""
    return paths if all("." in path for path in paths) else "|".join(re.escape(path) for path in paths)


def _store_factors(files: WeightFiles, module: _Module) -> Sink:
    def sink(rows: slice | None, base: Tensor, merged: Update, facts: dict[str, Any]) -> None:
        for key, values in module.tensors(merged, module.tensor.scale).items():
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"tensor {module.tensor.name!r}: the merged factors overflow float32; merge at a smaller scale, or repair "
                    "the adapters"
                )
            files.write(key, rows, values)

    return sink
