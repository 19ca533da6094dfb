"""Fine-tune a real text encoder for unrelated tasks, merge by every method, and check what DC-Merge's paper claims.

    python -m benchmarks.encoder --report docs/experiment.md    # two seeds: about two hours on two cores
    python -m benchmarks.encoder --quick                        # every line of code in half a minute; no claim

What is complete in --out is not done again: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from dcmerge_ext.errors import InputError

from . import jobs, report, training
from .protocol import FULL, KINDS, QUICK, Merge, Protocol, merges
from .results import Place, Results, write_json


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("encoder_results"), help="default: %(default)s")
    parser.add_argument("--report", type=Path, metavar="FILE", help="default: report.md in OUT")
    parser.add_argument("--quick", action="store_true", help="two tasks, a tiny encoder, a few steps: a smoke test")
    parser.add_argument("--seeds", type=int, nargs="+", help="of splits and training; default: 0 1, quick: 0")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; default: %(default)s")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="leave the base, the fine-tunes and DC-Merge's model of the first seed here",
    )
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error("--jobs needs 1 or more")
    if args.keep and args.keep.exists():
        parser.error(f"{args.keep} exists; choose another folder for --keep")
    seeds = sorted(set(args.seeds or ([0] if args.quick else [0, 1])))
    try:
        run(Place(args.out), QUICK if args.quick else FULL, seeds, args.jobs, args.report, args.keep)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def run(
    place: Place, protocol: Protocol, seeds: Sequence[int], processes: int, file: Path | None, keep: Path | None
) -> Results:
    """Do what is left, and write the results and the report.

    Raises:
        InputError: a source is missing; the folder is of another protocol.
    """
    console = Console(stderr=True, highlight=False)
    started = time.perf_counter()
    begun = _claim_folder(place, protocol)
    jobs.one_thread()
    if not place.base.exists():
        partial = place.base.with_name("base.partial")
        shutil.rmtree(partial, ignore_errors=True)
        training.save_base(partial, protocol.width)
        partial.rename(place.base)
    jobs.save_data(place, protocol, seeds)
    for phase in jobs.phases(place, protocol, seeds):
        for i, name in enumerate(jobs.run_jobs(phase, processes), 1):
            console.print(f"{time.perf_counter() - started:6.0f} s  {i}/{len(phase)}  {name}", markup=False)
    done = [merge for seed in seeds for merge in merges(protocol, seed)]
    results = place.collect(protocol.tasks, KINDS, [(merge.seed, merge.name) for merge in done])
    write_json(place.results, {"begun": begun, "protocol": asdict(protocol), **asdict(results)})
    text = report.markdown(results, protocol, begun)
    file = file or place.out / "report.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    console.print(f"written: {file}", markup=False)
    if keep:
        _keep(place, results, done, keep)
    return results


def _claim_folder(place: Place, protocol: Protocol) -> dict[str, Any]:
    """Make the folder, or see that it belongs to this protocol. When and with what it was begun."""
    file = place.out / "protocol.json"
    mine = json.loads(json.dumps(asdict(protocol)))
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        begun: dict[str, Any] = stored.pop("begun")
        if stored != mine:
            raise InputError(f"{place.out}: holds a run with other settings; choose another --out")
        return begun
    if place.out.exists() and any(place.out.iterdir()):
        raise InputError(f"{place.out}: is not empty and not an earlier run; choose another --out")
    begun = report.environment()
    write_json(file, {**mine, "begun": begun})
    return begun


def _keep(place: Place, results: Results, done: Sequence[Merge], folder: Path) -> None:
    """The family of full fine-tunes of the first seed."""
    merge = next(
        m for m in done if m.variant.label == "dc_merge" and m.kind == "full" and m.tasks == tuple(results.tasks)
    )
    jobs.keep_family(place, merge, results.of(merge.seed, "full")["dc_merge"].scale, folder)
