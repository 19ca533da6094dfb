"""torch's own decompositions replaced by ours for the length of a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dcmerge_ext.linalg.svd import SMALL, Factors, as_torch, is_faster, is_ours, needs_gradient, svd, svd_lowrank
from dcmerge_ext.svd.truncated import truncated_svd

_torch_svd: Callable[..., Factors] = torch.linalg.svd
_torch_svd_lowrank: Callable[..., Factors] = torch.svd_lowrank


@dataclass(frozen=True)
class _Settings:
    rank: int | None


class _Here(threading.local):
    settings: _Settings | None = None
    """Of the innermost block that this thread is in."""


_here = _Here()
_lock = threading.Lock()
_blocks = 0
"""Entered and not left, in all threads."""


@contextmanager
def accelerate(
    *, rank: int | None = None, null_vectors: Literal["orthonormal", "zero"] = "orthonormal"
) -> Iterator[None]:
    """Let ``torch.linalg.svd`` and ``torch.svd_lowrank`` run through this package inside a ``with`` block.

    Code that calls them by these names speeds up unchanged; references taken before (``from torch.linalg import svd``)
    and other threads do not. By default the results are those of torch up to round-off, signs and null directions: all
    min(m, n) orthonormal vectors (:func:`~dcmerge_ext.linalg.svd`). What is not decomposed faster here is left to torch.

    Args:
        rank: for code that uses the leading components alone: matrices of larger min(m, n) give ``rank`` exact ones, and
            zeros behind them in results of torch's shapes. Nothing but those zeros tells that there was more.
        null_vectors: "zero" says that you know it; ``rank`` needs it.
    Raises:
        ValueError: rank below 1, or without null_vectors="zero", or the reverse.
    """
    if null_vectors not in ("orthonormal", "zero"):
        raise ValueError(f"accelerate: null_vectors must be 'orthonormal' or 'zero', got {null_vectors!r}")
    if (rank is None) != (null_vectors == "orthonormal"):
        raise ValueError('accelerate: rank and null_vectors="zero" go together: vectors beyond the rank are zero')
    if rank is not None and rank < 1:
        raise ValueError(f"accelerate: rank must be 1 or more, got {rank}")
    before = _here.settings
    _enter()
    _here.settings = _Settings(rank)
    try:
        yield
    finally:
        _here.settings = before
        _leave()


def _enter() -> None:
    global _blocks
    with _lock:
        if _blocks == 0:
            torch.linalg.svd, torch.svd_lowrank = _svd, _svd_lowrank
        _blocks += 1


def _leave() -> None:
    global _blocks
    with _lock:
        _blocks -= 1
        if _blocks == 0:
            torch.linalg.svd, torch.svd_lowrank = _torch_svd, _torch_svd_lowrank


@contextmanager
def _paused() -> Iterator[None]:
    """What runs inside calls torch's own functions by their names."""
    settings, _here.settings = _here.settings, None
    try:
        yield
    finally:
        _here.settings = settings


def _svd(A: Tensor, full_matrices: bool = True, *, driver: str | None = None, out: Any = None) -> Factors:
    if torch.compiler.is_compiling() or _here.settings is None:
        return _torch_svd(A, full_matrices, driver=driver, out=out)
    rank = _here.settings.rank
    apart = not is_ours(A) or needs_gradient(A) or driver is not None or out is not None
    with _paused():
        if rank is None or apart or rank >= min(A.shape[-2:]):
            ours = not apart and (is_faster(A, full_matrices) or A.dtype.itemsize < 4)  # torch refuses half precision
            return svd(A, full_matrices) if ours else _torch_svd(A, full_matrices, driver=driver, out=out)
        U, S, Vh = truncated_svd(A, rank)
    m, n = A.shape[-2:]
    q = min(m, n)
    pad: Callable[..., Tensor] = torch.nn.functional.pad
    return as_torch(
        (
            pad(U, (0, (m if full_matrices else q) - rank)),
            pad(S, (0, q - rank)),
            pad(Vh, (0, 0, 0, (n if full_matrices else q) - rank)),
        )
    )


def _svd_lowrank(A: Tensor, q: int | None = 6, niter: int | None = 2, M: Tensor | None = None) -> Factors:
    if torch.compiler.is_compiling() or _here.settings is None or A.numel() < SMALL:
        return _torch_svd_lowrank(A, q, niter, M)
    with _paused():
        return svd_lowrank(A, q, 2 if niter is None else niter, M)
