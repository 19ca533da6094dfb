"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import host_kernels
import pytest
import torch
from hypothesis import settings

from dcmerge_ext import use_backend
from dcmerge_ext.backends import SOURCES, Source, available

# The same examples in every run: a failure is one that can be repeated.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The matrices here are small: on a busy machine the threads would spend ten times the work waiting for each other.
# What depends on their number sets it.
torch.set_num_threads(1)

# The CUDA kernels, run on the host: a backend like the others, for tests alone.
HOST_KERNELS = Source("cpu", host_kernels.load, lambda: host_kernels.load().description())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=["reference", "cpu", "cuda_host"],
        help="force one backend for every test: reference, cpu, or cuda_host (the CUDA kernels, run on the host)",
    )


@pytest.fixture(autouse=True)
def _forced_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.config.getoption("--backend")
    if name is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "cuda_host", HOST_KERNELS)
        with use_backend(name):
            yield


@pytest.fixture(params=["reference", "cpu", "cuda_host"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend that can run here, forced."""
    monkeypatch.setitem(SOURCES, "cuda_host", HOST_KERNELS)
    if not available(request.param):
        pytest.skip(f"backend {request.param} is not available")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
