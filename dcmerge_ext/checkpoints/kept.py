"""Merged updates kept in a file, and given back for any number of scales: what a merge need not do twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext.checkpoints.execute import Executor, Sink, TensorResult
from dcmerge_ext.checkpoints.files import open_weights
from dcmerge_ext.checkpoints.plan import Plan, TensorPlan
from dcmerge_ext.checkpoints.safetensors_writer import SafetensorsWriter
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.lowrank import LowRank, Update
from dcmerge_ext.methods.base import Method

_LEFT, _RIGHT = "//left", "//right"


class KeptUpdates:
    """The merged update of every tensor of a plan, in the compute dtype, unscaled: dense, or in factors where it has them.

    Args:
        path: of a safetensors file that :meth:`fill` makes.
        whole: names of tensors that are merged whole, whatever their method.
    """

    def __init__(self, path: Path, plan: Plan, whole: Iterable[str] = ()) -> None:
        self._path = path
        self._whole = set(whole)
        self._tensors = [t for t in plan.tensors if t.action != "copy"]
        self._ranks = {
            t.name: t.merged_rank
            for t in self._tensors
            if t.merged_rank is not None and (t.name in self._whole or t.panels() == [None])
        }
        self._results: dict[str, TensorResult] = {}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self._specs().values())

    def fill(self, executor: Executor) -> None:
        """Merge every tensor, once."""
        with SafetensorsWriter(self._path, self._specs()) as writer:

            def sink_of(tensor: TensorPlan) -> Sink:
                def sink(rows: slice | None, base: Tensor, merged: Update, facts: dict[str, Any]) -> None:
                    for name, values in self._parts(tensor, merged).items():
                        writer.write(name, rows, values.cpu())

                return sink

            results = executor.run(self._tensors, lambda t: executor.merge(t, sink_of(t), whole=t.name in self._whole))
        self._results = {result.name: result for result in results}
        self._file = open_weights(self._path)

    def result(self, name: str) -> TensorResult:
        """What happened to the tensor when it was merged; facts as a copy."""
        kept = self._results[name]
        return TensorResult(name, kept.action, dict(kept.facts), kept.seconds, kept.digests)

    def read(self, name: str, rows: slice | None) -> Update:
        """The merged update, the caller's to overwrite."""
        if name in self._ranks:
            return LowRank(*(self._file.read(name + side, rows).clone() for side in (_LEFT, _RIGHT)))
        return self._file.read(name, rows).clone()

    def _specs(self) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for tensor in self._tensors:
            dtype = torch.float64 if torch.float64 in {spec.dtype for spec in tensor.specs} else torch.float32
            shape = tensor.matrix_shape or tensor.base.shape
            if tensor.name in self._ranks:
                rank = self._ranks[tensor.name]
                *leading, m, n = shape
                specs[tensor.name + _LEFT] = TensorSpec((*leading, m, rank), dtype)
                specs[tensor.name + _RIGHT] = TensorSpec((*leading, rank, n), dtype)
            else:
                specs[tensor.name] = TensorSpec(shape, dtype)
        return specs

    def _parts(self, tensor: TensorPlan, merged: Update) -> dict[str, Tensor]:
        rank = self._ranks.get(tensor.name)
        if rank is None:
            return {tensor.name: merged.dense() if isinstance(merged, LowRank) else merged}
        assert isinstance(merged, LowRank), f"{tensor.name}: a result of rank {rank} was announced"
        missing = rank - merged.rank  # fewer components were found
        left = torch.nn.functional.pad(merged.left, (0, missing))
        right = torch.nn.functional.pad(merged.right, (0, 0, 0, missing))
        return {tensor.name + _LEFT: left, tensor.name + _RIGHT: right}


class Replay(Executor):
    """Carries out a plan with merged updates that are kept, at the scales of the plan: no method runs."""

    def __init__(self, plan: Plan, device: torch.device, kept: KeptUpdates) -> None:
        super().__init__(plan, device)
        self._kept = kept

    def merge(self, tensor: TensorPlan, sink: Sink, *, whole: bool = False) -> TensorResult:
        result = self._kept.result(tensor.name)
        for rows in [None] if whole else tensor.panels():
            sink(rows, self.plan.base.read(tensor.name, rows), self._kept.read(tensor.name, rows), result.facts)
        return result

    def survey(self, method: Method | None) -> None:
        """Nothing to find out."""
