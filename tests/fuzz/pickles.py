"""Pickles as somebody else may give them: code in place of tensors, tensors that claim more than there is, damage."""

from __future__ import annotations

import functools
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from fuzz import mutate


class _Call:
    """Pickles as a call of a function: what unpickling without care would run."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class _Storage:
    """A storage, as torch's own files refer to it."""

    def __init__(self, kind: Any, key: Any, place: Any, count: Any) -> None:
        self.reference = ("storage", kind, key, place, count)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None


def hostile_pickle(random: Random, tensors: Mapping[str, Tensor]) -> bytes:
    kind = random.random()
    if kind < 0.15:
        return mutate.mutate_bytes(random, _plain(True))
    if kind < 0.3:
        return mutate.mutate_bytes(random, _plain(False))
    content: Any = _odd_content(random, dict(tensors))
    if kind < 0.35:
        return pickle.dumps(_Call(os.system, "touch code_ran"), protocol=random.choice([2, 4]))
    if kind < 0.45:
        return _saved(content, random.random() < 0.5)
    return _archive(random, _dumped(_odd_tensors(random, content)))


@functools.cache
def _plain(zipped: bool) -> bytes:
    from fuzz.inputs import tuned  # here: its cost is once per process

    return _saved(tuned(0), zipped)


def _saved(content: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _dumped(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def _odd_content(random: Random, tensors: dict[Any, Any]) -> Any:
    """A state dict with entries that are no tensors, keys that are no names, tensors of unusual kinds."""
    name = random.choice(list(tensors))
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    shared = torch.zeros(4, 3)
    entries: list[Any] = [
        _Call(os.system, "touch code_ran"), _Call(subprocess.Popen, ["touch", "code_ran"]), _Call(eval, "open('code_ran','w')"),
        _Call(exec, "open('code_ran','w')"), _Call(open, "code_ran", "w"), _Call(bytearray, 2**40),
        _Call(torch.zeros, 2**40), 1, None, [], {}, "text", nested, torch.zeros(2, 3).to_sparse(), torch.zeros(4, 3, device="meta"),
        torch.zeros(4, 3, dtype=torch.complex64), torch.nn.Parameter(torch.zeros(4, 3)), torch.zeros(1).expand(4, 3),
        torch.zeros(1).expand(1_000_000, 1_000_000), torch.quantize_per_tensor(torch.zeros(4, 3), 0.1, 0, torch.qint8), shared.mT,
        torch.zeros(4, 3).to_sparse_csr(), torch.zeros(4, 3, dtype=torch.float8_e4m3fn), torch.zeros((0, 2**40)), shared[::2], torch.Size([3]),
    ]  # fmt: skip
    # not: a key of deeply shared tuples, which no unpickler hashes in finite time
    keys: list[Any] = [
        0, None, b"bytes", "__metadata__", "\ud800", "", "a\0b", "two\nlines", True, 1.5, "x" * 5_000, "../../x", "é", ("a", "b"), name,
    ]  # fmt: skip
    kind = random.randrange(6)
    if kind < 3:
        tensors[name] = random.choice(entries)
    elif kind < 5:
        tensors[random.choice(keys)] = tensors.pop(name) if random.random() < 0.5 else shared
    else:
        return random.choice(
            [
                tensors,
                [tensors],
                (tensors,),
                {"state_dict": tensors},
                OrderedDict(tensors),
                random.choice(entries),
                {},
                None,
            ]
        )
    return tensors


def _odd_tensors(random: Random, content: Any) -> Any:
    """Tensors whose sizes, strides or storages are not what the file holds."""
    if not isinstance(content, dict):
        return content
    sizes = [
        (4, 3),
        (2**40,),
        (2**20, 2**20),
        (2**62, 4),
        (-1, 3),
        (0, 2**62),
        (),
        (2**40, 0),
        ("a",),
        (1.5,),
        (True, 12),
    ]
    strides = [(3, 1), (0, 0), (0,), (2**40, 1), (-1, 1), (2**62, 2**62), (), ("a",)]
    kinds = [
        torch.FloatStorage,
        torch.FloatStorage,
        torch.LongStorage,
        torch.BoolStorage,
        torch.HalfStorage,
        torch.UntypedStorage,
    ]
    made: dict[Any, Any] = {}
    for i, key in enumerate(content):
        value = content[key]
        if not isinstance(value, Tensor):
            made[key] = value
            continue
        storage = _Storage(
            random.choice(kinds) if random.random() < 0.1 else torch.FloatStorage,
            random.choice(["0", "7", "../0", "", 0, "data.pkl"]) if random.random() < 0.1 else "0",
            random.choice(["cpu", "cuda:0", "meta", "nowhere", 5]) if random.random() < 0.1 else "cpu",
            random.choice([12, 15, 2**40, -1, 2**62, "x"]) if random.random() < 0.1 else 15,
        )
        odd = i == 0 or random.random() < 0.2
        made[key] = _Call(
            torch._utils._rebuild_tensor_v2,
            storage,
            random.choice([0, 0, 1, 14, 2**40, -1]) if odd else 0,
            random.choice(sizes) if odd else (4, 3),
            random.choice(strides) if odd else (3, 1),
            random.choice([False, True, 5]) if odd else False,
            OrderedDict() if not odd or random.random() < 0.9 else random.choice([{}, None, {"a": 1}]),
        )
    return made


def _archive(random: Random, data: bytes) -> bytes:
    """A torch archive around a pickle: entries changed, left out, twice, or packed a thousandfold."""
    if random.random() < 0.3:
        data = mutate.mutate_bytes(random, data)
    entries = {"data.pkl": data, "version": b"3\n", "byteorder": b"little", "data/0": bytes(range(60))}
    if random.random() < 0.15:
        entries[random.choice(list(entries))] = random.choice([b"", b"big", b"-1", b"99\n", bytes(1000)])
    if random.random() < 0.1:
        del entries[random.choice(list(entries))]
    packed = random.random() < 0.2
    if packed and random.random() < 0.3:
        entries["data/0" if random.random() < 0.5 else "data.pkl"] = _zeros()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    found = buffer.getvalue()
    return mutate.mutate_bytes(random, found) if random.random() < 0.1 else found


@functools.cache
def _zeros() -> bytes:
    return bytes(100 << 20)
