"""Memory that runs out, as an error with a name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dcmerge_ext.errors import RunError

_SAID = ("can't allocate memory", "not enough memory", "out of memory")
"""torch has no type of its own for host memory."""


@contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Work on one tensor.

    Raises:
        RunError: the memory does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RunError) or not (
            isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in _SAID)
        ):
            raise
        raise RunError(
            f"tensor {name!r}: not enough memory ({str(error) or 'allocation failed'}); free some, or leave this tensor as "
            "it is by an override with action copy"
        ) from error
