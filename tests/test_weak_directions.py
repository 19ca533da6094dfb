"""Square concatenations (T r = n) whose smallest singular value is genuine, yet below what float32 tells from zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext.calibration.grams import Grams
from dcmerge_ext.linalg.polar import default_tolerance, polar_decided, polar_with_values
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.dc_merge import DCMerge
from dcmerge_ext.methods.esm import Esm
from dcmerge_ext.methods.iso_c import IsoC
from dcmerge_ext.methods.iso_cts import IsoCTS
from dcmerge_ext.methods.score import Score
from dcmerge_ext.methods.tsv_m import TsvM
from dcmerge_ext.updates import Updates

EPS = torch.finfo(torch.float32).eps
N, TASKS, RANK = 48, 4, 12


def nearly_dependent(distance: float, seed: int) -> list[Tensor]:
    """(TASKS, N, RANK) orthonormal bases, the last column of the last one about ``distance`` off the span of all others."""
    bases = [torch.linalg.qr(cases.normal(N, RANK, seed=seed + i))[0] for i in range(TASKS)]
    others = torch.cat([*bases[:-1], bases[-1][:, :-1]], 1)
    normal = torch.linalg.qr(others, mode="complete")[0][:, -1]
    column = bases[-1][:, -1] - (bases[-1][:, -1] @ normal) * normal
    column -= bases[-1][:, :-1] @ (bases[-1][:, :-1].T @ column)
    bases[-1][:, -1] = torch.nn.functional.normalize(column / column.norm() + distance * normal, dim=0)
    return bases


def updates_with(left: list[Tensor], seed: int) -> list[Tensor]:
    """Float32 updates with these left singular vectors before a tail that truncation removes."""
    found = []
    for i, U in enumerate(left):
        rest = torch.linalg.qr(U, mode="complete")[0][:, RANK:]
        right = torch.linalg.qr(cases.normal(N, N, seed=seed + 50 + i))[0]
        spectrum = torch.cat([torch.linspace(2, 1, RANK), torch.linspace(0.2, 0.1, N - RANK)]).double()
        found.append((torch.cat([U, rest], 1) * spectrum @ right.T).float())
    return found


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("method", [TsvM(), DCMerge(), Score(), IsoCTS(gamma=0.0)], ids=lambda m: m.name)
def test_a_genuine_direction_is_kept(method: Method, seed: int, transposed: bool) -> None:
    updates = updates_with(nearly_dependent(8e-6, seed), seed)
    if transposed:
        updates = [update.T for update in updates]
    basis = torch.cat([torch.linalg.svd(u.T if transposed else u)[0][:, :RANK] for u in updates], 1)
    _, _, values = polar_with_values(basis)
    assert values[-1] == 0, "not a case for which float32 is too coarse"
    found, facts = merged(method, updates)
    expected, _ = merged(method, [update.double() for update in updates])
    assert facts["cover_u"]["dropped"] == facts["cover_v"]["dropped"] == 0
    smallest = min(facts["cover_u"]["smallest_kept"], facts["cover_v"]["smallest_kept"])
    assert EPS < smallest < 2e-5
    assert cases.error(found, expected) < 1e-3


@pytest.mark.parametrize("method", [TsvM(), IsoCTS(gamma=0.0)], ids=lambda m: m.name)
def test_one_matrix_of_a_batch(method: Method) -> None:
    weak = updates_with(nearly_dependent(8e-6, 1), 1)
    plain = [cases.normal(N, N, seed=70 + i).float() for i in range(TASKS)]
    found, _ = merged(method, [torch.stack(pair) for pair in zip(plain, weak, strict=True)])
    for i, alone in enumerate((plain, weak)):
        assert cases.error(found[i], merged(method, alone)[0]) < 1e-3


def test_iso_c_keeps_a_weak_direction_of_the_sum() -> None:
    X = cases.with_spectrum(N, N, [*torch.linspace(2, 1, N - 1).tolist(), 8e-7], seed=5).float()
    assert 0 in polar_with_values(X)[2]
    found, facts = merged(IsoC(), [X])
    U, S, Vh = torch.linalg.svd(X.double())
    assert facts["rank"] == N
    assert cases.error(found, S.mean() * U @ Vh) < 1e-5


def test_iso_c_drops_what_rounding_left_of_a_rank_deficient_sum() -> None:
    X = (cases.normal(N, 7, seed=5) @ cases.normal(7, N, seed=6)).float()
    found, facts = merged(IsoC(), [X])
    assert facts["rank"] == 7
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == 7


def test_esm_keeps_a_weak_direction() -> None:
    updates = updates_with(nearly_dependent(8e-6, 1), 1)
    identity = torch.eye(N, dtype=torch.float64)
    method = Esm(activations=(Grams.of({"w": identity}),) * TASKS)
    found, facts = merged(method, updates)
    expected, _ = merged(method, [update.double() for update in updates])
    assert "fallback" not in facts
    assert facts["cover_u"]["dropped"] == facts["cover_v"]["dropped"] == 0
    assert cases.error(found, expected) < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_esm_keeps_directions_of_columns_and_components_of_little_weight(seed: int) -> None:
    falling = torch.logspace(0, -2, N, dtype=torch.float64)
    updates = [(cases.with_spectrum(N, N, falling.tolist(), seed=seed + 9 * i) * falling).float() for i in range(TASKS)]
    inputs = [cases.normal(64, N, seed=seed + 9 * i) for i in range(TASKS)]
    method = Esm(activations=tuple(Grams.of({"w": X.T @ X}) for X in inputs))
    found, facts = merged(method, updates)
    expected, _ = merged(method, [update.double() for update in updates])
    assert facts["cover_u"]["dropped"] == facts["cover_v"]["dropped"] == 0
    assert cases.error(found, expected) < 1e-3


@pytest.mark.parametrize("method", [TsvM(rank=6), DCMerge(rank=6), IsoCTS(gamma=0.0)], ids=lambda m: m.name)
@pytest.mark.parametrize("side", [0, 1])
def test_a_factor_that_tasks_share_is_dropped(method: Method, side: int) -> None:
    shared = cases.normal(6, N, seed=9)
    updates = [(cases.normal(N, 6, seed=10 + i) @ shared).float() for i in range(TASKS)]
    if side == 0:
        updates = [update.T.contiguous() for update in updates]
    found, facts = merged(method, updates)
    assert facts[("cover_u", "cover_v")[side]]["dropped"] == 6 * (TASKS - 1)
    span = torch.linalg.qr(shared.T)[0]
    outside = (found if side else found.T).double() @ (torch.eye(N, dtype=torch.float64) - span @ span.T)
    assert outside.norm() < 1e-5 * found.norm()


def test_a_tolerance_that_is_given_decides_alone() -> None:
    updates = updates_with(nearly_dependent(8e-6, 1), 1)
    _, facts = merged(TsvM(basis_tol=default_tolerance(N, N, torch.float32)), updates)
    assert facts["cover_u"]["dropped"] == 1


@pytest.mark.parametrize("live", [4, 5])
def test_float64_is_asked_where_more_than_null_columns_are_lost(live: int) -> None:
    X = cases.normal(9, 5, seed=3).float()
    X[:, 4] = 0
    calls: list[Callable[[], Tensor]] = []

    def wide() -> Tensor:
        calls.append(wide)
        return X.double()

    _, _, values = polar_decided(X, None, wide, live=torch.tensor(live))
    assert len(calls) == live - 4
    assert (values > 0).sum() == 4


def merged(method: Method, updates: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    context = Context(len(updates), "w")
    found = method.merge(Updates.of(updates), context)
    assert isinstance(found, Tensor)
    return found, context.facts
