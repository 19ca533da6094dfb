"""The polar factor: what DC-Merge and TSV-M call whitening."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.linalg.polar import default_tolerance, polar, polar_with_values

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
