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
from dcmerge_ext.errors import ConvergenceError
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
    "an outlier": torch.cat([torch.tensor([10.0]), cases.power_law(159, 0.5)]),
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
    torch.testing.assert_close(S[live], exact[live], rtol=0, atol=12 * EPS * largest)  # LAPACK leaves 2 to 10
    assert (S.diff() <= 0).all()
    assert (exact[~live] <= 2 * max(m, n) ** 0.5 * EPS * largest).all()
    assert (U[:, ~live] == 0).all()
    assert (Vh[~live] == 0).all()
    torch.testing.assert_close(U.T @ U, torch.diag(live.double()), rtol=0, atol=1e-5)
    torch.testing.assert_close(Vh @ Vh.T, torch.diag(live.double()), rtol=0, atol=1e-5)
    assert float((A.double() @ Vh.T - U * S).norm(dim=0).max()) <= 16 * EPS * largest
    assert float((A.double().T @ U - Vh.T * S).norm(dim=0).max()) <= 16 * EPS * largest


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

    @pytest.mark.parametrize("route", [route for route in ROUTES if route != "krylov"])
    @pytest.mark.parametrize(("m", "n"), SHAPES)
    def test_a_zero_matrix_has_only_null_components(self, route: str, m: int, n: int) -> None:
        found, evidence = ROUTES[route](torch.zeros(m, n), 20)
        assert all((x == 0).all() for x in found)
        assert not evidence.tie
        assert not evidence.residual

    @pytest.mark.parametrize("route", ROUTES)
    def test_a_diagonal_matrix(self, route: str) -> None:
        A = torch.diag(cases.power_law(160, 0.5)).float()[
            torch.randperm(160, generator=torch.Generator().manual_seed(1))
        ]
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
    @pytest.mark.parametrize("copies", [2, 5, 7])
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
        with pytest.raises(ConvergenceError, match=r"SVD of a 200 x 160 matrix failed"):
            truncated_svd(A, 4)


@pytest.mark.usefixtures("krylov_first")
class TestScale:
    @pytest.mark.parametrize("exponent", [-90, -40, 40, 120])
    def test_powers_of_two_change_nothing_but_the_singular_values(self, exponent: int) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.5"], seed=11).float()
        A *= 0.75 / A.abs().max()  # where scaled matrices are brought to: their entries are the same, bit by bit
        plain, (evidence,) = decompose(A, 12)
        scaled, (other,) = decompose(A * 2.0**exponent, 12)
        assert (evidence.route, other) == ("krylov", evidence)
        assert torch.equal(scaled.U, plain.U)
        assert torch.equal(scaled.S, plain.S * 2.0**exponent)
        assert torch.equal(scaled.Vh, plain.Vh)

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


