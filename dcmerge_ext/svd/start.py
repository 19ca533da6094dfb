"""Random directions of the randomized decompositions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dcmerge_ext import ops


@dataclass(frozen=True)
class Start:
    """Where randomness comes from: the seed and the tensor's name, nothing else.

    The same matrix takes the same directions alone or in any batch, on any backend, with any number of threads; and for
    every task, so that copies of a task decompose to the same bytes and add nothing to a basis but round-off.
    """

    seed: int = 0
    key: str = ""

    def rows(self, count: int, length: int, like: Tensor, stream: int = 0) -> Tensor:
        """(count, length) of +-1 in the dtype and on the device of ``like``; each stream has directions of its own."""
        return ops.rademacher(
            count,
            length,
            seed=self.seed,
            key=self.key,
            stream=stream,
            dtype=like.dtype,
            device=like.device,
        )
