"""Which implementation of :mod:`dcmerge_ext.ops` runs: a list with names, chosen per tensor device.

``cpu`` is the native C++ core, ``cuda`` the CUDA kernels, ``reference`` the same operations in plain torch (any device).
Automatic choice takes the native core of the tensor's device; a choice by name succeeds or raises, never something else.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dcmerge_ext import _native, reference
from dcmerge_ext._cuda_backend import CudaBackend
from dcmerge_ext.errors import BackendUnavailable

ENVIRONMENT = "DCMERGE_BACKEND"
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("dcmerge_backend", default=None)
_warned: set[str] = set()


class Backend(Protocol):
    """What each implementation offers: the operations of :mod:`dcmerge_ext.ops`, after validation, and a few that other
    modules validate. Tensors are contiguous, float32 or float64, on one device."""

    prefers_products: bool
    """Whether matrix products are far faster than factorizations where it runs."""

    def kth_magnitude(self, x: Tensor, counts: Tensor) -> Tensor: ...
    def magnitude_histogram(self, x: Tensor, out: Tensor, shift: int, width: int, prefix: int) -> None: ...
    def elect(
        self, stack: Tensor, thresholds: Tensor | None, blocks: Sequence[int] | None, zero_sum: int, mean: bool
    ) -> Tensor: ...
    def project(
        self, left: Tensor, right: Tensor, s: Tensor, ranks: Sequence[int], counts: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def rademacher(
        self, rows: int, cols: int, key: int, task: int, stream: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor: ...
    def drop(self, values: Tensor, rate: float, key: int, task: int, stream: int, offset: int) -> Tensor: ...
    def orthonormalize(self, rows: Tensor, worst_pivot: float) -> Tensor | None: ...
    def gram(self, x: Tensor) -> Tensor: ...  # strides of any kind
    def gram_apply(self, x: Tensor, a: Tensor, image: Tensor) -> Tensor: ...
    def svd(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def newton_schulz(self, X: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor: ...
    def smooth_energy(self, S: Tensor, kind: str, parameter: float) -> Tensor: ...


class Source(NamedTuple):
    """Where a backend comes from."""

    device: str | None
    """Type of the devices whose tensors it takes; None: any."""
    load: Callable[[], Backend]
    """Raises BackendUnavailable with the reason where it cannot run here."""
    describe: Callable[[], str]
    """Of one that can."""


def _load_cpu() -> Backend:
    if not _native.loaded():
        raise BackendUnavailable(_native.why_not())
    return cast(Backend, _native)


@functools.cache
def _cuda() -> CudaBackend | str:
    """The CUDA kernels, or why they cannot run."""
    try:
        import dcmerge_ext._cuda as kernels
    except ImportError as error:
        return f"this build has no CUDA kernels ({error}); build from source with DCMERGE_CUDA=ON where nvcc is"
    backend = CudaBackend(kernels)
    try:
        backend.description()
    except RuntimeError as error:
        return str(error)
    return backend


def _load_cuda() -> CudaBackend:
    found = _cuda()
    if isinstance(found, str):
        raise BackendUnavailable(found)
    return found


SOURCES: dict[str, Source] = {
    "reference": Source(None, lambda: cast(Backend, reference), lambda: f"plain torch {torch.__version__}, any device"),
    "cpu": Source("cpu", _load_cpu, _native.description),
    "cuda": Source("cuda", _load_cuda, lambda: _load_cuda().description()),
}


def backends() -> dict[str, str]:
    """Name -> what it is, or ``unavailable: why`` for those that cannot run here."""
    listing = {}
    for name, source in SOURCES.items():
        try:
            source.load()
        except BackendUnavailable as error:
            listing[name] = f"unavailable: {error}"
        else:
            listing[name] = f"available: {source.describe()}"
    return listing


def available(name: str) -> bool:
    """Whether the backend can run here. Raises BackendUnavailable for a name that does not exist."""
    try:
        _source(name).load()
    except BackendUnavailable:
        if name not in SOURCES:
            raise
        return False
    return True


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside the block (this thread and context only).

    Around a call of a function compiled by ``torch.compile`` it holds as for any other; inside such a function it
    breaks the graph, which ``fullgraph=True`` refuses.

    Raises:
        BackendUnavailable: on entry, when the backend does not exist or cannot run here, with the reason.
    """
    _require(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def for_device(device: torch.device) -> Backend:
    """The backend that runs on tensors of ``device``."""
    forced = _chosen.get() or os.environ.get(ENVIRONMENT)
    if forced:
        backend, takes = _require(forced), SOURCES[forced].device
        if takes is not None and device.type != takes:
            raise BackendUnavailable(
                f"backend {forced!r} was chosen and the tensor lies on {device}; move it or choose another"
            )
        return backend
    native = SOURCES.get(device.type)
    if native is None:
        _warn_once(device.type, f"no native kernels for {device.type} tensors; plain torch runs there")
        return SOURCES["reference"].load()
    try:
        return native.load()
    except BackendUnavailable as error:
        _warn_once(
            device.type,
            f"the native {device.type} kernels are not available ({error}); plain torch runs instead, slower",
        )
        return SOURCES["reference"].load()


def prefers_products(x: Tensor) -> bool:
    """Whether matrix products are far faster than factorizations where ``x`` lies: on anything but a CPU."""
    return not x.is_cpu or for_device(x.device).prefers_products


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise BackendUnavailable(f"backend {name!r} does not exist; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def _require(name: str) -> Backend:
    source = _source(name)
    try:
        return source.load()
    except BackendUnavailable as error:
        raise BackendUnavailable(f"backend {name!r} is unavailable: {error}") from None


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"dcmerge_ext: {message}", RuntimeWarning, stacklevel=5)
