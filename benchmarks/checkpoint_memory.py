"""Peak memory and time of merging synthetic full models of 1 GB, against reading and writing the same bytes.

    python benchmarks/checkpoint_memory.py --tasks 8 --method task_arithmetic

Models: float32, one 4096 x 4096 matrix (64 MB, the largest), the rest 1024 x 1024 matrices and vectors. Memory as
:mod:`memory` measures it. The yardstick copies: it reads every input byte and writes the output's bytes once, in 16 MB
pieces, in the same directory, with a warm page cache for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import fresh_merge_checkpoints
from safetensors.torch import save_file

_PIECE = 16 << 20


def make_family(root: Path, tasks: int, gigabytes: float) -> None:
    """base/ and task0/ ... as single-file models, cheap random data with a common base."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"large.weight": (4096, 4096)}
    rest = int((gigabytes * 1e9 - 4096 * 4096 * 4) / (1024 * 1024 * 4))
    shapes |= {f"layers.{i}.weight": (1024, 1024) for i in range(rest)}
    shapes |= {f"layers.{i}.norm": (1024,) for i in range(rest)}
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for task in [None, *range(tasks)]:
        directory = root / ("base" if task is None else f"task{task}")
        directory.mkdir(parents=True)
        if task is not None:
            generator.manual_seed(task + 1)
            changed = {
                name: w + 0.001 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in base.items()
            }
        save_file(base if task is None else changed, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text("{}\n")


def copy_yardstick(root: Path, tasks: int) -> float:
    """Seconds to read all inputs and write one model, nothing else."""
    buffer = bytearray(_PIECE)
    started = time.perf_counter()
    for name in ["base", *(f"task{i}" for i in range(tasks))]:
        with (
            open(root / name / "model.safetensors", "rb", buffering=0) as source,
            open(root / "copied", "wb", buffering=0) as sink,
        ):
            while count := source.readinto(buffer):
                if name == "base":
                    sink.write(memoryview(buffer)[:count])
    seconds = time.perf_counter() - started
    (root / "copied").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--method", default="task_arithmetic")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="option of the method")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--family", type=Path, help="where to keep the models between runs")
    args = parser.parse_args()
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
    with tempfile.TemporaryDirectory() as scratch:
        root = args.family or Path(scratch)
        if not (root / f"task{args.tasks - 1}").exists():
            make_family(root, args.tasks, args.gigabytes)
        copies, runs = [], []
        for _ in range(args.repeats):
            copies.append(copy_yardstick(root, args.tasks))
            runs.append(
                fresh_merge_checkpoints(
                    base=str(root / "base"),
                    tasks=[str(root / f"task{i}") for i in range(args.tasks)],
                    out=str(root / "out"),
                    method=args.method,
                    overwrite=True,
                    **options,
                )
            )
    copy, merge = statistics.median(copies), statistics.median(run.seconds for run in runs)
    result = {
        "method": args.method,
        "tasks": args.tasks,
        "peak_mb": round(max(run.peak_bytes for run in runs) / 1e6),
        "merge_s": round(merge, 2),
        "copy_s": round(copy, 2),
        "ratio": round(merge / copy, 2),
        "spread_s": [round(f([run.seconds for run in runs]), 2) for f in (min, max)],
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
