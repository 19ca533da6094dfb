"""Errors that arise while one tensor is worked on, with its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dcmerge_ext.errors import ConvergenceError, OptionError, RunError

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""In messages of torch, which has no type of its own for host memory."""


@contextmanager
def of_tensor(name: str) -> Iterator[None]:
    """Work on one tensor.

    Raises:
        OptionError, ConvergenceError: as a method raised it, with the name.   RunError: the memory does not suffice.
    """
    try:
        yield
    except (ConvergenceError, OptionError) as error:
        raise type(error)(f"tensor {name!r}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and not any(text in str(error) for text in _NO_MEMORY):
            raise
        raise RunError(
            f"tensor {name!r}: not enough memory ({str(error) or 'allocation failed'}); free some, or leave this tensor as "
            "it is by an override with action copy"
        ) from error
