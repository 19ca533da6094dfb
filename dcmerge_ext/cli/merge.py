"""``dcmerge merge`` and ``dcmerge plan``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dcmerge_ext.checkpoints.config import MergeConfig, build_config, load_yaml, read_config
from dcmerge_ext.checkpoints.estimate import Estimate, estimate
from dcmerge_ext.checkpoints.execute import work_bytes
from dcmerge_ext.checkpoints.memory import anonymous_bytes
from dcmerge_ext.checkpoints.run import Prepared, prepare, run
from dcmerge_ext.cli.display import make_console, make_table
from dcmerge_ext.distributed import Processes, is_first, joined
from dcmerge_ext.errors import OptionError

_FIELDS = (
    "base", "out", "method", "scale", "device", "dtype", "save_as", "adapter_rank", "shard_size", "vocab", "extra",
    "max_memory", "lora_scale", "overwrite", "resume", "verify",
)  # fmt: skip


def run_merge(args: argparse.Namespace) -> int:
    if args.dry_run:
        return run_plan(args)
    with joined() as processes:
        return _merge(args, processes)


def _merge(args: argparse.Namespace, processes: Processes) -> int:
    prepared = prepare(config_of(args))
    for note in prepared.plan.notes:
        make_console(stderr=True, quiet=args.quiet).print(f"note: {note}")
    predicted = _estimate(prepared) if args.verbose and is_first() else None
    before = anonymous_bytes()
    progress = Progress(
        TextColumn("merging"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=make_console(stderr=True),
        disable=args.quiet or not is_first(),
    )
    with progress:
        bar = progress.add_task("merge", total=work_bytes(prepared.plan, copies=prepared.adapter is None))
        report = run(prepared, lambda done: progress.advance(bar, done), processes)
    counts = prepared.plan.counts()
    make_console(quiet=args.quiet).print(
        f"{report.out}: {_summary(prepared)} in {report.seconds:.1f} s "
        f"({counts['merge']} tensors merged, {counts['mean']} averaged, {counts['copy']} copied)"
    )
    if predicted is not None:
        make_console().print(
            f"predicted {_duration(predicted.seconds)}, took {_duration(report.seconds)}; memory above what the process held "
            f"before: predicted {_size(predicted.peak_bytes)}, took {_size(report.peak_bytes - before)}"
        )
    return 0


def run_plan(args: argparse.Namespace) -> int:
    prepared = prepare(config_of(args))
    if args.quiet:
        return 0
    plan = prepared.plan
    console = make_console()
    console.print(f"{_summary(prepared)} -> {prepared.config.out}")
    if args.verbose:
        for line in _tensor_lines(prepared):
            console.print(line)
    table = make_table("action", "tensors", "size", "why")
    for action in ("merge", "mean", "copy"):
        chosen = [t for t in plan.tensors if t.action == action]
        why = sorted({t.reason for t in chosen if t.reason})
        table.add_row(action, str(len(chosen)), _size(sum(t.base.nbytes for t in chosen)), "; ".join(why))
    console.print(table)
    cost = _estimate(prepared)
    stages = make_table("stage", "bytes", "about")
    stages.add_row("read", _size(cost.read_bytes), _duration(cost.read_seconds))
    stages.add_row("compute", "", _duration(cost.compute_seconds))
    stages.add_row("write", _size(cost.written_bytes), _duration(cost.write_seconds))
    console.print(stages)
    console.print(
        f"about {_duration(cost.seconds)}, peak memory about {_size(cost.peak_bytes)} above bare torch (estimates)"
    )
    for note in plan.notes:
        console.print(f"note: {note}")
    return 0


def _estimate(prepared: Prepared) -> Estimate:
    return estimate(prepared.plan, prepared.output_bytes, Path(prepared.config.out).expanduser())


def config_of(args: argparse.Namespace) -> MergeConfig:
    """The configuration file, if any, with what the command line gives on top."""
    values: dict[str, Any] = read_config(Path(args.config)) if args.config else {}
    if args.method and values.get("options") and args.method != values.get("method", "dc_merge"):
        raise OptionError(
            f"{args.config}: sets options of {values.get('method', 'dc_merge')}, and --method {args.method} is another method; "
            "take the options out of the file, or the method off the command line"
        )
    values.update({field: value for field in _FIELDS if (value := getattr(args, field, None)) is not None})
    if args.tasks:
        tasks, weights = zip(*(split_task(text) for text in args.tasks), strict=True)
        values["tasks"] = list(tasks)
        values["weights"] = None if all(w is None for w in weights) else [1.0 if w is None else w for w in weights]
    options: dict[str, Any] = {}
    for setting in args.settings or []:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise OptionError(f"--set {setting}: write KEY=VALUE")
        try:
            options[key] = load_yaml(text)
        except yaml.YAMLError as error:
            raise OptionError(
                f"--set {setting}: the value is not a YAML scalar ({' '.join(str(error).split())})"
            ) from error
    if args.seed is not None:
        options["seed"] = args.seed
    if options:
        earlier = values.get("options") or {}
        if not isinstance(earlier, dict):
            raise OptionError(f"{args.config}: options must map names to values, got {earlier!r}")
        values["options"] = {**earlier, **options}
    return build_config(values, args.config or "command line")


def split_task(text: str) -> tuple[str, float | None]:
    """DIR or DIR=WEIGHT; an existing path that holds a = is a path."""
    path, separator, weight = text.rpartition("=")
    if not separator or Path(text).exists():
        return text, None
    try:
        value = float(weight)
    except ValueError:
        return text, None
    if not math.isfinite(value):
        raise OptionError(f"--task {text}: the weight must be a finite number")
    return path, value


def _summary(prepared: Prepared) -> str:
    plan = prepared.plan
    tasks = "task" if plan.num_tasks == 1 else "tasks"
    return f"{plan.method.name} of {plan.num_tasks} {tasks} at scale {plan.scale:g}, saved as {prepared.save_as}"


def _tensor_lines(prepared: Prepared) -> Iterator[str]:
    """One line a tensor: a table would break long names."""
    yield "tensor  shape  dtype  action  method  scale  rank"
    for t in prepared.plan.tensors:
        line = f"{t.name}  {t.base.text.replace(' ', '  ')}  {t.action}"
        if t.method is not None and t.action != "copy":
            line += f"  {t.method.name}  {t.scale:g}" + (f"  {t.merged_rank}" if t.merged_rank is not None else "")
        yield line + (f"  ({t.reason})" if t.reason else "")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0.1):.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
