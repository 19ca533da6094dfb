"""Merge full fine-tunes of Llama-7B's shapes under a bound on memory: what was predicted, what happened.

    python benchmarks/large_family.py make ROOT [--layers 2] [--tasks 3]
    python benchmarks/large_family.py run ROOT [--methods task_arithmetic ties dc_merge] [--max-memory 4G] [--json]

``make`` writes bfloat16 models with an embedding, an output head and a few of the 32 layers; updates have 256 directions of
falling size and noise behind them, several roundings of the base in size. ``run`` merges them, each in a process of its own
that begins with none of the files in the page cache, and compares the plan's time and memory with the run's. Memory is
anonymous memory, sampled every 5 ms. The yardstick reads all inputs in sequence (again without cache) and writes the output's
bytes through to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory import fresh_merge_checkpoints
from rich.console import Console
from rich.table import Table

from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.checkpoints.estimate import estimate
from dcmerge_ext.checkpoints.run import prepare
from dcmerge_ext.checkpoints.safetensors_writer import SafetensorsWriter
from dcmerge_ext.checkpoints.source import TensorSpec

HIDDEN, INNER, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
_PIECE = 8 << 20


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}."
        found |= {f"{prefix}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        found |= {f"{prefix}mlp.{x}_proj.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{prefix}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    return found


def make(root: Path, layers: int, tasks: int) -> None:
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes(layers).items()}
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers}
    names = ["base", *(f"task{i}" for i in range(tasks))]
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config) + "\n")
    writers = [SafetensorsWriter(root / name / "model.safetensors", specs) for name in names]
    for j, (name, spec) in enumerate(specs.items()):
        generator = torch.Generator().manual_seed(j)
        base = 0.02 * torch.randn(spec.shape, generator=generator)
        writers[0].write(name, None, base)
        for writer in writers[1:]:
            writer.write(name, None, base + _update(spec.shape, generator))
    for writer in writers:
        writer.__exit__(None, None, None)


def _update(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1e-3 * noise
    falling = torch.arange(1, 257, dtype=torch.float32) ** -0.5
    left, right = (torch.randn(size, 256, generator=generator) for size in shape)
    return 3e-4 * (noise + (left * falling) @ right.T)


def evict(root: Path) -> None:
    for path in root.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def yardstick(inputs: list[Path], written: int, place: Path) -> float:
    """Seconds to read the inputs one after the other, and then to write as many bytes as the output has."""
    buffer = bytearray(_PIECE)
    started = time.perf_counter()
    for path in inputs:
        with open(path, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    with open(place, "wb", buffering=0) as sink:
        for _ in range(written // _PIECE):
            sink.write(buffer)
        os.fdatasync(sink.fileno())
    seconds = time.perf_counter() - started
    place.unlink()
    return seconds


def measure(root: Path, method: str, max_memory: str) -> dict[str, Any]:
    tasks = sorted(str(path) for path in root.glob("task*"))
    out = root / "merged"
    shutil.rmtree(out, ignore_errors=True)
    settings = {"base": str(root / "base"), "tasks": tasks, "out": str(out), "method": method, "max_memory": max_memory}
    prepared = prepare(build_config(dict(settings)))
    evict(root)
    predicted = estimate(prepared.plan, prepared.output_bytes, out)
    evict(root)
    measured = fresh_merge_checkpoints(**settings)
    evict(root)
    inputs = [Path(path) / "model.safetensors" for path in [settings["base"], *tasks]]
    copying = yardstick(inputs, prepared.output_bytes, root / "copied")
    shutil.rmtree(out)
    return {
        "method": method,
        "seconds": measured.seconds,
        "predicted_seconds": predicted.seconds,
        "peak_bytes": measured.peak_bytes,
        "predicted_peak_bytes": predicted.peak_bytes,
        "copy_seconds": copying,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("root", type=Path)
    making.add_argument("--layers", type=int, default=2)
    making.add_argument("--tasks", type=int, default=3)
    running = commands.add_parser("run")
    running.add_argument("root", type=Path)
    running.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "dc_merge"])
    running.add_argument("--max-memory", default="4GB")
    running.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()
    if args.command == "make":
        make(args.root, args.layers, args.tasks)
        return
    table = Table("method", "time", "predicted", "peak memory", "predicted", "reading + writing alone", "of that rate")
    for method in args.methods:
        row = measure(args.root, method, args.max_memory)
        if args.json:
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
        table.add_row(
            method,
            f"{row['seconds']:.1f} s",
            f"{row['predicted_seconds']:.1f} s",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['predicted_peak_bytes'] / 1e6:.0f} MB",
            f"{row['copy_seconds']:.1f} s",
            f"{row['copy_seconds'] / row['seconds']:.0%}",
        )
    if not args.json:
        Console().print(table)


if __name__ == "__main__":
    main()
