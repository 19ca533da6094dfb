"""``dcmerge compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dcmerge_ext.checkpoints.output import check_file
from dcmerge_ext.cli.display import make_console, make_table
from dcmerge_ext.cli.merge import split_task
from dcmerge_ext.comparison import Comparison, compare
from dcmerge_ext.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("merged", metavar="MERGED", help="a merged checkpoint or adapter")
    parser.add_argument("--out", metavar="FILE", help="the report, one HTML file")
    parser.add_argument("--json", metavar="FILE", help="the numbers")
    parser.add_argument("--base", metavar="PATH", help="in place of the base that the merged checkpoint names")
    parser.add_argument(
        "--task", action="append", metavar="PATH[=WEIGHT]", help="in place of the tasks it names, all of them in order"
    )
    parser.add_argument("--match", metavar="REGEX", help="only tensors whose whole name matches")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="components of each task that count; default its rank, or min(m, n) / tasks",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--overwrite", action="store_true", help="replace the files")


def run(args: argparse.Namespace) -> int:
    if args.out is None and args.json is None:
        raise OptionError("compare: give --out for the report, --json for the numbers, or both")
    for file in (args.out, args.json):
        if file is not None:
            check_file(Path(file).expanduser(), args.overwrite)
    if args.out is not None:
        import dcmerge_ext.comparison.page  # noqa: F401 - packages that are missing are an error before any work
    pairs = [split_task(task) for task in args.task or ()]
    with Progress(
        TextColumn("comparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=make_console(stderr=True), disable=args.quiet, transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=None)
        comparison = compare(
            args.merged,
            args.base,
            [path for path, _ in pairs] or None,
            weights=[1.0 if weight is None else weight for _, weight in pairs] if any(w for _, w in pairs) else None,
            match=args.match,
            rank=args.rank,
            device=args.device,
            advance=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if args.json is not None:
        comparison.save_json(args.json, overwrite=args.overwrite)
    if args.out is not None:
        comparison.save_html(args.out, overwrite=args.overwrite)
    if not args.quiet:
        _show(comparison)
    return 0


def _show(comparison: Comparison) -> None:
    table = make_table("task", "lost", "projected DirSim", "DirSim", "CosSim", "error")
    for task, means in zip(comparison.tasks, comparison.summary, strict=True):
        values = (means.lost, means.projected_dir_sim, means.dir_sim, means.cos_sim, means.error)
        table.add_row(task, *("-" if value is None else f"{value:.3f}" for value in values))
    console = make_console()
    console.print(table)
    for matrix, index, lost in comparison.most_lost(3):
        console.print(f"lost most: {matrix.name}, {comparison.tasks[index]}: {lost:.3f}")
