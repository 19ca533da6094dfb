"""Merges killed at random instants by SIGKILL and resumed, as often as it takes: every one must end with the same bytes.

    python tests/slow/kills.py --runs 100

Half of what it does is one process, killed again and again until it comes through. The other half is two processes under torchrun, one of
which is killed; one process, or two again, go on. Prints a line of results for each half, and fails at the first difference.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import families

from dcmerge_ext.checkpoints import journal
from dcmerge_ext.cli import main
from dcmerge_ext.cli.display import make_console

METHODS = ("dc_merge", "ties", "knots")
Tree = dict[str, bytes | str | None]


def make_family(folder: Path) -> dict[str, list[str]]:
    """A model of 60 tensors, three fine-tunes and two adapters. Command lines by method, without --out."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.attn.weight": torch.randn(160, 160, generator=generator) for i in range(30)}
    base |= {f"layers.{i}.norm.weight": torch.randn(160, generator=generator) for i in range(29)}
    base["embed_tokens.weight"] = torch.randn(4000, 160, generator=generator)
    families.write_model(folder / "base", base)
    models = [families.write_model(folder / f"task{i}", families.tuned(base, i)) for i in range(3)]
    modules = [name.removesuffix(".weight") for name in base if "attn" in name]
    adapters = [families.write_adapter(folder / f"adapter{i}", base, modules, rank=8, seed=i) for i in range(2)]
    full = ["merge", "-q", "--shard-size", "1MB", "--base", str(folder / "base"), *families.tasks(*models)]
    low = ["merge", "-q", *families.tasks(*adapters), "--method", "knots"]
    return {"dc_merge": full, "ties": [*full, "--method", "ties"], "knots": low}


def command(line: list[str]) -> None:
    """The command line in a process of its own, quiet about being stopped."""
    journal._COMMIT_SECONDS = 0.02  # short merges, as many commits as a long one
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.exit(main(line))


def start(line: list[str]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=command, args=(line,))
    process.start()
    return process


def finished(line: list[str]) -> None:
    process = start(line)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"exit status {process.exitcode} of {' '.join(line)}")


def content(out: Path) -> Tree:
    found = families.tree(out)
    del found["dcmerge_timings.json"]
    return found


def alone(line: list[str], out: Path, seconds: float, chance: random.Random) -> tuple[int, str]:
    """Start and kill until one comes through. Returns the number of kills, and what became of the run."""
    kills = 0
    while True:
        process = start([*line, "--resume"])
        process.join(chance.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == 0 or out.exists():  # killed after the last rename: complete
            return kills, "resumed until it came through" if kills else "came through at once"
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"exit status {process.exitcode} of {' '.join(line)}")
        kills += 1


def together(line: list[str], out: Path, seconds: float, chance: random.Random) -> tuple[int, str]:
    """Two processes under torchrun, one killed while it works. Returns as :func:`alone`."""
    run = subprocess.Popen([*_TWO, *line], cwd=tempfile.gettempdir(), stderr=subprocess.DEVNULL)
    partial = out.with_name(out.name + ".partial")
    while not partial.exists() and not out.exists() and run.poll() is None:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, seconds))
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    pids = [int(pid) for pid in workers.read_text().split()] if workers.exists() else []
    if pids:
        with contextlib.suppress(ProcessLookupError):  # it has just come to its end
            os.kill(chance.choice(pids), signal.SIGKILL)
    status = run.wait(timeout=120)
    if out.exists():
        return 0, "came through before the kill"
    if status == 0:
        raise SystemExit(f"exit status 0 without an output: {' '.join(line)}")
    if chance.random() < 0.2:
        again = [*_TWO, *line, "--resume"]
        done = subprocess.run(again, cwd=tempfile.gettempdir(), stderr=subprocess.DEVNULL, timeout=120)
        if done.returncode != 0:
            raise SystemExit(f"exit status {done.returncode} of two processes: {' '.join(line)} --resume")
        return 1, "resumed by two"
    finished([*line, "--resume"])
    return 1, "resumed by one"


_TWO = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *(str(Path(__file__).resolve()), "--worker"),
)


def try_all(
    kind: str,
    runs: int,
    lines: dict[str, list[str]],
    folder: Path,
    disturbed: Callable[..., tuple[int, str]],
    slower: float,
) -> None:
    chance = random.Random(len(kind))
    kills, tally = 0, Counter[str]()
    expected: dict[str, tuple[Tree, float]] = {}
    started = time.monotonic()
    for i in range(runs):
        method = METHODS[i % len(METHODS)]
        out = folder / f"out-{method}"
        line = [*lines[method], "--out", str(out)]
        if method not in expected:
            before = time.monotonic()
            finished(line)
            expected[method] = content(out), time.monotonic() - before
            shutil.rmtree(out)
        tree, seconds = expected[method]
        times, what = disturbed(line, out, slower * seconds, chance)
        kills += times
        tally[what] += 1
        if content(out) != tree:
            raise SystemExit(f"run {i} of {kind}, {method}: other bytes; see {out}")
        shutil.rmtree(out)
    outcomes = ", ".join(f"{count} x {what}" for what, count in sorted(tally.items()))
    took = f"{time.monotonic() - started:.0f} s"
    make_console().print(
        f"{kind}: {runs} runs, {kills} kills, always the bytes of an undisturbed run ({outcomes}); {took}"
    )


def kill_and_resume() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    runs: int = parser.parse_args().runs
    torch.set_num_threads(1)  # so that the processes that are forked find no threads missing
    with tempfile.TemporaryDirectory() as name:
        lines = make_family(Path(name))
        try_all("one process, killed", runs, lines, Path(name), alone, 1.3)
        try_all("two processes, one killed", runs, lines, Path(name), together, 1.0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        torch.set_num_threads(1)
        command(sys.argv[2:])
    kill_and_resume()
