"""Time this package against what else computes the same, having checked first that both do.

    python benchmarks/run.py                        # everything; leave the machine alone meanwhile
    python benchmarks/run.py --case 'svd/*' --list
    python benchmarks/run.py --quick                # every line of code in seconds, no claim about time
    python -m benchmarks --device cuda              # the CUDA kernels; --predict needs no GPU

Exit status: 0; 1 an answer is wrong; 2 the command line or the environment is. README.md says how it measures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # its generators are shared

import device
import plot
import report
from case import Case, Row, Setting, measure
from rich.console import Console
from suite import CASES
from timing import measure_rates, misleading_settings

from dcmerge_ext import backends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", metavar="PATTERN", help="cases by name, with * and ?; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds: a smoke test")
    parser.add_argument("--memory", action="store_true", help="peak memory of merges in fresh processes, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, help="keep inputs that take long to make here; default: a temporary folder"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--predict", action="store_true", help="with --device cuda: what an H100 takes at least")
    args = parser.parse_args()

    if args.device == "cuda":
        if args.memory or args.cache:
            parser.error("--memory and --cache belong to the CPU benchmark")
        return device.main(args.case or ["*"], args.out, quick=args.quick, predict=args.predict, names_only=args.list)
    if args.predict:
        parser.error("--predict needs --device cuda")
    chosen = [case for case in CASES if any(fnmatch(case.name, pattern) for pattern in args.case or ["*"])]
    if not chosen:
        parser.error(f"no case matches {' '.join(args.case)}; --list shows them")
    if args.list:
        sys.stdout.write("".join(f"{case.name}\n" for case in chosen))
        return 0
    if misleading := misleading_settings():
        parser.error(f"{', '.join(misleading)} slows the rivals down and would flatter this package; unset it")
    if not (native := backends()["cpu"]).startswith("available"):
        parser.error(f"the native core is {native}")
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(chosen, Setting(args.quick, args.memory, args.cache or Path(scratch)), args.out)
    return 1 if any(row.status == "failed" for row in rows) else 0


def run(chosen: Sequence[Case], setting: Setting, out: Path) -> list[Row]:
    """Measure and report; the files are written after every case, so that an interrupted run leaves what it had."""
    progress = Console(stderr=True)
    rates = measure_rates(setting.quick)
    rows: list[Row] = []
    for case in chosen:
        progress.print(f"{len(rows) + 1}/{len(chosen)} {case.name}", markup=False, highlight=False)
        rows.append(measure(case, setting, rates))
        report.write(out, rows, rates, quick=setting.quick)
    try:
        plot.draw(rows, out / "growth.png")
    except ImportError as error:
        progress.print(f"no plot: needs {error.name}")
    sys.stdout.write((out / "table.txt").read_text())
    return rows


if __name__ == "__main__":
    sys.exit(main())
