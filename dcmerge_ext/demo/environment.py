"""What the demo needs around it: optional packages, an output folder of its own, quiet libraries, repeatable runs."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dcmerge_ext.errors import InputError

_PACKAGES = {"sklearn": "scikit-learn", "transformers": "transformers", "peft": "peft", "matplotlib": "matplotlib"}
_OWN_FILES = ("base", "full", "lora", "merged", "results.json", "demo.png")


def require_packages() -> None:
    """Raise InputError where a package of the extra ``demo`` is missing."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}; install with: pip install 'dcmerge-ext[demo]'")


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Make the output folder; of an earlier demo in it, only the demo's own files are removed.

    Raises:
        InputError: it is not empty and may not be overwritten, or cannot be made.
    """
    try:
        occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if occupied and not overwrite:
            raise InputError(f"{out}: exists already and is not empty; choose another --out or pass --overwrite")
        if occupied and not (out / "results.json").is_file():
            raise InputError(f"{out}: is not an earlier demo (no results.json); --overwrite refuses it")
        remove_own_files(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made or emptied ({error.strerror or error})") from error


def remove_own_files(out: Path) -> None:
    """Remove what a demo writes, and the folder itself if nothing else is in it."""
    for name in _OWN_FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, notes or warnings of transformers and PEFT; their settings come back afterwards."""
    import transformers

    logging: Any = transformers.utils.logging  # untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def repeatable() -> Iterator[None]:
    """One thread, and a global random state of its own; both come back afterwards.

    The model is too small to gain from more threads, suffers where cores are busy, and ends alike for any number of
    cores this way. The libraries draw initial weights from torch's global generator.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
