"""Newton-Schulz and QDWH: optimal polynomials, step counts, and the polar factor that singular vectors give."""

from __future__ import annotations

from collections.abc import Callable

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

from dcmerge_ext.linalg import iterations
from dcmerge_ext.linalg.iterations import newton_schulz, optimal_quintic, qdwh

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}
INTERVALS = [(1e-8, 1.0), (1e-5, 1.0), (1e-3, 1.0), (0.01, 1.0), (0.1, 1.0), (0.5, 1.0), (0.9, 1.0), (0.3, 1.7), (2, 5)]


def spectrum(count: int, condition: float) -> Tensor:
    return condition ** torch.linspace(0, -1, count, dtype=torch.float64)


def spectral(X: Tensor) -> float:
    return torch.linalg.matrix_norm(X.double(), 2).item()


def factor(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return U @ Vh


def residual(coefficients: tuple[float, float, float], x: np.ndarray) -> np.ndarray:
    a, b, c = coefficients
    return 1 - (a * x + b * x**3 + c * x**5)


class TestOptimalQuintic:
    @pytest.mark.parametrize(("low", "high"), INTERVALS)
    def test_the_error_is_equal_and_alternates_at_four_points(self, low: float, high: float) -> None:
        coefficients, error = optimal_quintic(low, high)
        x = np.concatenate([np.geomspace(low, high, 200_001), np.linspace(low, high, 200_001)])
        x.sort()
        r = residual(coefficients, x)
        assert np.abs(r).max() == pytest.approx(error, rel=1e-7)
        inner = x[np.r_[False, (r[1:-1] - r[:-2]) * (r[2:] - r[1:-1]) < 0, False]]
        extrema = np.array([low, inner.min(), inner.max(), high])
        np.testing.assert_allclose(residual(coefficients, extrema), error * np.array([1, -1, 1, -1]), rtol=1e-6)

    @pytest.mark.parametrize(("low", "high"), INTERVALS)
    def test_no_other_quintic_is_nearer_to_one(self, low: float, high: float) -> None:
        coefficients, error = optimal_quintic(low, high)
        x = np.geomspace(low, high, 20_001)
        generator = np.random.default_rng(1)
        for size in (1e-4, 1e-2, 1.0):
            for step in generator.normal(size=(40, 3)):
                other = tuple(np.array(coefficients) + size * error * step)
                assert np.abs(residual(other, x)).max() > error * (1 - 1e-6)

    def test_the_error_grows_with_the_interval(self) -> None:
        errors = [optimal_quintic(low, 1.0)[1] for low in (0.9, 0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-6)]
        assert errors == sorted(errors)
        assert errors[-1] < 1

    @pytest.mark.parametrize("low", [1.0, 1 - 1e-7, 1 - 1e-6, 1 - 1e-5, 1 - 1e-4])
    def test_of_a_vanishing_interval_it_is_the_taylor_polynomial(self, low: float) -> None:
        coefficients, error = optimal_quintic(low, 1.0)
        np.testing.assert_allclose(coefficients, (15 / 8, -10 / 8, 3 / 8), rtol=1e-3)
        assert error < 1e-11

    @pytest.mark.parametrize(("condition", "steps"), [(1e2, 6), (1e3, 7), (1e4, 9), (1e5, 10)])
    def test_steps_until_the_error_is_a_millionth(self, condition: float, steps: int) -> None:
        low, high, taken = 1 / condition, 1.0, 0
        while high - low > 2e-6:
            error = optimal_quintic(low, high)[1]
            low, high, taken = 1 - error, 1 + error, taken + 1
        assert taken == steps


@pytest.fixture
def quintics(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The intervals for which newton_schulz asks for a polynomial."""
    asked: list[tuple[float, float]] = []

    def counted(low: float, high: float) -> tuple[tuple[float, float, float], float]:
        asked.append((low, high))
        return optimal_quintic(low, high)

    monkeypatch.setattr(iterations, "optimal_quintic", counted)
    return asked


class TestNewtonSchulz:
    @pytest.mark.parametrize(("condition", "steps"), [(1, 1), (10, 3), (1e2, 5), (1e3, 6), (1e4, 8), (1e5, 9)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_singular_vectors(
        self, condition: float, steps: int, dtype: torch.dtype, quintics: list[tuple[float, float]]
    ) -> None:
        X = cases.with_spectrum(96, 64, spectrum(64, condition), seed=3).to(dtype)
        Q = newton_schulz(X, 1 / condition)
        assert len(quintics) == steps  # cubic steps do the rest
        assert spectral(Q.T @ Q - torch.eye(64)) < 16 * EPS[dtype]
        assert spectral(Q - factor(X)) < 100 * EPS[dtype] * condition

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 1), (7, 7), (300, 20)])
    def test_shapes(self, m: int, n: int, dtype: torch.dtype) -> None:
        X = cases.with_spectrum(m, n, torch.linspace(1, 0.2, n, dtype=torch.float64), seed=n).to(dtype)
        Q = newton_schulz(X, 0.2)
        assert spectral(Q - factor(X)) < 100 * EPS[dtype]

    def test_a_lower_bound_suffices(self) -> None:
        X = 0.8 * cases.with_spectrum(60, 40, spectrum(40, 30), seed=4)
        assert spectral(newton_schulz(X, 1e-3) - factor(X)) < 1e-11

    def test_values_at_the_ends_of_the_interval(self) -> None:
        for values in ([1.0] * 20, [1e-3] * 20, [1.0] * 10 + [1e-3] * 10):
            X = cases.with_spectrum(30, 20, values, seed=5)
            assert spectral(newton_schulz(X, 1e-3) - factor(X)) < 1e-11

    @pytest.mark.parametrize("smallest", [0.6118319, 0.0715])
    def test_all_directions_at_the_point_where_the_polynomials_leave_the_most(self, smallest: float) -> None:
        low, high, error = smallest, 1.0, 1.0
        x = y = np.linspace(smallest, 1, 100_001)
        while error >= 1e-2:
            (a, b, c), error = optimal_quintic(low * 0.99, high * 1.01)
            y = a * y + b * y**3 + c * y**5
            low, high = 1 - error, 1 + error
        worst = float(x[np.abs(y * y - 1).argmax()])
        X = torch.diag(torch.full((64,), worst, dtype=torch.float64))
        assert spectral(newton_schulz(X, smallest) - torch.eye(64)) < 1e-12


class TestQDWH:
    @pytest.mark.parametrize("condition", [1, 1.5, 10, 1e3, 1e5, 1e8, 1e10])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_singular_vectors(self, condition: float, dtype: torch.dtype) -> None:
        if dtype == torch.float32 and condition > 1e5:
            condition **= 0.5
        X = cases.with_spectrum(96, 64, spectrum(64, condition), seed=6).to(dtype)
        Q = qdwh(X, 1 / condition)
        exact = factor(X)
        assert spectral(Q.T @ Q - torch.eye(64)) < 16 * EPS[dtype]
        assert spectral(Q - exact) < 100 * EPS[dtype] * condition
        H = Q.double().T @ X.double()
        assert spectral(H - H.T) < 20 * EPS[dtype]  # backward stable: Q' X is symmetric whatever the condition
        assert spectral(Q.double() @ (H + H.T) / 2 - X) < 40 * EPS[dtype]

    def test_takes_at_most_six_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = []

        def counted(name: str) -> Callable[..., object]:
            original = getattr(torch.linalg, name)

            def wrapped(*args: object) -> object:
                steps.append(name)
                return original(*args)

            return wrapped

        needed = {1.5: 3, 1e2: 4, 1e5: 5, 1e10: 5, 1e15: 6}
        inputs = {c: cases.with_spectrum(30, 20, spectrum(20, c), seed=7) for c in needed}
        for name in ("qr", "cholesky"):
            monkeypatch.setattr(torch.linalg, name, counted(name))
        for condition, most in needed.items():
            steps.clear()
            qdwh(inputs[condition], 1 / condition)
            assert len(steps) == most
            assert steps == sorted(steps, reverse=True)  # by QR while the weights are large, by Cholesky after

    @pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 1), (7, 7), (300, 20)])
    def test_shapes(self, m: int, n: int) -> None:
        X = cases.with_spectrum(m, n, torch.linspace(1, 0.2, n, dtype=torch.float64), seed=n)
        assert spectral(qdwh(X, 0.2) - factor(X)) < 1e-13

    def test_a_lower_bound_suffices(self) -> None:
        X = 0.8 * cases.with_spectrum(60, 40, spectrum(40, 30), seed=8)
        assert spectral(qdwh(X, 1e-6) - factor(X)) < 1e-12
