"""``PYTHONPATH=tests python -m fuzz``: runs cases and prints how they ended, by target."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from fuzz.pool import Worker
from fuzz.targets import TARGETS

_KINDS = ("merged", "refused", "failed", "finding")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000, help="in all, spread evenly over the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each target")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="these only")
    parser.add_argument("--messages", action="store_true", help="print the message of every case that was not merged")
    args = parser.parse_args()
    targets = args.target or list(TARGETS)
    cases = [(targets[i % len(targets)], args.seed, args.first + i // len(targets)) for i in range(args.cases)]
    counts = {target: Counter[str]() for target in targets}
    findings = []
    started = time.perf_counter()
    with Worker() as worker:
        for ended in worker.run(cases):
            counts[ended.target][ended.outcome.kind] += 1
            if ended.outcome.kind == "finding":
                findings.append(ended)
                sys.stdout.write(f"\n{ended.again}\n{ended.outcome.text}\n")
                sys.stdout.flush()
            elif args.messages and ended.outcome.text:
                sys.stdout.write(f"{ended.target} {ended.number}: {ended.outcome.text}\n")
    seconds = time.perf_counter() - started
    sys.stdout.write(f"\n{'target':<22}{'cases':>9}" + "".join(f"{kind:>9}" for kind in _KINDS) + "\n")
    for target, counted in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        sys.stdout.write(f"{target:<22}{counted.total():>9}" + "".join(f"{counted[kind]:>9}" for kind in _KINDS) + "\n")
    sys.stdout.write(f"seed {args.seed}, {seconds:.0f} s\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
