"""The weight files of an output as one place to write tensors into: laid out from headers, filled in any order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from torch import Tensor

from dcmerge_ext.checkpoints.safetensors_writer import SafetensorsWriter
from dcmerge_ext.checkpoints.source import TensorSpec

Layout = Mapping[str, Mapping[str, TensorSpec]]
"""File name -> its tensors."""


class WeightFiles:
    """Every file of a layout, open for writing. ``create`` as for :class:`SafetensorsWriter`."""

    def __init__(self, directory: Path, layout: Layout, *, create: bool = True) -> None:
        self._writers: dict[str, SafetensorsWriter] = {}
        with ExitStack() as stack:
            for file, specs in layout.items():
                writer = stack.enter_context(SafetensorsWriter(directory / file, specs, create=create))
                self._writers.update(dict.fromkeys(specs, writer))
            self._open = stack.pop_all()

    def write(self, name: str, rows: slice | None, values: Tensor) -> None:
        """Write a tensor, or the rows ``rows`` of it, in order."""
        self._writers[name].write(name, rows, values)

    def written(self, names: Iterable[str]) -> dict[str, str]:
        """Digests of what was written of these tensors."""
        return {name: self._writers[name].written(name) for name in names}

    def holds(self, digests: Mapping[str, str]) -> bool:
        """Whether the files hold these tensors. Reads them."""
        return all(name in self._writers and self._writers[name].stored(name) == d for name, d in digests.items())

    def sync(self) -> None:
        """Bring what was written to the disk."""
        for writer in dict.fromkeys(self._writers.values()):
            writer.sync()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
