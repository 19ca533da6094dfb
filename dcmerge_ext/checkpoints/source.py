"""Where tensors come from: named, described by headers, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dcmerge_ext.errors import InputError


class TensorSpec(NamedTuple):
    """What a header tells of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def text(self) -> str:
        return f"{'x'.join(map(str, self.shape)) or 'scalar'} {str(self.dtype).removeprefix('torch.')}"


class TensorSource(Protocol):
    """One model: names, headers, and tensors on demand."""

    @property
    def label(self) -> str:
        """What messages call it: its path."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> header, without tied duplicates."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names of tensors tied to another name of ``specs`` (same storage); not in ``specs`` themselves."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or those rows of it; may be a view of a mapped file: do not write to it."""
        ...

    def where(self, name: str) -> str:
        """File of a tensor, for messages."""
        ...


class StateDict:
    """A state dict in memory as a source."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self.specs: dict[str, TensorSpec] = {}
        self.aliases: dict[str, str] = {}
        self._tensors = tensors
        self._places: dict[tuple[object, ...], str] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InputError(f"{label}: entry {name!r} is a {type(tensor).__name__}, not a tensor")
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if tensor.numel() and place in self._places:
                self.aliases[name] = self._places[place]
                continue
            self._places[place] = name
            self.specs[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor if rows is None else tensor[rows]

    def where(self, name: str) -> str:
        return self.label
