"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from dcmerge_ext import use_backend
from dcmerge_ext.backends import available

# The same examples in every run: a failure is one that can be repeated.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The matrices here are small: on a busy machine the threads would spend ten times the work waiting for each other.
# What depends on their number sets it.
torch.set_num_threads(1)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run here, forced."""
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
