"""mergekit's own TIES against this package's under its name, the whole call of mergekit's API, in one process.

    python benchmarks/integrations_mergekit.py [--dtypes float32 bfloat16] [--quick] [--json]

Random matrices. Every result is checked before anything is timed: per element against mergekit's, but where its unstable
sort decides which of several equal magnitudes survive. The sides are interleaved: one call of each in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts
from rich.console import Console
from rich.table import Table
from timing import Limits, interleave, stopwatch
from torch import Tensor

from dcmerge_ext.integrations.mergekit import register_all

ROUNDINGS = 4
"""Of the dtype, by which results may differ."""
SIDES = {"dcmerge_ext": "dcmerge_ties", "mergekit": "ties"}
DENSITY = 0.2


def states(size: int, matrices: int, models: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The base, then the models."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": 0.02 * torch.randn(size, size, generator=generator) for i in range(matrices)}
    tasks = [
        {name: tensor + 0.002 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(models)
    ]
    return [{name: tensor.to(dtype) for name, tensor in state.items()} for state in (base, *tasks)]


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], states: list[dict[str, Tensor]]) -> float:
    """Largest share of a tensor that differs from mergekit's: entries that tie at a threshold, all others must agree."""
    base, *tasks = states
    shares = []
    for name, tensor in found.items():
        tied = torch.zeros_like(tensor, dtype=torch.bool)
        for task in tasks:
            magnitudes = (task[name] - base[name]).abs()
            count = int(DENSITY * magnitudes.numel())
            tied |= magnitudes == magnitudes.flatten().float().kthvalue(magnitudes.numel() - count + 1).values
        a, b, w = (x.double() for x in (tensor, wanted[name], base[name]))
        far = (a - b).abs() > ROUNDINGS * torch.finfo(tensor.dtype).eps * (w.abs() + (b - w).abs())
        if bool((far & ~tied).any()):
            raise SystemExit(f"{name}: {int((far & ~tied).sum())} entries differ from mergekit's")
        shares.append(float(far.double().mean()))
    return max(shares)


def measure(dtype: torch.dtype, weights: list[float], args: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    inputs = states(128 if args.quick else args.size, args.matrices, args.models, dtype)
    parameters = {"weight": weights, "density": DENSITY}

    def call(method: str) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = merge_state_dicts(inputs, method, base=0, parameters=parameters)
        return merged

    def timer(method: str) -> Callable[[], float]:
        return lambda: stopwatch(lambda: call(method))

    differ = check(call(SIDES["dcmerge_ext"]), call(SIDES["mergekit"]), inputs)
    taken = interleave({side: timer(method) for side, method in SIDES.items()}, limits)
    ours, theirs = (taken[side].median for side in SIDES)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "weights": "equal" if len(set(weights)) == 1 else "different",
        "seconds": ours,
        "seconds_mergekit": theirs,
        "ratio": theirs / ours,
        "tied": differ,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--matrices", type=int, default=3)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="128 x 128, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()

    register_all()
    limits = Limits(least=3, most=7, seconds=0.0 if args.quick else 25.0, precision=0.05, shortest=0.0)
    different = [1 - 0.2 * i for i in range(args.models)]
    rows = [
        measure(getattr(torch, dtype), weights, args, limits)
        for dtype in args.dtypes
        for weights in ([1.0] * args.models, different)
    ]
    if args.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
        return
    table = Table("dtype", "weights", "this package", "mergekit", "ratio", "entries that differ, all tied")
    for row in rows:
        table.add_row(
            row["dtype"],
            row["weights"],
            f"{1e3 * row['seconds']:.0f} ms",
            f"{1e3 * row['seconds_mergekit']:.0f} ms",
            f"{row['ratio']:.1f}",
            f"{row['tied']:.1e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
