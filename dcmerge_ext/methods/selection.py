"""Thresholds over a whole model: one order statistic of the magnitudes per task, found without holding any model.

The k-th largest magnitude of all entries that a survey shows, exactly, by counting digits of the magnitudes' bits, leading
first: two passes over float32, four over float64. Used by methods of ``scope = "model"`` that trim whole task vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcmerge_ext import ops


@dataclass
class Selection:
    """One pass of the radix selection of one threshold per task. A :class:`~dcmerge_ext.methods.base.SurveyState`."""

    dtype: torch.dtype
    _digits: list[tuple[int, int]]  # (shift, width) still to be counted, leading first
    _histograms: list[Tensor]
    _prefixes: list[int]
    _ranks: list[int] | None  # 1-based rank from the top inside the current prefix; None until the total is known

    @classmethod
    def begin(cls, num_tasks: int, dtype: torch.dtype) -> Selection:
        digits = _digits(dtype)
        return cls(dtype, digits, _histograms(num_tasks, digits[0][1]), [0] * num_tasks, None)

    @staticmethod
    def num_passes(dtype: torch.dtype) -> int:
        return len(_digits(dtype))

    def add(self, task: int, values: Tensor) -> None:
        """Count the entries of a tensor of any shape."""
        shift, width = self._digits[0]
        ops.magnitude_histogram(
            values.to(self.dtype), self._histograms[task], shift=shift, width=width, prefix=self._prefixes[task]
        )

    def add_zeros(self, task: int, count: int) -> None:
        """Count entries known to be zero: digit 0 of prefix 0."""
        if self._prefixes[task] == 0:
            self._histograms[task][0] += count

    def fork(self) -> Selection:
        return replace(self, _histograms=[torch.zeros_like(h) for h in self._histograms])

    def join(self, share: Selection) -> None:
        for own, other in zip(self._histograms, share._histograms, strict=True):
            own += other

    def finish(self, kept: Callable[[int], int]) -> Selection | Tensor:
        """The next pass, or after the last one the thresholds (T,).

        Args:
            kept: number of entries of a task -> k, from 1 to that number: the threshold is the k-th largest magnitude.
        """
        ranks = self._ranks
        if ranks is None:
            totals = [int(h.sum()) for h in self._histograms]
            ranks = [min(total, kept(total)) for total in totals]
        width = self._digits[0][1]
        found = [_locate(h, rank) for h, rank in zip(self._histograms, ranks, strict=True)]
        prefixes = [(p << width) | digit for p, (digit, _) in zip(self._prefixes, found, strict=True)]
        if len(self._digits) == 1:
            bits = torch.tensor(prefixes, dtype=torch.int32 if self.dtype == torch.float32 else torch.int64)
            return bits.view(self.dtype)
        digits = self._digits[1:]
        return Selection(self.dtype, digits, _histograms(len(found), digits[0][1]), prefixes, [r for _, r in found])


def _digits(dtype: torch.dtype) -> list[tuple[int, int]]:
    return [(15, 16), (0, 15)] if dtype == torch.float32 else [(47, 16), (31, 16), (15, 16), (0, 15)]


def _histograms(num_tasks: int, width: int) -> list[Tensor]:
    return [torch.zeros(1 << width, dtype=torch.int64) for _ in range(num_tasks)]


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Bin that holds the rank-th largest, and its rank inside that bin."""
    if rank == 0:  # no entries at all
        return 0, 0
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, rank))
    above = int(from_top[index - 1]) if index else 0
    return len(histogram) - 1 - index, rank - above
