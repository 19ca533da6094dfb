"""The tensors of a run: those that are finished are taken as they are, the others dealt out, merged and noted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcmerge_ext.checkpoints.deal import deal
from dcmerge_ext.checkpoints.execute import Advance, Executor, TensorResult
from dcmerge_ext.checkpoints.journal import Entry, Journal
from dcmerge_ext.checkpoints.plan import TensorPlan
from dcmerge_ext.checkpoints.record import gathered_warnings
from dcmerge_ext.checkpoints.weight_files import Layout, WeightFiles
from dcmerge_ext.distributed import Processes

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
    processes: Processes = field(default_factory=Processes)

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
        with self._files(layout) as files:
            self._forget_damaged(tensors, files)
            unfinished = [t for t in tensors if t.name not in self.entries]
            mine = {t.name for t in deal(unfinished, self.processes.size)[self.processes.rank]}
            with self._journal(files) as journal, gathered_warnings() as warned:
                told, noting = 0, threading.Lock()

                def work(tensor: TensorPlan) -> TensorResult:
                    nonlocal told
                    self.processes.check()
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

                for method in dict.fromkeys(t.method for t in unfinished if t.action == "merge"):
                    executor.survey(method)  # all processes together, whatever tensors they have
                executor.run([t for t in unfinished if t.name in mine], work)
        self._share(mine, warned)
        return [self.entries[t.name].result for t in tensors]

    @contextmanager
    def _files(self, layout: Layout) -> Iterator[WeightFiles]:
        """Made by the first process, then opened by the others."""
        if not self.processes.first:
            self.processes.meet()
        with WeightFiles(self.directory, layout, create=self.processes.first) as files:
            if self.processes.first:
                self.processes.meet()
            yield files

    def _share(self, mine: Collection[str], warned: Collection[str]) -> None:
        """Learn what the other processes did; the first one says what they warned of."""
        for entries in self.processes.gather({name: self.entries[name] for name in mine}):
            self.entries.update(entries)
        if self.processes.size > 1 and self.processes.first:
            for message in self.warnings:
                if message not in warned:
                    logger.warning("%s", message)

    def _forget_damaged(self, tensors: Sequence[TensorPlan], files: WeightFiles) -> None:
        """Drop claims that the files do not bear out: a disk may lose what it had confirmed."""
        claimed = [t for t in tensors if t.name in self.entries]
        damaged = []
        for tensor in claimed[self.processes.rank :: self.processes.size]:
            if files.holds(self.entries[tensor.name].stored):
                self.advance(tensor.base.nbytes)
            else:
                damaged.append(tensor.name)
        for name in (name for names in self.processes.gather(damaged) for name in names):
            logger.warning("%s: tensor %r is damaged; it is merged again", self.directory, name)
            del self.entries[name]

    @contextmanager
    def _journal(self, files: WeightFiles) -> Iterator[Journal | None]:
        if self.run is None:
            yield None
            return
        with Journal(self.directory, self.run, files.sync, self.processes.rank) as journal:
            yield journal
