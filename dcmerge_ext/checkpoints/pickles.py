"""What ``weights_only`` does not look at in a pickled state dict: its packing, its names, tensors larger than the file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext.errors import InputError

_RESERVED = "__metadata__"
"""No tensor of a safetensors file can have this name."""


def check_archive(path: Path) -> None:
    """torch stores entries as they are. A packed one may unfold to a thousand times the size of the file.

    Raises:
        InputError: some entry is packed.   zipfile.BadZipFile: damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"{path}: entry {entry.filename!r} is compressed, which torch never does; save it again"
                )


def check_entry(path: Path, size: int, name: Any, tensor: Any) -> None:
    """Raise InputError where an entry is no named tensor that a file of ``size`` bytes can hold as it is."""
    if not isinstance(name, str):
        raise InputError(f"{path}: an entry is named by a {type(name).__name__}, not a text; save model.state_dict()")
    if not isinstance(tensor, Tensor):
        raise InputError(
            f"{path}: entry {name!r} is a {type(tensor).__name__}, not a tensor; save model.state_dict() alone"
        )
    if name == _RESERVED or not _is_text(name):
        raise InputError(f"{path}: a tensor cannot be named {name!r} in a safetensors file; rename it")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = str(tensor.layout if tensor.layout != torch.strided else tensor.device).removeprefix("torch.")
        raise InputError(f"{path}: tensor {name!r} is stored as {kind}; save it as an ordinary tensor")
    if tensor.numel() * tensor.itemsize > size:
        raise InputError(
            f"{path}: tensor {name!r} claims {tensor.numel()} elements, more than the file holds; save a contiguous copy"
        )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
