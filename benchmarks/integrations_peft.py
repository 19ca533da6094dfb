"""PEFT's add_weighted_adapter against this package's, the whole call, in one process.

    python benchmarks/integrations_peft.py [--types svd ties_svd ...] [--quick] [--json]

A Llama of a few layers, made from a configuration, with random adapters. Every result is checked against the float64
decomposition of PEFT's own dense matrix before anything is timed. The sides are interleaved: one call of each in turn,
on the same model, whose new adapter is deleted after each.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from oracle import relative
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from rich.console import Console
from rich.table import Table
from timing import Limits, Samples, interleave, stopwatch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dcmerge_ext.integrations.peft import add_weighted_adapter

VENDOR = 2.0
"""Our error may be at most this many times that of PEFT's full decomposition in float32."""
NEW = "merged"


def build(hidden: int, layers: int, tasks: int, rank: int) -> PeftModel:
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=hidden, vocab_size=64
    )
    torch.manual_seed(0)
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**lora), adapter_name="task0")
    for task in range(1, tasks):
        model.add_adapter(f"task{task}", LoraConfig(**lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.02)
    return model


def timer(model: PeftModel, method: Callable[..., None], kind: str, weights: list[float]) -> Callable[[], float]:
    """Seconds of one whole call, without the deletion of what it added."""
    names = [f"task{i}" for i in range(len(weights))]
    density = 0.3 if kind != "svd" else None

    def run() -> float:
        if NEW in model.peft_config:
            model.delete_adapter(NEW)
        torch.manual_seed(0)
        return stopwatch(lambda: method(model.base_model, names, weights, NEW, kind, density=density))

    return run


def merged(model: PeftModel) -> list[Tensor]:
    return [m.get_delta_weight(NEW).detach() for m in model.modules() if NEW in getattr(m, "lora_A", {})]


def truth(model: PeftModel, run: Callable[[], float], rank: int) -> list[Tensor]:
    """What PEFT decomposes during ``run``, truncated in float64."""
    seen: list[Tensor] = []
    full = torch.linalg.svd

    def svd(A: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(A.detach())
        return full(A, *args, **kwargs)

    with mock.patch.object(torch.linalg, "svd", svd):
        run()
    found = (torch.linalg.svd(A.double(), full_matrices=False) for A in seen)
    return [(U[:, :rank] * S[:rank]) @ Vh[:rank] for U, S, Vh in found]


def measure(model: PeftModel, kind: str, weights: list[float], rank: int, limits: Limits) -> dict[str, Any]:
    sides = {"dcmerge_ext": add_weighted_adapter, "PEFT": LoraModel.add_weighted_adapter}
    timers = {name: timer(model, method, kind, weights) for name, method in sides.items()}
    wanted = truth(model, timers["PEFT"], rank)
    errors = {}
    for name, run in timers.items():
        run()
        errors[name] = max(relative(a, b) for a, b in zip(merged(model), wanted, strict=True))
    if not errors["dcmerge_ext"] <= VENDOR * errors["PEFT"]:
        raise SystemExit(f"{kind}: error {errors['dcmerge_ext']:.1e}, PEFT's {errors['PEFT']:.1e}")
    taken: dict[str, Samples] = interleave(timers, limits)
    ours, theirs = (taken[name].median for name in sides)
    return {
        "type": kind,
        "seconds": ours,
        "seconds_peft": theirs,
        "ratio": theirs / ours,
        "error": errors["dcmerge_ext"],
        "error_peft": errors["PEFT"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--types", nargs="+", default=["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2, help="of the model; two matrices each (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="128 wide, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()

    logging.basicConfig(level=logging.ERROR)
    model = build(128 if args.quick else args.hidden, args.layers, args.tasks, args.rank)
    weights = [1 - 0.1 * i for i in range(args.tasks)]
    limits = Limits(least=3, most=7, seconds=0.0 if args.quick else 20.0, precision=0.05, shortest=0.0)
    rows = [measure(model, kind, weights, args.rank, limits) for kind in args.types]
    if args.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
        return
    table = Table("combination type", "this package", "PEFT", "ratio", "error (theirs)")
    for row in rows:
        table.add_row(
            row["type"],
            f"{1e3 * row['seconds']:.0f} ms",
            f"{1e3 * row['seconds_peft']:.0f} ms",
            f"{row['ratio']:.1f}",
            f"{row['error']:.0e} ({row['error_peft']:.0e})",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