@pytest.mark.usefixtures("krylov_first")
class TestDegenerate:
    @pytest.mark.parametrize(("m", "n"), SHAPES)
    @pytest.mark.parametrize("true_rank", [1, 3, 8, 15])
    def test_fewer_components_than_wanted(self, m: int, n: int, true_rank: int) -> None:
        A = cases.with_spectrum(m, n, cases.power_law(true_rank, 0.5), seed=true_rank).float()
        found, (evidence,) = decompose(A, 20)
        assert int((found.S > 0).sum()) == true_rank
        assert not evidence.tie
        check_triplets(A, found, 20)
        assert cases.error(product(found), A) < 1e-6

    def test_exactly_as_many_components_as_wanted(self) -> None:
        A = cases.with_spectrum(200, 160, cases.power_law(20, 0.5), seed=1).float()
        found, (evidence,) = decompose(A, 20)
        assert not evidence.tie
        check_triplets(A, found, 20)
        check_subspaces(A, found, 20)

    @pytest.mark.parametrize("rank", [5, 20])
    def test_rows_and_columns_of_zeros(self, rank: int) -> None:
        A = torch.zeros(200, 160)
        A[50:65, 30:48] = cases.normal(15, 18, seed=2, dtype=torch.float32)
        found, _ = decompose(A, rank)
        check_triplets(A, found, rank)
        assert (found.U[:50] == 0).all()
        assert int((found.S > 0).sum()) == min(rank, 15)

    def test_equal_rows(self) -> None:
        A = torch.ones(200, 160)
        found, _ = decompose(A, 6)
        check_triplets(A, found, 6)
        assert int((found.S > 0).sum()) == 1

    @pytest.mark.parametrize(
        "spectrum",
        [
            pytest.param(torch.ones(160), id="flat"),
            pytest.param(torch.cat([torch.ones(10), torch.full((150,), 0.1)]), id="two values"),
            pytest.param(torch.cat([torch.ones(30), torch.full((130,), 0.1)]), id="two values, the cut in the first"),
            pytest.param(torch.cat([torch.ones(9), torch.full((9,), 0.7), torch.full((9,), 0.5)]), id="nines"),
            pytest.param(0.5 ** torch.arange(160, dtype=torch.float64), id="0.5^j"),
            pytest.param(cases.power_law(160, 2.0), id="j^-2"),
            pytest.param(cases.power_law(160, 3.0), id="j^-3"),
            pytest.param(torch.cat([torch.tensor([1e3]), cases.power_law(159, 0.3)]), id="an outlier of 1e3"),
            pytest.param(torch.cat([torch.tensor([1e6]), cases.power_law(159, 0.3)]), id="an outlier of 1e6"),
        ],
    )
    @pytest.mark.parametrize("rank", [4, 9, 16, 20])
    def test_hard_spectra(self, spectrum: Tensor, rank: int) -> None:
        A = cases.with_spectrum(200, 160, spectrum, seed=3).float()
        found, (evidence,) = decompose(A, rank)
        check_triplets(A, found, rank)
        repeated = len(spectrum) > rank and spectrum[rank - 1] == spectrum[rank]
        if spectrum[rank - 1] > 1e-3 * spectrum[0]:
            assert evidence.tie == repeated

    def test_the_identity(self) -> None:
        for A in (torch.eye(160), torch.eye(200, 160), 3 * torch.eye(160).flip(0)):
            found, (evidence,) = decompose(A, 12)
            assert evidence.tie
            check_triplets(A, found, 12)

    @pytest.mark.parametrize(("copies", "order", "rank"), [(9, 20, 12), (16, 12, 10), (9, 24, 20), (20, 10, 30)])
    @pytest.mark.parametrize("seed", range(6))
    def test_more_copies_of_a_block_than_the_method_has_directions(
        self, copies: int, order: int, rank: int, seed: int
    ) -> None:
        A = torch.kron(torch.eye(copies), cases.normal(order, order, seed=seed, dtype=torch.float32))
        found, (evidence,) = decompose(A, rank, start=Start(seed))
        check_triplets(A, found, rank)
        assert evidence.tie == (rank % copies != 0)

    @pytest.mark.parametrize("copies", [9, 10, 16])
    @pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0])
    def test_singular_values_that_repeat_more_often_than_the_method_has_directions(
        self, copies: int, exponent: float
    ) -> None:
        spectrum = cases.power_law(160, exponent).repeat_interleave(copies)[:160]
        A = cases.with_spectrum(200, 160, spectrum, seed=copies).float()
        for rank in (BLOCK, copies, copies + 3):
            found, (evidence,) = decompose(A, rank)
            check_triplets(A, found, rank)
            assert evidence.tie == (rank != copies)

    @pytest.mark.parametrize("width", [1e-3, 1e-4, 1e-5, 1e-6])
    def test_clusters_narrower_and_wider_than_round_off(self, width: float) -> None:
        cluster = torch.linspace(1, 1 - width, 14, dtype=torch.float64)
        A = cases.with_spectrum(200, 160, torch.cat([cluster, 0.5 * cluster, torch.full((132,), 0.1)]), seed=4).float()
        for rank in (6, 14, 20, 28):
            check_triplets(A, decompose(A, rank)[0], rank)

    @pytest.mark.parametrize("hidden", [[2.0], [1.0], [3.0, 2.0, 1.5], [2.0] * 12], ids=str)
    @pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("streams", [(0,), (0, 1)], ids=["start", "start and probe"])
    def test_components_orthogonal_to_the_random_directions(
        self, hidden: list[float], exponent: float, streams: tuple[int, ...]
    ) -> None:
        directions = torch.cat([Start().rows(BLOCK, 160, torch.empty(0, dtype=torch.float64), s) for s in streams])
        outside = torch.linalg.qr(torch.cat([directions, cases.normal(160, 160, seed=5)]).T).Q[:, len(directions) :]
        count = outside.shape[1]
        spectrum = torch.cat([torch.tensor(hidden), cases.power_law(count - len(hidden), exponent)])
        rest = torch.linalg.qr(torch.cat([outside[:, : len(hidden)], cases.normal(160, count, seed=6)], dim=1)).Q
        A = (cases.orthonormal(200, count, 7) * spectrum @ rest[:, :count].T).float()
        assert (directions @ rest[:, : len(hidden)]).abs().max() < 1e-12
        found, _ = decompose(A, 16)
        check_triplets(A, found, 16)

    @settings(max_examples=60)
    @given(
        st.integers(1, 24).flatmap(
            lambda rank: st.tuples(
                st.just(rank),
                st.lists(
                    st.tuples(st.sampled_from([1e-3, 0.1, 0.3, 0.5, 0.50001, 0.7, 1.0, 4.0]), st.integers(1, 20)),
                    min_size=1,
                    max_size=8,
                ),
                st.integers(0, 2**32),
            )
        )
    )
    def test_any_mixture_of_repeated_singular_values(self, drawn: tuple[int, list[tuple[float, int]], int]) -> None:
        rank, runs, seed = drawn
        spectrum = torch.cat([torch.full((count,), value) for value, count in runs]).sort(descending=True).values[:96]
        A = cases.with_spectrum(120, 96, spectrum, seed=seed % 1000).float()
        found, _ = decompose(A, rank, start=Start(seed))
        check_triplets(A, found, rank)


