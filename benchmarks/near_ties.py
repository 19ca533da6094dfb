"""Answers of methods that decide entry by entry, judged by the float64 answer that decides near ties as they did.

As in :mod:`oracle`: an entry within round-off of its threshold may fall either way, and moves far when it does. Here one
or two decisions per entry may be inverted, near ones alone; the choice nearest to the answer counts, and how many
entries it was not float64's own for. A wrong decision that is not near stays in the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

INPUT_MARGIN = 1e-5
"""Relative distance from a threshold within which a decision is near, where inputs or their products B A decide."""


class Decided(NamedTuple):
    """A float64 answer, and which of its entries hang on a near decision."""

    expected: Tensor
    """Of any shape, N entries."""
    near: Tensor
    """(D, N) bool: which of the D decisions of an entry are near."""
    values: Callable[[Tensor, Tensor], Tensor]
    """Entries (E,) and which of their decisions to invert (D, E) -> their values (E,)."""


def settled(answer: Tensor, truth: Decided, bound: float) -> tuple[Tensor, int]:
    """The expected answer with near ties decided as in ``answer``, and the number of entries that float64 decides otherwise.

    Entries that miss by less than ``bound`` of the root mean square are left as they are: a decision that moves an entry
    so little cannot be told from round-off, and need not be.
    """
    expected, found = truth.expected.flatten().clone(), answer.flatten().double()
    noise = bound * float(expected.square().mean().sqrt())
    entries = (truth.near.any(0) & ((found - expected).abs() > noise)).nonzero().flatten()
    near, own = truth.near[:, entries], expected[entries]
    best = own
    for inverted in _inversions(near):
        other = truth.values(entries, inverted)
        best = torch.where((other - found[entries]).abs() < (best - found[entries]).abs(), other, best)
    expected[entries] = best
    return expected.view_as(truth.expected), int((best != own).sum())


def _inversions(near: Tensor) -> Iterator[Tensor]:
    """Every choice of one or two of the near decisions (D, E)."""
    for size in (1, 2):
        for chosen in combinations(range(len(near)), size):
            inverted = torch.zeros_like(near)
            inverted[list(chosen)] = near[list(chosen)].all(0)
            if inverted.any():
                yield inverted
