"""Everything that the bytes of an output depend on, to tell whether a run that was stopped may be continued."""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from dcmerge_ext.backends import for_device
from dcmerge_ext.checkpoints.config import MergeConfig
from dcmerge_ext.checkpoints.files import unreadable
from dcmerge_ext.checkpoints.plan import Plan
from dcmerge_ext.checkpoints.record import versions
from dcmerge_ext.checkpoints.source import TensorSource
from dcmerge_ext.checkpoints.tasks import Task
from dcmerge_ext.errors import InputError

_EDGE_BYTES = 64 << 10
"""Read at either end of a file that is not safetensors."""
_SHOWN = 3


def fingerprint(config: MergeConfig, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Settings, versions, machine and input files of a run, as plain JSON values."""
    facts = {
        "settings": config.settings(),
        "versions": versions(),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "backend": type(for_device(device)).__name__,
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
        },
        "inputs": {str(path): _file(path) for path in sorted(_files(config, plan))},
    }
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(facts))
    return plain


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], partial: Path) -> None:
    """Raise InputError where a run is not the one that was begun, with what differs."""
    changes = [text for part in now for text in _changes(part, before.get(part, {}), now[part])]
    if changes:
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise InputError(
            f"{partial}: was begun by another run: {'; '.join(changes[:_SHOWN])}{more}; "
            "put that back to continue it, or start anew with --overwrite instead of --resume"
        )


def refuse_differences(described: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError where processes that merge one model together do not run the same. ``described``: by process.

    Times of files do not count: every machine may have its own copy of the inputs.
    """
    first, *others = ({**d, "inputs": {k: {**v, "modified_ns": 0} for k, v in d["inputs"].items()}} for d in described)
    for rank, other in enumerate(others, 1):
        changes = [text for part in first for text in _changes(part, first[part], other[part])]
        if changes:
            raise InputError(
                f"process {rank} does not run the same as process 0: {'; '.join(changes[:_SHOWN])}; "
                "give all processes the same files, versions and threads (OMP_NUM_THREADS)"
            )


def _changes(part: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if part != "inputs":
            yield f"{key} was {old!r} and is {new!r}"
        elif old is None or new is None:
            yield f"{key} was {'not ' if old is None else ''}read then and is {'not ' if new is None else ''}now"
        else:
            what = "size" if old["size"] != new["size"] else "header" if old["header"] != new["header"] else "time"
            yield f"{key} has changed since ({what} {old[_KEYS[what]]}, now {new[_KEYS[what]]})"


_KEYS = {"size": "size", "header": "header", "time": "modified_ns"}


def _files(config: MergeConfig, plan: Plan) -> set[Path]:
    """Every file that the run reads, but for vocabularies and the like, which are copied whole at its end."""
    sources: list[TensorSource | Task] = [plan.base, *plan.tasks]
    found = {Path(source.where(t.name)) for t in plan.tensors for source in sources}
    for source in sources:
        found.update(Path(source.label).glob("*.json"))
    found.update(Path(text).expanduser() for text in _texts([config.options, [o.options for o in config.overrides]]))
    return {path for path in found if path.is_file()}


def _texts(value: Any) -> Iterator[str]:
    """Strings inside options: such as files of activations."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _file(path: Path) -> dict[str, Any]:
    try:
        state = path.stat()
        return {"size": state.st_size, "modified_ns": state.st_mtime_ns, "header": _header(path, state.st_size)}
    except OSError as error:
        raise unreadable(path, error) from error


def _header(path: Path, size: int) -> str:
    """Digest of a safetensors header; of both ends of any other file."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", file.read(8))
            return xxhash.xxh3_128_hexdigest(file.read(length))
        digest = xxhash.xxh3_128(file.read(_EDGE_BYTES))
        file.seek(max(size - _EDGE_BYTES, 0))
        digest.update(file.read(_EDGE_BYTES))
        return digest.hexdigest()
