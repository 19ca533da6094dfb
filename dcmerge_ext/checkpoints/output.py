"""The output directory: nothing stands under its final name until it is complete."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from dcmerge_ext.distributed import Processes
from dcmerge_ext.errors import InputError, RunError

logger = logging.getLogger(__name__)

RECORD_NAME = "dcmerge.json"
JOURNALS = "journal-*.jsonl"
"""What :mod:`~dcmerge_ext.checkpoints.journal` keeps in the work directory; never part of an output."""

_SEEN_WITHIN_SECONDS = 60.0
"""A network file system may remember for so long that a name is not there."""

Existing = Literal["refuse", "replace", "continue"]
"""What to do with a work directory that is there already."""


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool, resume: bool = False) -> None:
    """Raise InputError where the output directory may not be written."""
    resolved = out.resolve()
    if not resolved.name:
        raise InputError(f"{out}: is no place for an output directory")
    partial, replaced = partial_of(out), _replaced_of(out)
    for path in inputs:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            raise InputError(f"{out}: is, or holds, the input {path}; choose another output directory")
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise InputError(f"{out}: exists already; choose another output directory or pass --overwrite")
        if out.is_symlink():
            raise InputError(f"{out}: is a link; --overwrite replaces directories only")
        if not (out.is_dir() and ((out / RECORD_NAME).exists() or not any(out.iterdir()))):
            raise InputError(f"{out}: is not the output of an earlier merge (no {RECORD_NAME}); --overwrite refuses it")
    if partial.exists() and not (overwrite or resume):
        raise InputError(
            f"{partial}: left by a run that was stopped, or in use by another; continue it with --resume, "
            "or start anew with --overwrite"
        )
    if replaced.exists() and not (resume and not out.exists()):
        raise InputError(
            f"{replaced}: an earlier output, left by a run that was killed; delete it, or move it back to {out}"
        )
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{out}: no permission to write in {parent}; choose another output directory")


def check_space(out: Path, needed: int) -> None:
    """Raise InputError where the file system has no room for ``needed`` bytes, less what OUT.partial holds of them."""
    parent = next(p for p in out.absolute().parents if p.exists())
    needed -= sum(path.stat().st_blocks * 512 for path in partial_of(out).rglob("*"))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{out}: needs {needed / 1e6:.0f} MB, the file system has {free / 1e6:.0f} MB free")


@contextmanager
def work_directory(
    out: Path, existing: Existing, keep: Callable[[Path], bool] = lambda partial: False
) -> Iterator[Path]:
    """``OUT.partial`` to write into; on success brought to the disk and renamed to OUT.

    After wrong input it is removed; after any other failure too, unless ``keep`` finds work in it to continue.

    Raises:
        InputError: the directory cannot be made.   RunError: writing failed (disk full, device gone).
    """
    partial, replaced = partial_of(out), _replaced_of(out)
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        if replaced.exists() and not out.exists():
            replaced.rename(out)  # stopped while the new output took the earlier one's place
        if existing == "replace" and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=existing == "continue")
    except OSError as error:
        _remove(partial if existing != "continue" else None, made)
        raise InputError(f"{partial}: cannot be made ({error.strerror or error})") from error
    try:
        yield partial
        _sync(partial)
        for journal in partial.glob(JOURNALS):
            journal.unlink()
        sync_directory(partial)
        _replace(partial, out)
        sync_directory(out.absolute().parent)
    except InputError:
        _remove(partial, made)
        raise
    except BaseException as error:
        kept = keep(partial)
        if not kept:
            _remove(partial, made)
        left = f"what is finished stays in {partial}; continue with --resume" if kept else "nothing was left behind"
        if isinstance(error, OSError):
            advice = " once this is mended" if kept else ". Free space or choose another place"
            raise RunError(f"{out}: writing failed ({error.strerror or error}); {left}{advice}") from error
        if isinstance(error, KeyboardInterrupt):
            error.args = (left,)
        elif kept:
            logger.warning("%s", left)
        raise


def check_shared(partial: Path, processes: Processes) -> None:
    """Raise InputError in every process where some do not see the work directory that the first one made."""
    if processes.size == 1:
        return
    token = partial / f"shared-{processes.gather(uuid4().hex)[0]}"
    if processes.first:
        token.touch()
    processes.meet()
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    machines = processes.gather(None if seen else socket.gethostname())
    if processes.first:
        token.unlink()
    for rank, machine in enumerate(machines):
        if machine is not None:
            raise InputError(
                f"{partial}: process {rank} on {machine} does not see what process 0 writes there; "
                "--out must lie on a file system that all machines share, by the same path"
            )


@contextmanager
def new_file(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """``PATH.partial`` to write into; renamed to PATH on success, removed otherwise.

    Raises:
        InputError: PATH may not be written.   RunError: writing failed.
    """
    path = Path(path).expanduser()
    check_file(path, overwrite)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path}: writing failed ({error}); free space or choose another place") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_file(path: Path, overwrite: bool) -> None:
    """Raise InputError where a file may not be written."""
    if path.is_dir() or not path.name:
        raise InputError(f"{path}: is a directory; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; choose another file or pass --overwrite")


def _remove(partial: Path | None, made: Sequence[Path]) -> None:
    """Take back the work directory and the parents that were made for it."""
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    for parent in made:
        with suppress(OSError):
            parent.rmdir()


def partial_of(out: Path) -> Path:
    return out.absolute().with_name(out.absolute().name + ".partial")


def _replaced_of(out: Path) -> Path:
    return out.absolute().with_name(out.absolute().name + ".replaced")


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(directory)


def _sync(directory: Path) -> None:
    """Bring every file of a directory to the disk."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = _replaced_of(out)
    out.rename(old)  # the earlier output survives until the new one stands
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
