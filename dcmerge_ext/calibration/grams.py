"""Gram matrices by the names of a checkpoint's tensors: in memory, or in a safetensors file and read one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dcmerge_ext.checkpoints.files import SafetensorsFile, unreadable
from dcmerge_ext.checkpoints.output import new_file
from dcmerge_ext.errors import InputError, RunError
from dcmerge_ext.updates import count_nonfinite

TRANSPOSED = ".mT"
"""Ends the key of a layer whose weight is stored as (in, out), as GPT-2's Conv1D stores it."""


class Grams(msgspec.Struct, frozen=True, eq=False, dict=True, forbid_unknown_fields=True):
    """Gram matrices of one task in memory, as an option of a method takes them: ``activations=[Grams.of(...), ...]``.

    A run record shows the label alone.
    """

    label: str = "memory"

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], label: str = "memory") -> Grams:
        """What :func:`~dcmerge_ext.calibration.collect_grams` returns, as an option."""
        grams = cls(label)
        vars(grams)["tensors"] = dict(tensors)
        return grams

    def tensor(self, key: str) -> Tensor | None:
        found: Tensor | None = vars(self).get("tensors", {}).get(key)
        return found


@dataclass(frozen=True)
class Gram:
    """X'X of the inputs X (tokens x in) of one layer, not yet read."""

    where: str
    """For messages."""
    shape: tuple[int, ...]
    transposed: bool
    """The layer's weight is stored as (in, out)."""
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """The matrix in float64.

        Raises:
            InputError: NaN or Inf.
        """
        matrix = self.load().double()
        if bad := count_nonfinite(matrix):
            raise InputError(f"{self.where} holds {bad} NaN or Inf values; calibrate that model again")
        return matrix


def open_grams(source: str | Grams) -> SafetensorsFile | Grams:
    """A file that ``source`` names, its header read; Gram matrices in memory as they are.

    Raises:
        InputError: no such file, or not a safetensors file.
    """
    if isinstance(source, Grams):
        return source
    path = Path(source).expanduser()
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return _open(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _open(path: Path, modified: int, size: int) -> SafetensorsFile:
    """Kept open from tensor to tensor; a file that was written anew is another one."""
    return SafetensorsFile(path)


def find_gram(source: str | Grams, name: str) -> Gram | None:
    """The Gram matrix for the weight ``name``, or None where ``source`` has none.

    Raises:
        InputError: the file cannot be read, or holds something that is no square floating matrix.
    """
    found = open_grams(source)
    for key, transposed in ((name, False), (name + TRANSPOSED, True)):
        load: Callable[[], Tensor]
        if isinstance(found, Grams):
            tensor = found.tensor(key)
            if tensor is None:
                continue
            shape, dtype, load = tuple(tensor.shape), tensor.dtype, functools.partial(torch.detach, tensor)
        elif key in found.specs:
            shape, dtype = found.specs[key]
            load = functools.partial(found.read, key)
        else:
            continue
        where = f"Gram matrix {key!r} of {found.label}"
        if len(shape) < 2 or shape[-1] != shape[-2] or not dtype.is_floating_point:
            size = "x".join(map(str, shape)) or "scalar"
            raise InputError(
                f"{where} is {size} {str(dtype).removeprefix('torch.')}, not a square floating matrix; "
                "give a file written by `dcmerge calibrate`"
            )
        return Gram(where, shape, transposed, load)
    return None


def save_grams(grams: Mapping[str, Tensor], path: str | Path, *, overwrite: bool = False) -> None:
    """Write Gram matrices to a safetensors file; nothing stands under its name until it is complete.

    Raises:
        InputError: the file exists already.   RunError: writing failed.
    """
    try:
        with new_file(path, overwrite) as partial:
            save_file({key: matrix.contiguous() for key, matrix in grams.items()}, partial, metadata={"format": "pt"})
    except SafetensorError as error:
        raise RunError(f"{path}: writing failed ({error}); free space or choose another place") from error
