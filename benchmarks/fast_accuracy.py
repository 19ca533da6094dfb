"""What accuracy="fast" costs the merged model: normalized accuracy of exact and fast DC-Merge on the demo's full fine-tunes.

    dcmerge demo --out DEMO --seed 0
    python benchmarks/fast_accuracy.py DEMO

Five fine-tunes of a vision transformer on real digits; every test image, at several scales.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import dcmerge_ext as dcm
from dcmerge_ext.demo.data import TASKS, load_splits
from dcmerge_ext.demo.training import accuracies, accuracy, load_between, load_model, load_tuned
from dcmerge_ext.metrics import normalized_accuracy

SCALES = (1.0, 1.5, 2.0, 2.5, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder that `dcmerge demo` wrote")
    parser.add_argument("--seed", type=int, default=0, help="of that demo: it splits the images (default: %(default)s)")
    args = parser.parse_args()

    images = load_splits(args.seed).test
    base = load_model(args.demo / "base")
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    tuned = [accuracy(load_tuned(args.demo, "full", task.name), images, task) for task in TASKS]
    tasks = [args.demo / "full" / task.name for task in TASKS]

    table = Table("scale", "exact", "fast", "difference")
    with tempfile.TemporaryDirectory() as folder:
        merged = {}
        for name in ("exact", "fast"):
            out = Path(folder, name)
            dcm.merge_checkpoints(args.demo / "base", tasks, out, "dc_merge", 1.0, accuracy=name)
            merged[name] = load_model(out).state_dict()
    moved, apart = (
        sum(float((merged["exact"][name] - other[name]).double().square().sum()) for name in start) ** 0.5
        for other in (start, merged["fast"])
    )
    for scale in SCALES:
        found = []
        for weights in merged.values():
            load_between(base, start, weights, scale)
            found.append(normalized_accuracy(accuracies(base, images), tuned))
        table.add_row(f"{scale:.1f}", *(f"{value:.4f}" for value in found), f"{found[1] - found[0]:+.4f}")
    console = Console()
    console.print(table)
    console.print(f"distance of the merged weights, relative to their distance from the base: {apart / moved:.2f}")


if __name__ == "__main__":
    main()
