"""``dcmerge sweep``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import traceback
from pathlib import Path
from types import ModuleType

from dcmerge_ext.checkpoints.sweep import Evaluate, run_sweep
from dcmerge_ext.cli.display import make_console, make_table
from dcmerge_ext.cli.merge import config_of
from dcmerge_ext.errors import InputError, OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("search")
    search.add_argument(
        "--evaluate",
        required=True,
        metavar="FILE.py:FUNCTION",
        help="a function of the directory of a merged checkpoint that returns its score; also MODULE:FUNCTION",
    )
    search.add_argument(
        "--scales",
        nargs="+",
        type=float,
        metavar="S",
        help="to try; default 0.25 to 1.5 times the method's default scale",
    )
    search.add_argument("--minimize", action="store_true", help="the lowest score wins, not the highest")


def run(args: argparse.Namespace) -> int:
    function = load_function(args.evaluate)

    def evaluate(directory: Path) -> float:
        try:
            return function(directory)
        except Exception as error:  # the user's code, whatever it raises
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"--evaluate {args.evaluate}: failed ({type(error).__name__}: {error}; {frame.filename}:{frame.lineno})"
            ) from error

    console = make_console(stderr=True, quiet=args.quiet)
    report = run_sweep(
        config_of(args),
        evaluate,
        args.scales,
        maximize=not args.minimize,
        advance=lambda scale, score: console.print(f"scale {scale:g}: {score:g}"),
    )
    table = make_table("scale", "score", "")
    for scale, score in zip(report.scales, report.scores, strict=True):
        table.add_row(f"{scale:g}", f"{score:g}", "best" if scale == report.best else "")
    console = make_console(quiet=args.quiet)
    console.print(table)
    console.print(f"{report.merge.out}: scale {report.best:g} in {report.merge.seconds:.1f} s")
    if len(report.scales) > 1 and report.best in (min(report.scales), max(report.scales)):
        console.print("the best scale is at the edge of those tried; a better one may lie beyond it")
    return 0


def load_function(text: str) -> Evaluate:
    """The function that ``FILE.py:NAME`` or ``MODULE:NAME`` names."""
    place, separator, name = text.rpartition(":")
    if not separator or not place or not name:
        raise OptionError(f"--evaluate {text}: write FILE.py:FUNCTION or MODULE:FUNCTION")
    module = _load_file(Path(place), text) if place.endswith(".py") else _load_module(place, text)
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"--evaluate {text}: {place} has no function {name!r}")
    found: Evaluate = function
    return found


def _load_file(path: Path, text: str) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"--evaluate {text}: {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise OptionError(f"--evaluate {text}: {path} fails to import ({type(error).__name__}: {error})") from error
    return module


def _load_module(name: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise OptionError(f"--evaluate {text}: {name} fails to import ({type(error).__name__}: {error})") from error
