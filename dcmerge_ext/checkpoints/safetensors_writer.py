"""Streaming safetensors output: the layout is computed from headers, tensors are written in place as they finish.

The safetensors library writes a file from tensors that are all in memory; a shard may be gigabytes. The format is an
8-byte length, a JSON header and the data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dcmerge_ext.checkpoints.files import SAFETENSORS_DTYPES
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.stages import Work, staged

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class SafetensorsWriter:
    """One file. Opens by writing the header; every tensor then goes to its own offset, whole or by rows."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._specs = specs
        self._offsets: dict[str, int] = {}
        end = 0
        # widest elements first, as the library does: every tensor is then aligned to its element size
        for name in sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n)):
            spec = specs[name]
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.nbytes],
            }
            self._offsets[name] = end
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._pwrite(struct.pack("<Q", len(text)) + text, 0)
            os.ftruncate(self._file, self._start + end)
        except BaseException:
            os.close(self._file)
            raise

    @staged("write", lambda self, name, rows, values: Work(bytes=values.numel() * self._specs[name].dtype.itemsize))
    def write(self, name: str, rows: slice | None, values: Tensor) -> None:
        """Write a tensor, or the rows ``rows`` of it."""
        spec = self._specs[name]
        first = rows.start if rows is not None else 0
        per_row = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
        values = values.to(spec.dtype).contiguous()
        data = values.reshape(-1).view(torch.uint8).numpy().data
        self._pwrite(data, self._start + self._offsets[name] + first * per_row)

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._file, left, offset)
            left = left[written:]
            offset += written

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
