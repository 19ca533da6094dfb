"""Random directions of the randomized decompositions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dcmerge_ext import ops


@dataclass(frozen=True)
class Start:
    """Where randomness comes from: the seed, the tensor's name and the task, nothing else.

    The same matrix takes the same directions alone or in any batch, on any backend, with any number of threads.
    """

    seed: int = 0
    key: str = ""
    task: int = 0

    def rows(self, count: int, length: int, like: Tensor, stream: int = 0) -> Tensor:
        """(count, length) of +-1 in the dtype and on the device of ``like``; each stream has directions of its own."""
        return ops.rademacher(
            count,
            length,
            seed=self.seed,
            key=self.key,
            task=self.task,
            stream=stream,
            dtype=like.dtype,
            device=like.device,
        )
