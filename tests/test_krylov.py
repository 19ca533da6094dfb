"""The exact routes to a truncated SVD, each forced: what the Krylov method certifies is right, whatever the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcmerge_ext import Components, truncated_svd, use_backend
from dcmerge_ext.backends import available
from dcmerge_ext.svd import Evidence, Start, cost, decompose
from dcmerge_ext.svd.dense import gram, lapack
from dcmerge_ext.svd.krylov import NotCertified, krylov

EPS = 2.0**-23
BLOCK = 8
SHAPES = [(160, 160), (240, 160), (160, 240)]

Route = Callable[[Tensor, int], tuple[Components, Evidence]]


def first_dimension(rank: int, q: int) -> int:
    return min(q, BLOCK * math.ceil(2.25 * rank / BLOCK + 8.9))


def by_krylov(
    A: Tensor, rank: int, *, start: Start | None = None, tol: float | None = None, limit: int | None = None
) -> tuple[Components, Evidence]:
    """The Krylov route as large matrices take it, here with room up to the whole space."""
    q = min(A.shape)
    limit = limit or q
    dimension = min(limit, first_dimension(rank, q))
    return krylov(A, rank, start or Start(), block=BLOCK, dimension=dimension, limit=limit, tol=tol)


ROUTES: dict[str, Route] = {"krylov": by_krylov, "gram": gram, "lapack": lapack}


@pytest.fixture
def krylov_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions try the Krylov route, whatever the size."""

    def plan(m: int, n: int, rank: int) -> cost.Plan:
        q = min(m, n)
        dimension = first_dimension(rank, q)
        return cost.Plan("krylov", 0.0, BLOCK, dimension, max(dimension, int(0.9 * q)))

    monkeypatch.setattr(cost, "plan", plan)


# 160 singular values each
SPREAD = 1 - 0.2 * torch.arange(12, dtype=torch.float64) / 12
SPECTRA = {
    "j^-0.1": cases.power_law(160, 0.1),
    "j^-0.5": cases.power_law(160, 0.5),
    "j^-1": cases.power_law(160, 1.0),
    "0.9^j": 0.9 ** torch.arange(160, dtype=torch.float64),
    "two clusters": torch.cat([SPREAD, 0.1 * cases.power_law(148, 0.2)]),
    "an outlier": torch.cat([torch.tensor([30.0]), cases.power_law(159, 0.5)]),
}


def product(c: Components) -> Tensor:
    return c.U.double() * c.S.double() @ c.Vh.double()


def projector(columns: Tensor) -> Tensor:
    return columns.double() @ columns.double().T


def check_triplets(A: Tensor, found: Components, rank: int) -> None:
    """What holds on every matrix, ties and null components included: errors are measured against sigma_1."""
    m, n = A.shape
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((m, rank), (rank,), (rank, n))
    assert {x.dtype for x in found} == {torch.float32}
    exact = torch.linalg.svdvals(A.double())[:rank]
    U, S, Vh = (x.double() for x in found)
    largest, live = exact[0].item() or 1.0, S > 0
    torch.testing.assert_close(S[live], exact[live], rtol=0, atol=4 * EPS * largest)
    assert (S.diff() <= 0).all()
    assert (exact[~live] <= 2 * max(m, n) ** 0.5 * EPS * largest).all()
    assert (U[:, ~live] == 0).all()
    assert (Vh[~live] == 0).all()
    torch.testing.assert_close(U.T @ U, torch.diag(live.double()), rtol=0, atol=1e-5)
    torch.testing.assert_close(Vh @ Vh.T, torch.diag(live.double()), rtol=0, atol=1e-5)
    assert torch.linalg.matrix_norm(A.double() @ Vh.T - U * S, 2) <= 16 * EPS * largest
    assert torch.linalg.matrix_norm(A.double().T @ U - Vh.T * S, 2) <= 16 * EPS * largest


