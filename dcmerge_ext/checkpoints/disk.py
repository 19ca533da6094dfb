"""Disks and page cache of this machine, measured in about a second."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

_SAMPLE = 256 << 20
"""Bytes read and written to measure a disk: much more than its own buffers would be better, and take longer."""
_STRETCH = 8 << 20
_PIECE = 4 << 20
_PROBES = 64


def read_rate(paths: Sequence[Path]) -> float:
    """Bytes per second of reading files from their disk, from pieces all over them, evicted from the page cache before.

    Where they lie is drawn anew each time: a disk behind a cache of its own is faster where it was read before.
    """
    sizes = {path: path.stat().st_size for path in paths}
    total, sample = sum(sizes.values()), 0
    buffer, seconds, draw = bytearray(_PIECE), 0.0, random.Random()
    for path, size in sizes.items():
        with open(path, "rb", buffering=0) as file:
            for _ in range(max(1, round(_SAMPLE * size / max(total, 1) / _STRETCH))):
                begin = draw.randrange(max(1, size - _STRETCH))
                os.posix_fadvise(file.fileno(), begin, _STRETCH, os.POSIX_FADV_DONTNEED)
                file.seek(begin)
                started, left = time.perf_counter(), _STRETCH
                while left > 0 and (count := file.readinto(buffer)):
                    left -= count
                seconds += time.perf_counter() - started
                sample += _STRETCH - left
    return sample / seconds


def write_rate(directory: Path) -> float:
    """Bytes per second of writing to the file system of a directory, to the disk; the file has no name."""
    piece = bytes(_PIECE)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(_SAMPLE // _PIECE):
            file.write(piece)
        os.fdatasync(file.fileno())
        return _SAMPLE / (time.perf_counter() - started)


def cached_fraction(paths: Iterable[Path]) -> float:
    """Part of the files' bytes that the page cache holds, from samples."""
    found = total = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for i in range(_PROBES):
                found += _is_cached(file.fileno(), size * i // _PROBES)
                total += 1
    return found / total if total else 0.0


def available_memory() -> int:
    """Bytes that the page cache can take; 0 where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _is_cached(descriptor: int, offset: int) -> bool:
    with suppress(OSError, AttributeError):
        try:
            return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
    return False
