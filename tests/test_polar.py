"""The polar factor: what DC-Merge and TSV-M call whitening."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank
from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.linalg import routes
from dcmerge_ext.linalg.polar import default_tolerance, polar, polar_with_values
from dcmerge_ext.linalg.routes import by_eigenvectors, by_iteration, by_svd
from dcmerge_ext.products import symmetric_product

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
SHAPES = [(40, 12), (12, 12), (12, 40), (1, 5), (5, 1), (1, 1)]


def spectral(X: Tensor) -> float:
    return torch.linalg.matrix_norm(X.double(), 2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_is_an_isometry_times_a_symmetric_positive_semidefinite_root(m: int, n: int, dtype: torch.dtype) -> None:
    X = cases.with_spectrum(m, n, cases.power_law(min(m, n), 1.0), seed=m).to(dtype)
    Q, H = polar(X)
    atol = TOLERANCE[dtype]
    assert (Q.shape, H.shape, Q.dtype, H.dtype) == ((m, n), (n, n), dtype, dtype)
    small = Q if m >= n else Q.T
    assert spectral(small.T @ small - torch.eye(min(m, n))) < atol
    assert spectral(H - H.T) < atol
    assert torch.linalg.eigvalsh(H.double()).min() > -atol
    assert spectral(Q @ H - X) < atol
    assert spectral(H @ H - X.T @ X) < atol


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_equals_the_factor_by_singular_vectors(m: int, n: int) -> None:
    X = cases.with_spectrum(m, n, cases.power_law(min(m, n), 2.0), seed=1)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    assert spectral(polar(X).Q - U @ Vh) < 1e-12


def test_values_are_the_singular_values_of_the_input() -> None:
    spectrum = cases.power_law(12, 1.0)
    _, _, values = polar_with_values(cases.with_spectrum(40, 12, spectrum, seed=2))
    torch.testing.assert_close(values, spectrum)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_float32_stays_orthonormal_to_round_off_up_to_condition_1e5(condition: float) -> None:
    X = cases.with_spectrum(48, 12, torch.logspace(0, -torch.tensor(condition).log10(), 12), seed=3).float()
    Q, H = polar(X)
    assert spectral(Q.T @ Q - torch.eye(12)) < 3e-6
    assert spectral(Q @ H - X) < 3e-6


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e11])
def test_float64_stays_orthonormal_to_round_off(condition: float) -> None:
    exponents = torch.linspace(0, -1, 12, dtype=torch.float64)
    X = cases.with_spectrum(48, 12, condition**exponents, seed=4)
    assert spectral(polar(X).Q.T @ polar(X).Q - torch.eye(12)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(40, 12), (12, 12), (12, 40)])
def test_a_rank_deficient_matrix_gives_the_partial_isometry(m: int, n: int, dtype: torch.dtype) -> None:
    left, right = cases.orthonormal(m, 3, 5), cases.orthonormal(n, 3, 6)
    X = (left * torch.tensor([3.0, 1.0, 0.1]) @ right.T).to(dtype)
    Q, H, values = polar_with_values(X)
    assert spectral(Q - left @ right.T) < 20 * TOLERANCE[dtype]  # unique: nothing fills the null space
    assert spectral(Q @ H - X) < 3 * TOLERANCE[dtype]
    assert int((values > 0).sum()) == 3


def test_a_zero_matrix_gives_zero_factors() -> None:
    Q, H = polar(torch.zeros(4, 3))
    assert torch.equal(Q, torch.zeros(4, 3))
    assert torch.equal(H, torch.zeros(3, 3))


def test_zero_columns_stay_exactly_zero_in_the_basis() -> None:
    X = cases.orthonormal(20, 6, 7)
    X[:, [1, 4]] = 0
    Q, H = polar(X)
    assert spectral(Q - X) < 1e-13
    assert spectral(H - X.T @ X) < 1e-13


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3), (0, 0)])
def test_an_empty_matrix_has_empty_factors(shape: tuple[int, ...]) -> None:
    Q, H = polar(torch.zeros(shape))
    assert Q.shape == shape
    assert H.shape == (*shape[:-2], shape[-1], shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_idempotent(dtype: torch.dtype) -> None:
    Q = polar(cases.normal(30, 10, seed=8, dtype=dtype)).Q
    again = polar(Q)
    assert spectral(again.Q - Q) < TOLERANCE[dtype]
    assert spectral(again.H - torch.eye(10)) < TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
def test_scale_goes_into_the_root_alone(scale: float) -> None:
    X = cases.normal(30, 10, seed=9, dtype=torch.float32)
    assert spectral(polar(scale * X).Q - polar(X).Q) < 1e-5
    assert cases.error(polar(scale * X).H / scale, polar(X).H) < 1e-5


def test_rotations_carry_over() -> None:
    X, left, right = cases.normal(30, 10, seed=10), cases.orthonormal(30, 30, 11), cases.orthonormal(10, 10, 12)
    Q, H = polar(left @ X @ right)
    assert spectral(Q - left @ polar(X).Q @ right) < 1e-12
    assert spectral(H - right.T @ polar(X).H @ right) < 1e-12


def test_leading_dimensions_equal_the_loop() -> None:
    X = cases.normal(2, 3, 9, 5, seed=13)
    X[0, 1] = 0
    X[1, 0] = cases.with_spectrum(9, 5, [2, 1], seed=14)
    found = polar(X)
    assert (found.Q.shape, found.H.shape) == ((2, 3, 9, 5), (2, 3, 5, 5))
    for i in range(2):
        for j in range(3):
            alone = polar(X[i, j])
            assert spectral(found.Q[i, j] - alone.Q) < 1e-12
            assert spectral(found.H[i, j] - alone.H) < 1e-12


def test_tolerance_decides_which_directions_are_dropped() -> None:
    left, right = cases.orthonormal(30, 4, 15), cases.orthonormal(4, 4, 16)
    X = left * torch.tensor([1.0, 0.5, 1e-3, 1e-6], dtype=torch.float64) @ right.T
    for tolerance, kept in ((0.0, 4), (1e-4, 3), (1e-2, 2), (1.0, 0)):
        assert spectral(polar(X, tol=tolerance).Q - left[:, :kept] @ right[:, :kept].T) < 1e-9
        assert spectral(polar(X, tol=tolerance).H - polar(X).H) == 0


def test_default_tolerance_grows_with_the_side_and_the_precision() -> None:
    assert default_tolerance(900, 4, torch.float32) == pytest.approx(60 * 2.0**-23)
    assert default_tolerance(4, 900, torch.float64) == pytest.approx(60 * 2.0**-52)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    X = cases.normal(9, 4, seed=17).to(dtype)
    for half, single in zip(polar(X), polar(X.float()), strict=True):
        assert torch.equal(half, single)


def test_the_input_is_left_alone() -> None:
    X = cases.normal(9, 4, seed=18)
    before = X.clone()
    polar(X)
    assert torch.equal(X, before)


def test_non_finite_input_raises() -> None:
    with pytest.raises(ConvergenceError, match=r"polar factor of a 3 x 3 matrix failed"):
        polar(torch.full((3, 3), float("nan")))


def concatenated(rows: int, tasks: int, rank: int, kind: str, seed: int = 20) -> Tensor:
    """Orthonormal blocks of several tasks side by side, float64."""
    blocks = [cases.orthonormal(rows, rank, seed + i) for i in range(tasks)]
    if kind == "a copy":
        blocks[1] = blocks[0].clone()
    elif kind == "copies":
        blocks = [blocks[0]] * tasks
    elif kind.startswith("perturbed by"):
        noise = cases.normal(rows, rank, seed=seed + 99) / rows**0.5
        blocks[1] = torch.linalg.qr(blocks[0] + float(kind.split()[2]) * noise).Q
    elif kind == "shared directions":
        blocks[1:] = [torch.linalg.qr(torch.cat([blocks[0][:, :2], b], dim=1)).Q[:, :rank] for b in blocks[1:]]
    elif kind == "null components":
        blocks[1] = blocks[1] * (torch.arange(rank) < rank // 2)
        blocks[2] = torch.zeros_like(blocks[2])
    return torch.cat(blocks, dim=1)


def check_polar(X: Tensor, found: tuple[Tensor, Tensor, Tensor], tol: float | None = None) -> None:
    """Against the singular vectors in float64: an isometry of what is kept, and the root of X'X."""
    (Q, H, values), (m, n), eps = (x.double() for x in found), X.shape, EPS[X.dtype]
    assert {x.dtype for x in found} == {X.dtype}
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    largest, bound = S[0].item() or 1.0, 8 * max(m, n) ** 0.5 * eps
    tol = default_tolerance(m, n, X.dtype) if tol is None else tol
    kept = tol * S[0] < S
    root = Vh.T * S @ Vh
    count, U, Vh = int(kept.sum()), U[:, kept], Vh[kept]
    smallest = S[kept][-1].item() / largest if count else 1.0
    assert (values > 0).tolist() == kept.tolist()
    assert (values - S * kept).abs().max() <= bound * largest
    assert (values.diff() <= 0).all()
    isometry = torch.linalg.svdvals(Q)
    assert torch.allclose(isometry[:count], torch.ones(count, dtype=torch.float64), rtol=0, atol=bound)
    assert torch.allclose(isometry[count:], torch.zeros(min(m, n) - count, dtype=torch.float64), rtol=0, atol=bound)
    assert spectral(Q - U @ Vh) <= bound / smallest
    assert spectral(Q @ H - U * S[kept] @ Vh) <= bound * largest
    torch.testing.assert_close(H, H.T, rtol=0, atol=2 * eps * largest)
    assert torch.linalg.eigvalsh(H)[0] >= -bound * largest
    assert spectral(H - root) <= bound * largest


