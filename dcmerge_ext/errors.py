"""Every error the package raises on purpose. The command line maps them to its exit status."""

from __future__ import annotations

import torch

_LONGEST = 1_500
"""Characters of a message."""


class DcmergeError(Exception):
    """Base of all errors raised on purpose. Its text is one message for a person: one line, printable anywhere."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


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


def _one_line(message: str) -> str:
    """Names and values in a message come from files: no control characters, no lone surrogates, not without end."""
    text = _shortened(message)
    if text.isprintable():
        return text
    text = " ".join(text.splitlines())
    return _shortened("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
