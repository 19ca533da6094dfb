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
import xxhash
from torch import Tensor

from dcmerge_ext.checkpoints.files import SAFETENSORS_DTYPES
from dcmerge_ext.checkpoints.source import TensorSpec
from dcmerge_ext.stages import Work, staged

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_BLOCK_BYTES = 8 << 20


class SafetensorsWriter:
    """One file. Opens by writing the header; every tensor then goes to its own offset, whole or by rows in order.

    Writing the header again changes nothing: a file that an earlier run began keeps its tensors.

    Args:
        create: False where another process has written the header already.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], *, create: bool = True) -> None:
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
        self._digests: dict[str, xxhash.xxh3_128] = {}
        self._file = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            if create:
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
        if first == 0:
            self._digests[name] = xxhash.xxh3_128()
        per_row = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
        data = raw_bytes(values.to(spec.dtype))
        self._digests[name].update(data)
        self._pwrite(data, self._start + self._offsets[name] + first * per_row)

    def written(self, name: str) -> str:
        """xxh3-128 of the bytes that were written of a tensor, in hexadecimal."""
        return self._digests[name].hexdigest()

    def stored(self, name: str) -> str:
        """The same of the bytes that the file holds."""
        digest = xxhash.xxh3_128()
        left, offset = self._specs[name].nbytes, self._start + self._offsets[name]
        while left:
            block = os.pread(self._file, min(left, _BLOCK_BYTES), offset)
            if not block:
                break  # cut short: another digest
            digest.update(block)
            left -= len(block)
            offset += len(block)
        return digest.hexdigest()

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fdatasync(self._file)

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


def raw_bytes(values: Tensor) -> memoryview:
    """The bytes of a CPU tensor, row by row, as a file stores them."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data
