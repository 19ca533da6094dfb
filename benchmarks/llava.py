"""A whole model: LoRA adapters of LLaVA-1.5-7B's language model on disk, merged into one on disk, without its base.

Float32, as PEFT stores adapters unless told otherwise; random factors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import flops
import inputs
import oracle
import reference
from case import Check, Problem, Rival, Setting
from memory import Measured, fresh_merge_checkpoints
from merges import DOUBLE, merge_check
from reference import KEEP, LORA_RANK
from safetensors import safe_open
from safetensors.torch import save_file

from dcmerge_ext import LowRank


def llava(setting: Setting, layers: int, hidden: int, intermediate: int, tasks: int) -> Problem:
    """``merge_checkpoints(base=None, official="vlm")`` in a fresh process: seconds and peak anonymous memory."""
    layers = 1 if setting.quick else layers
    hidden, intermediate = setting.side(hidden), setting.side(intermediate)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    folder = setting.cache / f"llava-{layers}x{hidden}x{intermediate}-{tasks}"
    family = _Family(
        folder, tasks, {f"model.layers.{i}.{name}": s for i in range(layers) for name, s in shapes.items()}
    )
    family.write()

    k = tasks * LORA_RANK
    count = max(1, int(KEEP * k**2))
    kinds = {shape: f"model.layers.0.{name}" for name, shape in shapes.items()}  # one module of each shape

    def check_module(module: str) -> Check:
        updates = family.updates(module)
        truth = oracle.cover([oracle.components(update, LORA_RANK, average=True) for update in updates])
        merged = family.update(family.merged, module).dense()
        return merge_check(oracle.distance(merged, truth, count), DOUBLE)

    def check(_: Measured) -> Check:
        return max(map(check_module, kinds.values()), key=lambda found: (not found.passed, found.error))

    def matrix_flops(m: int, n: int) -> float:
        return flops.dc_merge(m, n, tasks, LORA_RANK, flops.lowrank_svd(m, n, LORA_RANK), factored=True)

    matrices = list(family.shapes.values())
    return Problem(
        ours=family.merge,
        clock=lambda merge: merge().seconds,
        rivals=[
            Rival(
                "authors' LLaVA form",
                [],
                once=[
                    (matrices.count(shape), partial(reference.llava, family.updates(module)))
                    for shape, module in kinds.items()
                ],
                note="extrapolated: one matrix of each shape timed once, no files; checked in lora/4096x11008/T8",
            )
        ],
        check=check,
        flops=sum(matrix_flops(m, n) for m, n in matrices),
        peak=lambda: max(run.peak_bytes for run in family.runs),
        peak_known=True,
        note=f"{len(matrices)} matrices x {tasks} adapters, file to file",
    )


@dataclass
class _Family:
    """The adapters, the one they merge into, and what the merges took."""

    folder: Path
    tasks: int
    shapes: dict[str, tuple[int, int]]
    """Module -> (out, in)."""
    runs: list[Measured] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / f"task{i}" for i in range(self.tasks)]

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    def write(self) -> None:
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": LORA_RANK, "lora_alpha": LORA_RANK,
            "target_modules": sorted({module.rpartition(".")[2] for module in self.shapes}),
        }  # fmt: skip
        for task, path in enumerate(self.paths):
            if (path / "adapter_config.json").exists():
                continue
            path.mkdir(parents=True, exist_ok=True)
            tensors = {}
            for i, (module, (out, into)) in enumerate(self.shapes.items()):
                (update,) = inputs.lora_updates(1, out, into, LORA_RANK, seed=1_000 * task + i)
                tensors[_key(module, "A")], tensors[_key(module, "B")] = update.right, update.left
            save_file(tensors, path / "adapter_model.safetensors")
            (path / "adapter_config.json").write_text(json.dumps(config))

    def update(self, path: Path, module: str) -> LowRank:
        """Of one module by one adapter, whose lora_alpha is r."""
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            return LowRank.from_lora(file.get_tensor(_key(module, "A")), file.get_tensor(_key(module, "B")))

    def updates(self, module: str) -> list[LowRank]:
        return [self.update(path, module) for path in self.paths]

    def merge(self) -> Measured:
        measured = fresh_merge_checkpoints(
            base=None,
            tasks=[str(path) for path in self.paths],
            out=str(self.merged),
            official="vlm",
            scale=1.0,
            overwrite=True,
        )
        self.runs.append(measured)
        return measured


def _key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"
