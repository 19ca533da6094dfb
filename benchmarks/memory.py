"""Peak memory and time of one merge in a process of its own.

Memory is anonymous memory (RssAnon), sampled every 5 ms while the merge runs, above the same process after a bare
``import torch``; pages of mapped input files belong to the page cache and are not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

_INTERVAL = 0.005


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_bytes: int
    """Above a bare ``import torch``."""


def fresh_merge_checkpoints(**arguments: Any) -> Measured:
    """``merge_checkpoints(**arguments)`` in a new process; paths as strings."""
    return _in_fresh_process("checkpoints", arguments)


def fresh_dc_merge(updates: Path, options: dict[str, Any]) -> Measured:
    """``dc_merge`` in a new process, of the updates that :func:`save_updates` left in a file, which is mapped."""
    return _in_fresh_process("matrix", {"updates": str(updates), "options": options})


def save_updates(updates: Sequence[Any], path: Path) -> None:
    """Tensors as they are, LowRank as pairs of factors."""
    torch.save([u if isinstance(u, torch.Tensor) else (u.left, u.right) for u in updates], path)


def _in_fresh_process(kind: str, arguments: dict[str, Any]) -> Measured:
    command = [sys.executable, __file__, json.dumps([kind, arguments])]
    return Measured(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


# --- in the new process ------------------------------------------------------------------------------------------------


def _checkpoints(**arguments: Any) -> Callable[[], object]:
    from dcmerge_ext import merge_checkpoints

    return lambda: merge_checkpoints(**arguments)


def _matrix(updates: str, options: dict[str, Any]) -> Callable[[], object]:
    from dcmerge_ext import LowRank
    from dcmerge_ext.methods import dc_merge

    stored = torch.load(updates, mmap=True)
    loaded = [x if isinstance(x, torch.Tensor) else LowRank(*x) for x in stored]
    return lambda: dc_merge(loaded, **options)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: needs Linux")


def _measure(prepare: Callable[[], Callable[[], object]]) -> Measured:
    bare = peak = _anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(_INTERVAL):
            peak = max(peak, _anonymous_bytes())

    call = prepare()
    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    return Measured(seconds, peak - bare)


def _main(kind: str, arguments: dict[str, Any]) -> None:
    prepare = partial(_checkpoints if kind == "checkpoints" else _matrix, **arguments)
    sys.stdout.write(json.dumps(asdict(_measure(prepare))))


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
