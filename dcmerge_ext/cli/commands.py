"""``dcmerge info``, ``methods`` and ``demo``."""

from __future__ import annotations

import argparse
import inspect
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dcmerge_ext.backends import ENVIRONMENT, available, backends
from dcmerge_ext.cli.display import make_console, make_table
from dcmerge_ext.errors import OptionError
from dcmerge_ext.methods.registry import describe_options, list_methods, nearest
from dcmerge_ext.svd import cost
from dcmerge_ext.version import __version__


def run_info(args: argparse.Namespace) -> int:
    console = make_console()
    console.print(f"dcmerge_ext {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    table = make_table("backend", "state")
    for name, state in backends().items():
        table.add_row(name, state)
    console.print(table)
    if forced := os.environ.get(ENVIRONMENT):
        console.print(f"{ENVIRONMENT} forces {forced}" + ("" if available(forced) else ", which cannot run here"))
    if args.verbose:
        console.print(
            "exact truncated SVD of a float32 update, rank = min(m, n) / T (krylov: randomized; gram, lapack: full):"
        )
        console.print(_route_table())
        console.print(torch.__config__.show(), torch.__config__.parallel_info())
    return 0


def _route_table() -> Table:
    """What the cost model chooses for the shapes of common models."""
    table = make_table("matrix", "T", "rank", "route", "Krylov dimension", "cost against LAPACK")
    for m, n in ((384, 384), (768, 768), (3072, 768), (1024, 4096), (4096, 4096), (11008, 4096)):
        for tasks in (2, 4, 8, 20):
            rank = min(m, n) // tasks
            plan = cost.plan(m, n, rank)
            relative = plan.cost / cost.lapack(m, n)
            dimension = str(plan.dimension) if plan.route == "krylov" else "-"
            table.add_row(f"{m} x {n}", str(tasks), str(rank), plan.route, dimension, f"{relative:.2f}")
    return table


def run_methods(args: argparse.Namespace) -> int:
    console = make_console()
    methods = list_methods()
    if args.name is None:
        console.print("method  works on  default scale  paper")
        for name, cls in methods.items():
            console.print(f"{name}  {cls.kind()}  {cls().default_scale(2):g}  {cls.paper}")
            console.print(f"    {(inspect.getdoc(cls) or '').splitlines()[0]}")
        return 0
    if args.name not in methods:
        raise OptionError(
            f"unknown method {args.name!r}{nearest(args.name, list(methods))} (known: {', '.join(methods)})"
        )
    cls = methods[args.name]
    console.print(f"{cls.name}   {cls.paper}\n\n{inspect.getdoc(cls)}\n")
    table = make_table("option", "type", "default", "meaning")
    for option in describe_options(cls):
        table.add_row(option.name, option.type, str(option.default), option.meaning)
    console.print(table if table.rows else "no options")
    return 0


def run_demo(args: argparse.Namespace) -> int:
    from dcmerge_ext.demo import run_demo as run  # needs the optional packages of the demo

    run(
        Path(args.out),
        seed=args.seed,
        overwrite=args.overwrite,
        quick=args.quick,
        console=Console(quiet=args.quiet),
    )
    return 0
