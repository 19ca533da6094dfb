"""Cases through a worker process, which is replaced when a case kills or hangs it: that is a finding."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from fuzz.case import Outcome

_TICK_SECONDS = 0.25
_TICKS = 60
"""A case may take; counted in ticks, so that time in which the whole machine stands still is not the case's."""


class Ended(NamedTuple):
    """A case and how it ended."""

    target: str
    seed: int
    number: int
    outcome: Outcome

    @property
    def again(self) -> str:
        """The command that repeats it."""
        return (
            f"PYTHONPATH=tests python -m fuzz --target {self.target} --seed {self.seed} --first {self.number} --cases 1"
        )


class Worker:
    """A context: runs cases one after the other."""

    def __enter__(self) -> Worker:
        self._place = tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._place.cleanup()

    def run(self, cases: Iterable[tuple[str, int, int]]) -> Iterator[Ended]:
        for target, seed, number in cases:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([target, seed, number]) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
            yield Ended(target, seed, number, Outcome(*json.loads(answer)) if answer else self._replace())

    def _answer(self) -> str:
        """A line of the worker; empty where it died or takes too long."""
        out = self._process.stdout
        assert out is not None
        for _ in range(_TICKS):
            if select.select([out], [], [], _TICK_SECONDS)[0]:
                if not (line := out.readline()):
                    self._process.wait(timeout=10)  # its pipes close a moment before its status is there
                return line
        return ""

    def _replace(self) -> Outcome:
        status = self._process.poll()
        self._stop()
        said = Path(self._place.name, "stderr").read_text(errors="replace")[-2_000:]
        self._start()
        how = f"took longer than {_TICKS * _TICK_SECONDS:g} s" if status is None else f"died with status {status}"
        return Outcome("finding", f"the worker {how}\n{said}")

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(dir=self._place.name)
        with open(Path(self._place.name, "stderr"), "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", self._folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._process.wait()
            raise RuntimeError(Path(self._place.name, "stderr").read_text(errors="replace"))

    def _stop(self) -> None:
        self._process.kill()
        self._process.communicate()
