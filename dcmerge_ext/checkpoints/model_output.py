"""A merged model as a Hugging Face directory: sharded safetensors with an index, and the files beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from dcmerge_ext.checkpoints.execute import Executor, TensorResult
from dcmerge_ext.checkpoints.files import check_link, read_json
from dcmerge_ext.checkpoints.plan import Plan
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.checkpoints.weight_files import Layout
from dcmerge_ext.checkpoints.work import Work
from dcmerge_ext.errors import InputError

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".ckpt"}
_LEFT_OUT = {"trainer_state.json", "dcmerge.json", "dcmerge_timings.json", "README.md"}
_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab"}


def output_specs(plan: Plan) -> dict[str, TensorSpec]:
    return {t.name: TensorSpec(t.base.shape, t.out_dtype) for t in plan.tensors}


def shard_layout(specs: Mapping[str, TensorSpec], shard_bytes: int) -> dict[str, dict[str, TensorSpec]]:
    """File name -> its tensors, in name order; a tensor larger than a shard gets a file of its own."""
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name in sorted(specs):
        if shards[-1] and used + specs[name].nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = specs[name]
        used += specs[name].nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_model(executor: Executor, layout: Layout, work: Work) -> list[TensorResult]:
    """Merge every tensor into its place. Returns what happened to each."""
    results = work.fill(
        executor, executor.plan.tensors, layout, {}, lambda tensor, files: executor.write(tensor, files.write)
    )
    if len(layout) > 1 and work.processes.first:
        index = {
            "metadata": {"total_size": sum(s.nbytes for specs in layout.values() for s in specs.values())},
            "weight_map": {name: file for file, specs in layout.items() for name in specs},
        }
        (work.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return results


def side_files(base: Path) -> list[Path]:
    """The files beside the weights that belong to the model; none where ``base`` is a file.

    Raises:
        InputError: one is a link that leads out of the directory, or cannot be read.
    """
    if not base.is_dir():
        return []
    subdirectories = [d for d in sorted(base.iterdir()) if d.is_dir() and not d.is_symlink() and _may_copy(d)]
    # such as 1_Pooling of sentence-transformers; one that holds weights is a model of its own
    own = [d for d in subdirectories if not any(f.suffix in _WEIGHT_SUFFIXES for f in d.rglob("*"))]
    wanted = [
        f
        for d in [base, *own]
        for f in sorted(d.iterdir())
        if f.suffix in _COPIED_SUFFIXES and _may_copy(f) and f.is_file()  # no pipe, which would never end
    ]
    for file in wanted:
        check_link(file, base)
        if not os.access(file, os.R_OK):
            raise InputError(f"{file}: cannot be read; check its permissions")
    return wanted


def _may_copy(path: Path) -> bool:
    """Whether a name is neither hidden nor one of the output's own."""
    written = path.name in _LEFT_OUT or path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    return not written and not path.name.startswith(".")


def copy_side_files(base: Path, directory: Path, dtype: torch.dtype | None) -> None:
    """Configuration, generation configuration, tokenizer, chat template, custom code: all but weights and leftovers.

    ``dtype``: what the weights were converted to, noted in the configuration; None where it was kept.
    """
    for source in side_files(base):
        target = directory / source.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    config_path = directory / "config.json"
    if dtype is not None and config_path.exists():
        config = read_json(config_path)
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        config_path.write_text(json.dumps(config, indent=2) + "\n")
