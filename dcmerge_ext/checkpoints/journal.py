"""What a run has finished, one line a tensor, so that a run that is stopped at any instant can be continued.

A journal is a file of JSON lines in the work directory, one journal for each process. Its first line says what was run;
every other line claims a tensor, and is written after that tensor's bytes have reached the disk. A last line that is torn
claims nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from dcmerge_ext.checkpoints.execute import TensorResult
from dcmerge_ext.checkpoints.output import JOURNALS, sync_directory

_COMMIT_SECONDS = 1.0
"""Work that a power failure may cost, in seconds of computing."""
_COMMIT_BYTES = 256 << 20
"""The same in bytes written; thousands of small tensors share one wait for the disk."""


class Entry(msgspec.Struct, frozen=True):
    """One finished tensor."""

    result: TensorResult
    stored: dict[str, str]
    """Name in the output -> xxh3-128 of its bytes there, in hexadecimal."""
    warnings: list[str] = []
    """What was warned of since the entry before."""

    @property
    def name(self) -> str:
        return self.result.name


@dataclass(frozen=True)
class Earlier:
    """What the journals of a work directory say."""

    run: dict[str, Any]
    entries: dict[str, Entry]


class Journal:
    """The journal of this process, for appending from any thread.

    Args:
        run: describes the run; the first line of a new journal.
        sync: brings what was written of tensors to the disk.
    """

    def __init__(self, directory: Path, run: dict[str, Any], sync: Callable[[], None], process: int = 0) -> None:
        self._sync = sync
        self._pending: list[Entry] = []
        self._seconds, self._bytes = 0.0, 0
        self._torn = False
        # re-entrant: an interrupt inside one must not keep the closing commit out
        self._adding, self._committing = threading.RLock(), threading.RLock()
        path = directory / JOURNALS.replace("*", f"{process:05d}")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            whole = path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._file, whole)
            if not whole:
                self._write(msgspec.json.encode(run))
                sync_directory(directory)
                sync_directory(directory.parent)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, entry: Entry, nbytes: int) -> None:
        """Note a tensor of ``nbytes`` as finished. Entries reach the disk in the order in which they were noted."""
        with self._adding:
            self._pending.append(entry)
            self._seconds += entry.result.seconds
            self._bytes += nbytes

    def commit_if_due(self) -> None:
        """Commit once enough work depends on it; not while another thread does, which would wait for the disk twice."""
        due = self._seconds >= _COMMIT_SECONDS or self._bytes >= _COMMIT_BYTES
        if due and self._committing.acquire(blocking=False):
            try:
                self._commit()
            finally:
                self._committing.release()

    def commit(self) -> None:
        """Bring everything that was noted to the disk, and before it the bytes that it claims."""
        with self._committing:
            self._commit()

    def _commit(self) -> None:
        with self._adding:
            entries, self._pending = self._pending, []
            self._seconds, self._bytes = 0.0, 0
        if entries:
            self._sync()
            self._write(*map(msgspec.json.encode, entries))

    def _write(self, *lines: bytes) -> None:
        left = memoryview(b"\n" * self._torn + b"".join(line + b"\n" for line in lines))
        self._torn = True  # until all of it stands: an interrupt may come between
        while left:
            left = left[os.write(self._file, left) :]
        self._torn = False
        os.fdatasync(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.commit()
            else:
                with suppress(OSError):  # what cannot be noted is merged again
                    self.commit()
        finally:
            os.close(self._file)


def read_journals(directory: Path) -> Earlier | None:
    """What the journals of a directory say together; None where there is nothing to continue."""
    found = [_read(path) for path in sorted(directory.glob(JOURNALS))]
    runs = [earlier for earlier in found if earlier is not None]
    if not runs:
        return None
    return Earlier(runs[0].run, {name: entry for earlier in runs for name, entry in earlier.entries.items()})


def has_finished(directory: Path) -> bool:
    """Whether a work directory holds a finished tensor."""
    earlier = read_journals(directory)
    return earlier is not None and bool(earlier.entries)


def _read(path: Path) -> Earlier | None:
    lines = path.read_bytes().split(b"\n")[:-1]
    if not lines:
        return None
    entries = {}
    for line in lines[1:]:
        with suppress(msgspec.DecodeError):  # torn where an interrupt cut a line short
            entry = msgspec.json.decode(line, type=Entry)
            entries[entry.name] = entry
    run: dict[str, Any] = msgspec.json.decode(lines[0])
    return Earlier(run, entries)
