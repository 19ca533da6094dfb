"""What this machine does at best, in a second: what a stage's time is held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

_SIDE = 2048
_COPIED = 64 << 20
_FILE = 64 << 20
_REPEATS = 3


class Rates(msgspec.Struct, frozen=True):
    """Best of a few measurements."""

    product: float
    """Flop per second of a float32 matrix product, on all of torch's threads."""
    copy: float
    """Bytes read plus bytes written per second, copying a tensor larger than the caches, on all threads."""
    read: float
    """Bytes per second of one thread from a file that was just written: from the page cache, not from the disk."""
    write: float
    """Bytes per second of one thread into a file: into the page cache where there is room."""

    def best(self, other: Rates) -> Rates:
        """The higher one of each."""
        return Rates(*map(max, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))


def measure_rates(device: torch.device, directory: Path) -> Rates:
    """The rates of ``device``, and of files in ``directory``, which holds 64 MiB meanwhile.

    Raises:
        OSError: the directory cannot be written.
    """
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    product = torch.empty_like(matrix)
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    write, read = _file_seconds(directory / "rates.bin")
    return Rates(
        product=2.0 * _SIDE**3 / _best(lambda: torch.mm(matrix, matrix, out=product), device),
        copy=2.0 * _COPIED / _best(lambda: target.copy_(source), device),
        read=_FILE / read,
        write=_FILE / write,
    )


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Fewest seconds: a rate to be compared with must not be understated. The first call warms up."""
    seconds = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _file_seconds(path: Path) -> tuple[float, float]:
    """Fewest seconds to write a new file in one piece, and to read it in pieces that stay in cache."""
    data, piece = memoryview(os.urandom(1 << 20) * (_FILE >> 20)), bytearray(1 << 20)
    written, read = [], []
    for _ in range(_REPEATS):
        path.unlink(missing_ok=True)
        with path.open("wb", buffering=0) as file:
            started = time.perf_counter()
            left = data
            while left:
                left = left[file.write(left) :]
            written.append(time.perf_counter() - started)
        with path.open("rb", buffering=0) as file:
            started = time.perf_counter()
            while file.readinto(piece):
                pass
            read.append(time.perf_counter() - started)
    path.unlink()
    return min(written), min(read)