SQUARE, TALL = [(64, 4, 16), (288, 9, 32)], [(96, 3, 16), (400, 8, 36)]
KINDS = ["random", "a copy", "shared directions", "null components"]


class TestConcatenatedBases:
    @pytest.mark.parametrize("kind", [*KINDS, "copies"])
    @pytest.mark.parametrize(("rows", "tasks", "rank"), SQUARE + TALL)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_the_singular_vectors_in_float64(
        self, rows: int, tasks: int, rank: int, kind: str, dtype: torch.dtype
    ) -> None:
        X = concatenated(rows, tasks, rank, kind).to(dtype)
        tolerance = default_tolerance(*X.shape, dtype)
        check_polar(X, polar_with_values(X))
        check_polar(X, by_svd(X, tolerance))
        if (found := by_eigenvectors(X, tolerance, EPS[dtype])) is not None:
            check_polar(X, found)

    @pytest.mark.parametrize("kind", [*KINDS, "copies"])
    @pytest.mark.parametrize(("rows", "tasks", "rank"), SQUARE + TALL)
    def test_the_eigenvectors_are_left_where_most_directions_are_small(
        self, rows: int, tasks: int, rank: int, kind: str
    ) -> None:
        X = concatenated(rows, tasks, rank, kind).float()
        small = (torch.linalg.svdvals(X.double()).square() < routes._SMALL * spectral(X) ** 2).double().mean().item()
        found = by_eigenvectors(X, default_tolerance(*X.shape, X.dtype), EPS[X.dtype])
        assert (found is None) == (small > routes._MOST_SMALL or kind == "null components")

    @pytest.mark.parametrize("size", [0.3, 1e-2, 1e-3])
    @pytest.mark.parametrize(("rows", "tasks", "rank"), TALL)
    def test_nearly_equal_tasks(self, rows: int, tasks: int, rank: int, size: float) -> None:
        X = concatenated(rows, tasks, rank, f"perturbed by {size}").float()
        check_polar(X, polar_with_values(X))
        check_polar(X, by_svd(X, default_tolerance(*X.shape, X.dtype)))

    @pytest.mark.parametrize(
        ("rows", "tasks", "rank", "size"),
        [(64, 4, 16, 1e-2), (288, 9, 32, 1e-2), (288, 9, 32, 1e-3), (96, 3, 16, 1e-4), (400, 8, 36, 1e-4)],
    )
    def test_tasks_of_which_two_are_nearly_equal(self, rows: int, tasks: int, rank: int, size: float) -> None:
        X = concatenated(rows, tasks, rank, f"perturbed by {size}").float()
        values = torch.linalg.svdvals(X.double())
        assert values[-1] > 2e-6 * values[0]
        check_polar(X, polar_with_values(X, 1e-6), tol=1e-6)

    @pytest.mark.parametrize(("rows", "tasks", "rank", "live"), [(200, 4, 50, 8), (300, 3, 100, 10), (256, 8, 32, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_mostly_null_components(self, rows: int, tasks: int, rank: int, live: int, dtype: torch.dtype) -> None:
        X = concatenated(rows, tasks, rank, "random").to(dtype)
        X[:, torch.arange(tasks * rank) % rank >= live] = 0
        Q, H, values = polar_with_values(X)
        check_polar(X, (Q, H, values))
        assert int((values > 0).sum()) == tasks * live

    def test_differences_below_round_off_are_no_directions(self) -> None:
        X = concatenated(96, 3, 16, "perturbed by 1e-9").float()
        _, _, values = polar_with_values(X)
        assert int((values > 0).sum()) == 32

    def test_a_batch_equals_the_loop(self) -> None:
        X = torch.stack([concatenated(96, 3, 16, kind).float() for kind in (*KINDS, "copies")])
        X = torch.cat([X, torch.zeros(1, 96, 48)]).reshape(2, 3, 96, 48)
        found = polar_with_values(X)
        assert [x.shape for x in found] == [(2, 3, 96, 48), (2, 3, 48, 48), (2, 3, 48)]
        for i in range(2):
            for j in range(3):
                for one, several in zip(polar_with_values(X[i, j]), found, strict=True):
                    assert torch.equal(one, several[i, j])


class TestRoutes:
    @pytest.mark.parametrize("small", [0, 1, 3, 40])
    @pytest.mark.parametrize("condition", [10, 1e2, 1e3, 1e4, 1e5])
    def test_float32_is_orthonormal_and_exact_with_few_small_directions(self, condition: float, small: int) -> None:
        ends = torch.logspace(0, -torch.tensor(condition).log10(), small + 1, dtype=torch.float64)[1:]
        spectrum = torch.cat([torch.linspace(1, 0.5, 280 - small, dtype=torch.float64), ends])
        X = cases.with_spectrum(300, 280, spectrum, seed=small).float()
        found = by_eigenvectors(X, default_tolerance(300, 280, X.dtype), EPS[X.dtype])
        assert found is not None
        check_polar(X, found)

    @pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
    @pytest.mark.parametrize("route", ["eigenvectors", "svd"])
    def test_float64(self, condition: float, route: str) -> None:
        ends = condition ** torch.linspace(0, -1, 11, dtype=torch.float64)[1:]
        X = cases.with_spectrum(120, 100, torch.cat([torch.linspace(1, 0.5, 90, dtype=torch.float64), ends]), seed=3)
        tolerance = default_tolerance(120, 100, X.dtype)
        found = by_svd(X, tolerance) if route == "svd" else by_eigenvectors(X, tolerance, EPS[X.dtype])
        assert found is not None
        check_polar(X, found)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("m", "n"), [(300, 300), (400, 290), (40, 12), (7, 1), (1, 1)])
    def test_products_equal_the_singular_vectors(self, m: int, n: int, dtype: torch.dtype) -> None:
        X = cases.with_spectrum(m, n, torch.linspace(1, 0.1, n, dtype=torch.float64), seed=n).to(dtype)
        found = by_iteration(X, default_tolerance(m, n, dtype), EPS[dtype])
        assert found is not None
        check_polar(X, found)

    @pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
    def test_products_keep_the_small_directions_of_ill_conditioned_matrices(self, condition: float) -> None:
        spectrum = torch.logspace(0, -torch.tensor(condition).log10(), 120, dtype=torch.float64)
        X = cases.with_spectrum(160, 120, spectrum, seed=4).float()
        found = by_iteration(X, default_tolerance(160, 120, X.dtype), EPS[X.dtype])
        assert found is not None
        check_polar(X, found)

    def test_products_leave_what_needs_wider_numbers_to_the_svd(self) -> None:
        X = cases.with_spectrum(160, 120, torch.logspace(0, -3, 120, dtype=torch.float64), seed=4)
        assert by_iteration(X, 0.0, EPS[X.dtype]) is None
        assert by_iteration(X, 0.0, EPS[torch.float32]) is not None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["a copy", "copies", "null components"])
    def test_products_leave_a_rank_deficient_matrix_to_the_svd(self, kind: str, dtype: torch.dtype) -> None:
        X = concatenated(96, 3, 16, kind).to(dtype)
        assert by_iteration(X, default_tolerance(96, 48, dtype), EPS[dtype]) is None
        assert by_iteration(torch.zeros(9, 4, dtype=dtype), default_tolerance(9, 4, dtype), EPS[dtype]) is None
        assert by_iteration(torch.ones(9, 4, dtype=dtype), default_tolerance(9, 4, dtype), EPS[dtype]) is None

    def test_eigenvectors_leave_a_zero_matrix_to_the_svd(self) -> None:
        assert by_eigenvectors(torch.zeros(9, 4), 1e-6, EPS[torch.float32]) is None


class TestRoundOff:
    """Entries of float32 precision in a float64 matrix: what the merge of LoRA factors works on."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("rows", "tasks", "rank"), TALL)
    def test_is_as_good_as_the_entries(self, rows: int, tasks: int, rank: int, kind: str) -> None:
        X = concatenated(rows, tasks, rank, kind).float().double()
        Q, H, values = polar_with_values(X, round_off=EPS[torch.float32])
        exact, exact_root, exact_values = polar_with_values(X)
        smallest = exact_values[exact_values > 0].min() / exact_values[0]
        assert spectral(Q - exact) < 0.1 * EPS[torch.float32] / smallest
        assert spectral(H - exact_root) < 0.1 * EPS[torch.float32]
        assert (values - exact_values).abs().max() < 0.1 * EPS[torch.float32]

    def test_finer_than_the_dtype_changes_nothing(self) -> None:
        X = concatenated(96, 3, 16, "random").float()
        for one, other in zip(polar_with_values(X, round_off=1e-12), polar_with_values(X), strict=True):
            assert torch.equal(one, other)


class TestTolerance:
    @pytest.mark.parametrize("n", [20, 300])
    @pytest.mark.parametrize("tol", [0.0, 1e-4, 0.02, 0.25, 0.6, 1.0])
    @pytest.mark.parametrize("round_off", [None, 1e-6])
    def test_drops_the_same_directions_from_the_basis_and_the_values(
        self, n: int, tol: float, round_off: float | None
    ) -> None:
        few = torch.tensor([0.1, 0.01, 1e-3], dtype=torch.float64)
        spectrum = torch.cat([torch.linspace(1, 0.5, n - 5, dtype=torch.float64), torch.tensor([0.3, 0.2]), few])
        X = cases.with_spectrum(n + 20, n, spectrum, seed=5)
        Q, H, values = polar_with_values(X, tol, round_off=round_off)
        expected = int((spectrum > tol).sum())
        assert int((values > 0).sum()) == expected
        assert int((torch.linalg.svdvals(Q) > 0.5).sum()) == expected
        assert spectral(H @ H - X.T @ X) < 1e-9

    @pytest.mark.parametrize("n", [20, 300])
    def test_of_a_well_conditioned_matrix(self, n: int) -> None:
        spectrum = torch.linspace(1, 0.31, n, dtype=torch.float64)
        Q, _, values = polar_with_values(cases.with_spectrum(n + 20, n, spectrum, seed=6), 0.5)
        assert int((values > 0).sum()) == int((spectrum > 0.5).sum())
        assert int((torch.linalg.svdvals(Q) > 0.5).sum()) == int((spectrum > 0.5).sum())


class TestSymmetricProducts:
    @pytest.mark.parametrize("n", [1, 2, 63, 64, 255, 256, 257, 258, 259, 260, 301])
    @pytest.mark.parametrize("k", [1, 5, 300])
    def test_equals_the_whole_product(self, n: int, k: int) -> None:
        X = cases.normal(n, k, seed=n)
        found = symmetric_product(X, X.T)
        torch.testing.assert_close(found, X @ X.T, rtol=0, atol=1e-12)
        if n >= 256:  # bit by bit beyond the blocks on the diagonal
            assert torch.equal(found.triu(-(-n // 4)), found.T.triu(-(-n // 4)))

    @pytest.mark.parametrize("n", [40, 259])
    def test_of_factors_that_differ(self, n: int) -> None:
        Z, values = cases.orthonormal(n, n, 7), cases.power_law(n, 1.0)
        torch.testing.assert_close(symmetric_product(Z * values, Z.T), Z * values @ Z.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "X", [torch.ones(4), torch.ones(4, 3, dtype=torch.int64), LowRank(torch.ones(4, 1), torch.ones(1, 3))]
)
def test_what_is_no_matrix_is_refused(X: Any) -> None:
    with pytest.raises(TypeError, match=r"polar: needs a floating tensor"):
        polar(X)


@pytest.mark.parametrize("tol", [-1.0, float("nan")])
def test_a_tolerance_below_zero_is_refused(tol: float) -> None:
    with pytest.raises(ValueError, match=r"polar: tol must be 0 or more"):
        polar(torch.ones(4, 3), tol=tol)