class TestCertificate:
    def test_evidence_is_in_plain_numbers(self) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.5"], seed=1).float()
        _, evidence = by_krylov(A, 8)
        assert isinstance(evidence.dimension, int)
        assert isinstance(evidence.residual, float)
        assert isinstance(evidence.tie, bool)

    def test_a_space_that_suffices_at_first_sight_does_not_grow(self) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["0.9^j"], seed=1).float()
        assert by_krylov(A, 8)[1].dimension == first_dimension(8, 160)

    @pytest.mark.parametrize("spectrum", SPECTRA)
    @pytest.mark.parametrize("seed", range(3))
    def test_a_larger_tolerance_never_costs_more(self, spectrum: str, seed: int) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA[spectrum], seed=seed).float()
        exact = torch.linalg.svd(A.double(), full_matrices=False)
        gap = float(exact.S[15] - exact.S[16]) / float(exact.S[0])
        sizes = []
        for tol in (1e-9, None, 1e-5, 1e-3, 1e-1):
            found, evidence = by_krylov(A, 16, tol=tol)
            sizes.append(evidence.dimension)
            assert evidence.residual <= max(8 * EPS, (tol or 0) * gap)
            # an angle is at most residual over gap; two subspaces of 16 differ by sqrt(2) times that
            allowed = 2 * max(tol or 0, 8 * EPS / gap)
            assert cases.error(projector(found.Vh.T), projector(exact.Vh[:16].T)) <= allowed
        assert sizes == sorted(sizes, reverse=True)

    @pytest.mark.parametrize("tol", [0, -1e-3, float("nan")])
    def test_a_tolerance_that_is_not_positive_is_refused(self, tol: float) -> None:
        with pytest.raises(ValueError, match=r"truncated_svd: tol must be positive, got"):
            truncated_svd(torch.eye(4), 2, tol=tol)

    @pytest.mark.usefixtures("krylov_first")
    def test_the_public_function_passes_the_tolerance_on(self) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.1"], seed=2).float()
        tight, loose = (decompose(A, 16, tol=tol)[1][0] for tol in (None, 1e-1))
        assert (tight.route, loose.route) == ("krylov", "krylov")
        assert loose.dimension < tight.dimension