def check_subspaces(A: Tensor, found: Components, rank: int) -> None:
    """Projectors and the truncated product are as near to the truth as float32 LAPACK comes, within a factor of 2."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    usual = lapack(A, rank)[0]
    of_left, of_right = projector(U[:, :rank]), projector(Vh[:rank].T)
    truncated = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert cases.error(projector(found.U), of_left) <= 2 * cases.error(projector(usual.U), of_left) + 4 * EPS
    assert cases.error(projector(found.Vh.T), of_right) <= 2 * cases.error(projector(usual.Vh.T), of_right) + 4 * EPS
    assert cases.error(product(found), truncated) <= 2 * cases.error(product(usual), truncated) + 4 * EPS


class TestEveryRoute:
    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(("m", "n"), SHAPES)
    @pytest.mark.parametrize("spectrum", SPECTRA)
    @pytest.mark.parametrize("rank", [1, 12, 20])
    def test_is_as_near_to_the_truth_as_lapack(self, route: str, m: int, n: int, spectrum: str, rank: int) -> None:
        A = cases.with_spectrum(m, n, SPECTRA[spectrum], seed=rank).float()
        found, evidence = ROUTES[route](A, rank)
        assert evidence.route == route
        assert not evidence.tie
        check_triplets(A, found, rank)
        check_subspaces(A, found, rank)

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (2, 3), (7, 7), (9, 20), (20, 9)])
    def test_matrices_smaller_than_a_block(self, route: str, m: int, n: int) -> None:
        A = cases.normal(m, n, seed=m, dtype=torch.float32)
        for rank in range(1, min(m, n) + 1):
            check_triplets(A, ROUTES[route](A, rank)[0], rank)

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(("m", "n"), SHAPES)
    def test_a_zero_matrix_has_only_null_components(self, route: str, m: int, n: int) -> None:
        found, evidence = ROUTES[route](torch.zeros(m, n), 20)
        assert all((x == 0).all() for x in found)
        assert not evidence.tie
        assert not evidence.residual

    @pytest.mark.parametrize("route", ROUTES)
    def test_a_diagonal_matrix(self, route: str) -> None:
        A = torch.diag(cases.power_law(160, 0.5)).float()[torch.randperm(160, generator=torch.Generator().manual_seed(1))]
        found, _ = ROUTES[route](A, 20)
        check_triplets(A, found, 20)
        check_subspaces(A, found, 20)

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("layout", ["transposed", "every second row", "every second column", "reversed", "batch"])
    def test_strided_views(self, route: str, layout: str) -> None:
        base = cases.with_spectrum(320, 320, cases.power_law(320, 0.5), seed=3).float()
        A = {
            "transposed": base[:160, :200].T,
            "every second row": base[::2, :200],
            "every second column": base[:200, ::2],
            "reversed": base[:160].flip(0)[:, 100:].mT,
            "batch": base.reshape(2, 160, 320).transpose(0, 1)[:, 1],
        }[layout]
        for view, plain in zip(ROUTES[route](A, 8)[0], ROUTES[route](A.contiguous(), 8)[0], strict=True):
            assert cases.error(view[None], plain[None]) < 1e-4  # signs included: the same computation
        check_triplets(A, ROUTES[route](A, 8)[0], 8)

    @pytest.mark.parametrize("route", ROUTES)
    def test_one_entry_far_above_the_rest(self, route: str) -> None:
        A = cases.with_spectrum(160, 160, cases.power_law(160, 0.5), seed=4).float()
        A[17, 33] = 20
        found, _ = ROUTES[route](A, 12)
        check_triplets(A, found, 12)
        check_subspaces(A, found, 12)

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("copies", [2, 5, 8])
    def test_a_repeated_singular_value_is_found_as_often_as_it_occurs(self, route: str, copies: int) -> None:
        spectrum = cases.power_law(160, 0.5).repeat_interleave(copies)[:160]
        A = cases.with_spectrum(200, 160, spectrum, seed=copies).float()
        rank = 2 * copies
        found, evidence = ROUTES[route](A, rank)
        assert not evidence.tie
        check_triplets(A, found, rank)
        check_subspaces(A, found, rank)

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("rank", [2, 3, 5, 6])
    def test_a_tie_at_the_cut_is_reported(self, route: str, rank: int) -> None:
        spectrum = torch.cat([torch.tensor([2.0, 1, 1, 1, 1, 1]), 0.5 * cases.power_law(154, 0.5)])
        A = cases.with_spectrum(200, 160, spectrum, seed=6).float()
        found, evidence = ROUTES[route](A, rank)
        assert evidence.tie == (rank < 6)
        check_triplets(A, found, rank)
        # any of the equally good truncations leaves the same distance
        assert (A.double() - product(found)).norm().item() == pytest.approx(spectrum[rank:].norm().item(), rel=1e-6)

    def test_a_component_too_weak_for_float32_is_a_null_component_on_every_route(self) -> None:
        A = cases.with_spectrum(200, 160, [1, 0.5, 1e-9], seed=7).float()
        for route in (gram, lapack):
            assert int((route(A, 3)[0].S > 0).sum()) == 2


@pytest.mark.usefixtures("krylov_first")
class TestEscalation:
    def test_an_unresolved_spectrum_is_decomposed_in_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.1"], seed=8).float()
        monkeypatch.setattr(cost, "plan", lambda m, n, rank: cost.Plan("krylov", 0.0, BLOCK, 32, 40))
        found, (evidence,) = decompose(A, 20)
        assert evidence.route in ("gram", "lapack")
        assert (evidence.dimension, evidence.residual, evidence.captured) == (160, None, None)
        check_triplets(A, found, 20)
        check_subspaces(A, found, 20)

    @pytest.mark.parametrize("dense", ["gram", "lapack"])
    def test_the_full_decomposition_is_the_cheaper_one(self, dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.1"], seed=8).float()
        monkeypatch.setattr(cost, "plan", lambda m, n, rank: cost.Plan("krylov", 0.0, BLOCK, 32, 40))
        monkeypatch.setattr(cost, "dense", lambda m, n, rank: cost.Plan(dense, 0.0))
        assert decompose(A, 20)[1][0].route == dense

    @pytest.mark.parametrize("limit", [40, 72, 100])
    def test_the_method_itself_refuses_a_result_that_it_cannot_certify(self, limit: int) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.1"], seed=8).float()
        with pytest.raises(NotCertified, match=rf"residual .* sigma_1 in a Krylov space of dimension {limit}"):
            by_krylov(A, 20, limit=limit)

    @pytest.mark.parametrize("spectrum", SPECTRA)
    def test_a_resolved_spectrum_is_not(self, spectrum: str) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA[spectrum], seed=9).float()
        found, (evidence,) = decompose(A, 8)
        assert evidence.route == "krylov"
        assert evidence.dimension < 0.9 * 160
        assert 0 < evidence.residual < 8 * EPS
        assert evidence.captured is None
        check_triplets(A, found, 8)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_input_raises(self, value: float) -> None:
        A = cases.normal(200, 160, seed=10, dtype=torch.float32)
        A[3, 4] = value
        with pytest.raises(ArithmeticError, match=r"SVD of a 200 x 160 matrix failed"):
            truncated_svd(A, 4)


@pytest.mark.usefixtures("krylov_first")
class TestScale:
    @pytest.mark.parametrize("exponent", [-120, -100, 100, 120])
    def test_powers_of_two_change_nothing_but_the_singular_values(self, exponent: int) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.5"], seed=11).float()
        plain, (evidence,) = decompose(A, 12)
        scaled, (other,) = decompose(A * 2.0**exponent, 12)
        assert evidence.route == "krylov"
        if abs(other.residual - evidence.residual) == 0:
            assert torch.equal(scaled.U, plain.U)
        assert torch.equal(scaled.S, plain.S * 2.0**exponent)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_far_from_one(self, scale: float) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-1"], seed=12).float()
        found, _ = decompose(scale * A, 12)
        check_triplets(A, Components(found.U, found.S / scale, found.Vh), 12)

    def test_denormal_numbers(self) -> None:
        A = 1e-38 * cases.with_spectrum(200, 160, SPECTRA["j^-1"], seed=13).float()
        assert 0 < A.abs().max() < torch.finfo(torch.float32).tiny
        found, _ = decompose(A, 12)
        exact = torch.linalg.svd(A.double() * 2.0**130, full_matrices=False)
        assert cases.error(found.S[None] * 2.0**100, exact.S[None, :12] * 2.0**-30) < 1e-6
        assert cases.error(projector(found.U), projector(exact.U[:, :12])) < 1e-5
        assert cases.error(projector(found.Vh.T), projector(exact.Vh[:12].T)) < 1e-5
