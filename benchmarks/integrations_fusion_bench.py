"""fusion_bench's own algorithms against this package's under their arguments, `run` on a pool of CLIP vision models, in one process.

    python benchmarks/integrations_fusion_bench.py [--algorithms TSV-M Iso-C Iso-CTS] [--layers 12] [--models 8] [--quick] [--json]

Models are held in memory, as large as CLIP's ViT-B/32, with random weights; the singular values of an update fall as
j^-0.5, those of real fine-tunes fall faster. Every result is checked against fusion_bench's before anything is timed. The
sides are interleaved: one call of each in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.method import ISO_C_Merge, ISO_CTS_Merge, TaskSingularVectorMerging
from rich.console import Console
from rich.table import Table
from timing import Limits, interleave, stopwatch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dcmerge_ext.integrations import fusion_bench as ours

TOLERANCE = 1e-4
"""Of a result, relative to the update of a tensor: both sides are off by 1e-5."""
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], type[BaseAlgorithm], dict[str, Any]]] = {
    "TSV-M": (ours.TaskSingularVectorMerging, TaskSingularVectorMerging, {}),
    "Iso-C": (ours.IsotropicMergingInCommonSubspace, ISO_C_Merge, {"scaling_factor": 1.0}),
    "Iso-CTS": (
        ours.IsotropicMergingInCommonAndTaskSubspace,
        ISO_CTS_Merge,
        {"scaling_factor": 1.0, "common_space_fraction": 0.8},
    ),
}


class Pool(BaseModelPool):
    """A model of its own for each call, as from files: the algorithms write into the pretrained model."""

    def load_model(self, name: str, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super().load_model(name, *args, **kwargs)
        return copy.deepcopy(model) if name == "_pretrained_" else model


def make_pool(layers: int, models: int, quick: bool) -> Pool:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4} if quick else {}
    base = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=layers, **size)).eval()
    found = {"_pretrained_": base}
    for task in range(models):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += _update(parameter)
        found[f"task_{task}"] = model
    return Pool(found)


def _update(parameter: Tensor) -> Tensor:
    if parameter.ndim != 2:
        return 1e-3 * torch.randn(parameter.shape)
    m, n = parameter.shape
    q = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(side, q)).Q for side in (m, n))
    return (U * (0.1 * torch.arange(1, q + 1) ** -0.5)) @ V.mT


def run(algorithm: BaseAlgorithm, pool: Pool) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):  # a line per tensor
        model: nn.Module = algorithm.run(pool)
    return model


def check(found: nn.Module, expected: nn.Module, base: nn.Module) -> float:
    worst = 0.0
    states = [model.state_dict() for model in (found, expected, base)]
    for name, tensor in states[0].items():
        update = states[1][name] - states[2][name]
        worst = max(worst, float((tensor - states[1][name]).norm() / update.norm()))
    if not worst < TOLERANCE:
        raise SystemExit(f"results differ by {worst:.1e}")
    return worst


def measure(name: str, pool: Pool, limits: Limits) -> dict[str, Any]:
    mine, theirs, arguments = ALGORITHMS[name]

    def timer(cls: type[BaseAlgorithm]) -> Callable[[], float]:
        return lambda: stopwatch(lambda: run(cls(**arguments), pool))

    difference = check(run(mine(**arguments), pool), run(theirs(**arguments), pool), pool.load_model("_pretrained_"))
    taken = interleave({"ours": timer(mine), "theirs": timer(theirs)}, limits)
    a, b = taken["ours"].median, taken["theirs"].median
    return {"algorithm": name, "seconds": a, "seconds_fusion_bench": b, "ratio": b / a, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="64 wide, two layers, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", module="lightning")
    pool = make_pool(2 if args.quick else args.layers, args.models, args.quick)
    limits = Limits(least=2, most=5, seconds=0.0 if args.quick else 60.0, precision=0.05, shortest=0.0)
    rows = [measure(name, pool, limits) for name in args.algorithms]
    if args.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
        return
    table = Table("algorithm", "this package", "fusion_bench", "ratio", "largest difference")
    for row in rows:
        table.add_row(
            row["algorithm"],
            f"{row['seconds']:.2f} s",
            f"{row['seconds_fusion_bench']:.2f} s",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.1e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
