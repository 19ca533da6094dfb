"""One case: written, run, judged."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors.torch import load_file

from dcmerge_ext.comparison.result import Comparison
from dcmerge_ext.errors import DcmergeError, InputError
from fuzz.jobs import SECRET, Job
from fuzz.targets import TARGETS


class Outcome(NamedTuple):
    """How a case ended."""

    kind: str
    """merged | refused (InputError) | failed (another error of the package) | finding"""
    text: str


class Wrong(Exception):
    """A merge or refusal that is not as it must be."""


def run_case(target: str, seed: int, number: int, guard: AbstractContextManager[Any]) -> Outcome:
    """Write the case into the working directory, which is empty; run it inside ``guard``; judge."""
    job = TARGETS[target](Random(f"{seed}/{target}/{number}"))
    before = _tree()
    try:
        outcome = _ended(job, guard)
        after = _tree()
        _check_left(before, after, outcome.kind == "merged")
    except Exception:
        return Outcome("finding", traceback.format_exc(limit=-12))
    return outcome


def _ended(job: Job, guard: AbstractContextManager[Any]) -> Outcome:
    try:
        with guard:
            result = job()
    except DcmergeError as error:
        text = str(error)
        text.encode()  # can be printed anywhere
        if len(text) > 2_000 or not text.isprintable():
            raise Wrong(f"the message is no single line of text: {text[:3000]!r}") from error
        return Outcome("refused" if isinstance(error, InputError) else "failed", text)
    if isinstance(result, Comparison):
        json.loads(result.to_json(), parse_constant=_no_constant)
    else:
        _check_output(result)
    return Outcome("merged", "")


def _check_output(out: Path) -> None:
    """Complete, readable by the library, and finite where something was merged."""
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if SECRET in content or b"root:x:0" in content:
            raise Wrong(f"{path} holds what lies outside the inputs")
    record = json.loads((out / "dcmerge.json").read_text(), parse_constant=_no_constant)
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors.update(load_file(file))
    config = record["config"]
    if config["save_as"] == "full":
        expected = {t["name"] for t in record["tensors"]}
        if tensors.keys() != expected:
            raise Wrong(f"the output holds {sorted(tensors)}, the record {sorted(expected)}")
    else:
        json.loads((out / "adapter_config.json").read_text())
    copied = {t["name"] for t in record["tensors"] if t["action"] == "copy" or not any(t["update_norms"])}
    for name, values in tensors.items():
        if name not in copied and not torch.isfinite(values).all():
            raise Wrong(f"tensor {name!r} of the output is not finite")


def _no_constant(text: str) -> NoReturn:
    raise Wrong(f"{text} is no JSON")


def _tree() -> dict[str, str]:
    """Every path below the working directory with its kind and content."""
    found = {}
    for folder, directories, files in os.walk("."):
        for name in [*directories, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            kind = f"{stat.S_IFMT(status.st_mode):o} {stat.S_IMODE(status.st_mode):o}"
            if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
                with open(path, "rb") as file:
                    kind += hashlib.blake2b(file.read(), digest_size=8).hexdigest()
            found[path] = kind
    return found


def _check_left(before: dict[str, str], after: dict[str, str], merged: bool) -> None:
    """Inputs are as they were; a merge leaves the output alone, a refusal nothing."""
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    tops = {path.split(os.sep)[1] for path in changed}
    if not merged and changed:
        raise Wrong(f"left behind or changed: {sorted(changed)}")
    if merged and not tops <= {"out", "new", "base"}:
        raise Wrong(f"written beside the output: {sorted(changed)}")
    if merged and any(path in before for path in changed):
        raise Wrong(f"inputs changed: {sorted(changed)}")
