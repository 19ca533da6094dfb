"""``dcmerge profile``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from dcmerge_ext.checkpoints.config import MergeConfig, read_config
from dcmerge_ext.checkpoints.execute import work_bytes
from dcmerge_ext.checkpoints.output import check_file
from dcmerge_ext.checkpoints.run import Prepared
from dcmerge_ext.cli.display import make_console, make_table
from dcmerge_ext.cli.merge import config_of
from dcmerge_ext.profiling.result import Profile, StageCost
from dcmerge_ext.profiling.run import profile
from dcmerge_ext.profiling.trace import save_trace

_TENSORS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    reports = parser.add_argument_group(
        "profile",
        "the merged output goes to a scratch directory beside --out (or the system's temporary one), and is deleted",
    )
    reports.add_argument("--json", metavar="FILE", help="the numbers")
    reports.add_argument("--trace", metavar="FILE", help="every pass through a stage, for ui.perfetto.dev")
    reports.add_argument("--picture", metavar="FILE", help="the stages and the longest tensors, as one SVG")


def run(args: argparse.Namespace) -> int:
    config = _config(args)
    for file in (args.json, args.trace, args.picture):
        if file is not None:
            check_file(Path(file).expanduser(), config.overwrite)
    if args.picture is not None:
        import dcmerge_ext.profiling.picture  # noqa: F401 - packages that are missing are an error before any work
    progress = Progress(
        TextColumn("profiling"), BarColumn(), TaskProgressColumn(),
        console=make_console(stderr=True), disable=args.quiet, transient=True,
    )  # fmt: skip
    with progress:

        def prepared(ready: Prepared) -> Callable[[int], None]:
            bar = progress.add_task("", total=work_bytes(ready.plan, copies=ready.adapter is None))
            return lambda done: progress.advance(bar, done)

        found, events = profile(config, prepared)
    if args.json is not None:
        found.save_json(args.json, overwrite=config.overwrite)
    if args.trace is not None:
        save_trace(events, args.trace, overwrite=config.overwrite)
    if args.picture is not None:
        from dcmerge_ext.profiling.picture import save_picture

        save_picture(found, args.picture, overwrite=config.overwrite)
    if not args.quiet:
        _show(found, all_tensors=args.verbose)
    return 0


def _config(args: argparse.Namespace) -> MergeConfig:
    """As of a merge; the output only says where the scratch directory goes, and may be left out."""
    if args.out is None and not (args.config and "out" in read_config(Path(args.config))):
        args.out = str(Path(tempfile.gettempdir()) / "merged")
    return config_of(args)


def _show(found: Profile, *, all_tensors: bool) -> None:
    console = make_console()
    rates = found.rates
    console.print(
        f"{found.method} of {found.tasks} {'task' if found.tasks == 1 else 'tasks'}: {found.seconds:.3g} s "
        f"on {found.device}, {found.threads} threads"
    )
    console.print(
        f"this machine: matrix product {rates.product / 1e9:.3g} Gflop/s (float32), copy {rates.copy / 1e9:.3g} GB/s, "
        f"cached file read {rates.read / 1e9:.3g} GB/s, written {rates.write / 1e9:.3g} GB/s (one thread)"
    )
    table = make_table("stage", "calls", "machine s", "of wall", "Gflop", "MB", "of its rate")
    for cost in found.stages:
        table.add_row(
            cost.stage, str(cost.calls), f"{cost.machine_seconds:.3f}",
            f"{cost.machine_seconds / found.seconds:.0%}", f"{cost.flops / 1e9:.3g}" if cost.flops else "-",
            f"{cost.bytes / 1e6:.3g}" if cost.bytes else "-", _achieved(cost),
        )  # fmt: skip
    table.add_row("idle", "", f"{found.idle:.3f}", f"{found.idle / found.seconds:.0%}", "", "", "")
    console.print(table)
    layers = make_table("tensor", "shape", "action", "machine s", "longest stages")
    for tensor in found.tensors if all_tensors else found.tensors[:_TENSORS]:
        longest = ", ".join(f"{name} {seconds:.3g}" for name, seconds in list(tensor.stages.items())[:3])
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        layers.add_row(tensor.name, shape, tensor.action, f"{tensor.machine_seconds:.3f}", longest)
    console.print(layers)
    if not all_tensors and len(found.tensors) > _TENSORS:
        console.print(f"{len(found.tensors) - _TENSORS} more tensors: -v shows them")


def _achieved(cost: StageCost) -> str:
    kind = cost.stage if cost.stage in ("read", "write") else "copy"
    parts = [(cost.achieved.product, "product"), (cost.achieved.bytes, kind)]
    return ", ".join(f"{part:.0%} {name}" for part, name in parts if part is not None) or "-"
