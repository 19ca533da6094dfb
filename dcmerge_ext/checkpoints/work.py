"""The tensors of a run: those that an earlier run has finished are taken as they are, the others merged and noted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcmerge_ext.checkpoints.execute import Advance, Executor, TensorResult
from dcmerge_ext.checkpoints.journal import Entry, Journal
from dcmerge_ext.checkpoints.plan import TensorPlan
from dcmerge_ext.checkpoints.record import gathered_warnings
from dcmerge_ext.checkpoints.weight_files import Layout, WeightFiles

logger = logging.getLogger(__name__)

Merge = Callable[[TensorPlan, WeightFiles], TensorResult]
"""Merges a tensor and writes it."""


@dataclass
class Work:
    """Fills the weight files of ``directory``, and knows what was done.

    Without ``run`` no journal is kept.
    """

    directory: Path
    run: dict[str, Any] | None = None
    """Describes the run, for the journal."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """What is finished, by tensor; to begin with, what an earlier run claims."""
    advance: Advance = lambda nbytes: None

    @property
    def warnings(self) -> list[str]:
        """What was warned of while the tensors were merged, each message once."""
        return sorted({message for entry in self.entries.values() for message in entry.warnings})

    @property
    def digests(self) -> dict[str, str]:
        """xxh3-128 of every tensor of the output, by its name there."""
        return {name: digest for entry in self.entries.values() for name, digest in entry.stored.items()}

    def fill(
        self,
        executor: Executor,
        tensors: Sequence[TensorPlan],
        layout: Layout,
        names: Mapping[str, Sequence[str]],
        merge: Merge,
    ) -> list[TensorResult]:
        """Merge what is not finished.

        Args:
            names: tensor -> its names in the output, where they are others.
        Returns:
            What happened to each tensor, in their order.
        """
        with WeightFiles(self.directory, layout) as files:
            self._check(tensors, files)
            unfinished = [t for t in tensors if t.name not in self.entries]
            with self._journal(files) as journal, gathered_warnings() as warned:
                told, noting = 0, threading.Lock()

                def work(tensor: TensorPlan) -> TensorResult:
                    nonlocal told
                    result = merge(tensor, files)
                    digests = files.written(names.get(tensor.name, [tensor.name]))
                    with noting:  # a warning stands in the journal no later than the tensor it is about
                        said = list(warned)
                        entry = Entry(result, digests, said[told:])
                        told = len(said)
                        self.entries[tensor.name] = entry
                        if journal is not None:
                            journal.append(entry, tensor.base.nbytes)
                    if journal is not None:
                        journal.commit_if_due()
                    return result

                executor.run(unfinished, work)
        return [self.entries[t.name].result for t in tensors]

    def _check(self, tensors: Sequence[TensorPlan], files: WeightFiles) -> None:
        """Forget claims that the files do not bear out: the disk may have lost what it had confirmed."""
        for tensor in tensors:
            entry = self.entries.get(tensor.name)
            if entry is None:
                continue
            if files.holds(entry.stored):
                self.advance(tensor.base.nbytes)
                continue
            logger.warning("%s: tensor %r is damaged; it is merged again", self.directory, tensor.name)
            del self.entries[tensor.name]

    @contextmanager
    def _journal(self, files: WeightFiles) -> Iterator[Journal | None]:
        if self.run is None:
            yield None
            return
        with Journal(self.directory, self.run, files.sync) as journal:
            yield journal