@pytest.mark.usefixtures("krylov_first")
class TestRandomness:
    A = cases.with_spectrum(200, 160, SPECTRA["j^-0.5"], seed=1).float()

    def test_the_same_bytes_again(self) -> None:
        first, again = (truncated_svd(self.A.clone(), 12) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_the_global_generator_is_neither_read_nor_changed(self) -> None:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = truncated_svd(self.A, 12)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(self.A, 12), strict=True))

    def test_seed_name_and_task_change_the_last_digits_only(self) -> None:
        found = [decompose(self.A, 12, start=Start(*s))[0] for s in ((0, ""), (1, ""), (0, "w"))]
        for other in found[1:]:
            assert not torch.equal(other.U, found[0].U)
            assert cases.error(projector(other.U), projector(found[0].U)) < 3e-6
            assert cases.error(projector(other.Vh.T), projector(found[0].Vh.T)) < 3e-6
            assert cases.error(other.S[None], found[0].S[None]) < 4 * EPS

    def test_the_backends_agree_to_the_last_digits(self) -> None:
        found = []
        for name in ("reference", "cpu"):
            if available(name):
                with use_backend(name):
                    found.append(truncated_svd(self.A, 12))
        for other in found[1:]:
            assert cases.error(projector(other.U), projector(found[0].U)) < 3e-6
            assert cases.error(projector(other.Vh.T), projector(found[0].Vh.T)) < 3e-6

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd offsets"])
    def test_the_same_bytes_alone_and_anywhere_in_a_batch(self, layout: str) -> None:
        m, n = 191, 163  # matrices of a batch begin at addresses of every remainder
        matrices = [cases.with_spectrum(m, n, cases.power_law(163, 0.5), seed=s).float() for s in range(3)]
        if layout == "transposed":
            matrices = [x.mT for x in matrices]
        elif layout == "odd offsets":
            matrices = [torch.cat([torch.zeros(1), x.flatten()])[1:].view(m, n) for x in matrices]
        alone = [truncated_svd(x, 8) for x in matrices]
        for order in ([0, 1, 2], [2, 0], [1], [0, 0, 1]):
            batch = truncated_svd(torch.stack([matrices[i] for i in order]), 8)
            for position, i in enumerate(order):
                assert all(torch.equal(b[position], a) for a, b in zip(alone[i], batch, strict=True))

    @pytest.mark.usefixtures("restore_threads")
    def test_the_same_bytes_anywhere_in_a_batch_with_several_threads(self) -> None:
        torch.set_num_threads(2)
        matrices = [cases.with_spectrum(191, 163, cases.power_law(163, 0.5), seed=s).float() for s in range(3)]
        first = truncated_svd(torch.stack(matrices), 8)
        for order in ([2, 1, 0], [1, 2], [2, 2, 2, 0]):
            batch = truncated_svd(torch.stack([matrices[i] for i in order]), 8)
            for position, i in enumerate(order):
                assert all(torch.equal(b[position], a[i]) for a, b in zip(first, batch, strict=True))


@pytest.mark.usefixtures("krylov_first")
class TestBatches:
    def test_equals_the_loop_with_zeros_and_low_ranks_inside(self) -> None:
        A = torch.stack([cases.with_spectrum(200, 160, SPECTRA["j^-0.5"], seed=s).float() for s in range(4)])
        A[1] = 0
        A[2] = torch.ones(200, 160)
        found, evidence = decompose(A.reshape(2, 2, 200, 160), 12)
        assert (found.U.shape, found.S.shape, found.Vh.shape) == ((2, 2, 200, 12), (2, 2, 12), (2, 2, 12, 160))
        assert len(evidence) == 4
        for i in range(4):
            one, (its,) = decompose(A[i], 12)
            assert its == evidence[i]
            assert all(torch.equal(a, b.flatten(0, 1)[i]) for a, b in zip(one, found, strict=True))
        assert (found.S > 0).sum(-1).flatten().tolist() == [12, 0, 1, 12]

    @pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
    def test_an_empty_batch(self, leading: tuple[int, ...]) -> None:
        found, evidence = decompose(torch.zeros(*leading, 30, 20), 5)
        assert [x.shape for x in found] == [(*leading, 30, 5), (*leading, 5), (*leading, 5, 20)]
        assert evidence == []

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_decomposed_in_float32(self, dtype: torch.dtype) -> None:
        A = cases.with_spectrum(200, 160, SPECTRA["j^-0.5"], seed=1).to(dtype)
        for half, single in zip(truncated_svd(A, 12), truncated_svd(A.float(), 12), strict=True):
            assert torch.equal(half, single)

    def test_an_error_names_the_matrix_of_the_batch(self) -> None:
        A = torch.stack([cases.normal(200, 160, seed=s, dtype=torch.float32) for s in range(3)])
        A[1, 5, 6] = float("inf")
        with pytest.raises(ConvergenceError, match=r"SVD of matrix 1 of a batch of 200 x 160 matrices failed"):
            truncated_svd(A, 4)
