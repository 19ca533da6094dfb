"""A process that runs cases, one line each, with memory, file size and what it may open bounded."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

MEMORY_BYTES = 700 << 20
"""A case may map above what an idle worker has."""
FILE_BYTES = 32 << 20

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
_NEVER = (
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.system",
    "os.fork",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
)


class Trespass(BaseException):
    """A case did what no input may make the package do. Not an Exception: nothing may swallow it."""


class Guard:
    """An audit hook: inside its block changes outside ``folder``, programs and connections are refused and remembered."""

    def __init__(self, folder: Path) -> None:
        self._place = os.path.realpath(folder)
        self.folder = ""
        self.seen: list[str] = []

    def __enter__(self) -> None:
        self.folder, self.seen = self._place, []

    def __exit__(self, *_: object) -> None:
        self.folder = ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in _NEVER:
            self._refuse(f"{event} {arguments!r:.300}")
        elif event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & _WRITES or (isinstance(mode, str) and set(mode) & set("wax+"))
            if isinstance(path, (str, bytes)):
                self._check(event, os.fsdecode(path), bool(writes))
        elif event in _CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
                if isinstance(path, (str, bytes, os.PathLike)) and event != "os.symlink":
                    self._check(event, os.fsdecode(path), True)

    def _check(self, event: str, path: str, writes: bool) -> None:
        if not writes and os.path.islink(path):
            return  # followed wherever it leads; what must not happen is that its content is given on
        place = os.path.realpath(path)
        inside = place.startswith(self.folder + "/") or place == self.folder
        if (writes and not inside and place != "/dev/null") or place.startswith(
            (self.folder + "/outside/", "/etc/passwd")
        ):
            self._refuse(f"{event} {path!r}")

    def _refuse(self, what: str) -> None:
        self.seen.append(what)
        folder, self.folder = self.folder, ""
        try:
            raise Trespass(what)
        finally:
            self.folder = folder


def main() -> None:
    place = Path(sys.argv[1])
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else reaches the answers
    import torch

    from dcmerge_ext.checkpoints import patterns
    from fuzz import case, inputs

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("dcmerge_ext").addHandler(logging.NullHandler())
    logging.getLogger("dcmerge_ext").propagate = False
    tempfile.tempdir = str(place)
    inputs.family()
    folder = place / "case"
    guard = Guard(folder)
    patterns._SECONDS = 0.05  # time enough to see that the limit is kept
    for target in case.TARGETS:  # what is imported late is imported now, outside the limits
        for number in range(3):
            _in_folder(folder, lambda t=target, n=number: case.run_case(t, 0, n, nullcontext()))
    sys.addaudithook(guard)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    answers.write("ready\n")
    for line in sys.stdin:
        target, seed, number = json.loads(line)
        outcome = _in_folder(folder, lambda t=target, s=seed, n=number: case.run_case(t, s, n, guard))
        if guard.seen:
            outcome = ("finding", f"trespass: {'; '.join(guard.seen)}\n{outcome}")
        answers.write(json.dumps(outcome) + "\n")


def _in_folder(folder: Path, work: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Run a case in an empty directory of its own."""
    folder.mkdir()
    os.chdir(folder)
    try:
        return work()
    except BaseException as error:
        return "finding", f"{type(error).__name__}: {error}"
    finally:
        os.chdir("/")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
