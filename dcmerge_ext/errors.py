"""Every error the package raises on purpose. The command line maps them to its exit status."""

from __future__ import annotations

import torch


class DcmergeError(Exception):
    """Base of all errors raised on purpose. Its text is one message for a person."""


class InputError(DcmergeError, ValueError):
    """The inputs or options are wrong; nothing was written (exit status 1)."""


class OptionError(InputError):
    """An unknown method or option, or an option value outside its range."""


class RunError(DcmergeError, RuntimeError):
    """The inputs were right and the run failed: disk full, device lost (exit status 3)."""


class BackendUnavailable(DcmergeError, RuntimeError):
    """A backend was asked for by name and is not available here."""


class ConvergenceError(DcmergeError, torch.linalg.LinAlgError):  # type: ignore[name-defined, misc]
    """A factorization did not converge: the input is not finite, or beyond the range of its dtype."""
