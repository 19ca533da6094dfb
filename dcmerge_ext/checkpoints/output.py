"""The output directory: nothing stands under its final name until it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dcmerge_ext.errors import InputError, RunError

RECORD_NAME = "dcmerge.json"


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
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
    if partial.exists() and not overwrite:
        raise InputError(
            f"{partial}: left by a run that was killed, or in use by another; delete it or pass --overwrite"
        )
    if replaced.exists():
        raise InputError(
            f"{replaced}: an earlier output, left by a run that was killed; delete it, or move it back to {out}"
        )
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{out}: no permission to write in {parent}; choose another output directory")


def check_space(out: Path, needed: int) -> None:
    """Raise InputError where the file system has no room for ``needed`` bytes."""
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{out}: needs {needed / 1e6:.0f} MB, the file system has {free / 1e6:.0f} MB free")


@contextmanager
def work_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """``OUT.partial`` to write into; renamed to OUT on success, removed otherwise.

    Raises:
        InputError: the directory cannot be made.   RunError: writing failed (disk full, device gone).
    """
    partial = partial_of(out)
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        if overwrite and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        _remove(partial, made)
        raise InputError(f"{partial}: cannot be made ({error.strerror or error})") from error
    try:
        yield partial
        _replace(partial, out)
    except OSError as error:
        _remove(partial, made)
        raise RunError(
            f"{out}: writing failed ({error.strerror or error}); nothing was left behind. "
            "Free space or choose another place"
        ) from error
    except BaseException:
        _remove(partial, made)
        raise


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


def _remove(partial: Path, made: Sequence[Path]) -> None:
    """Take back the work directory and the parents that were made for it."""
    shutil.rmtree(partial, ignore_errors=True)
    for parent in made:
        with suppress(OSError):
            parent.rmdir()


def partial_of(out: Path) -> Path:
    return out.absolute().with_name(out.absolute().name + ".partial")


def _replaced_of(out: Path) -> Path:
    return out.absolute().with_name(out.absolute().name + ".replaced")


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
