"""Truncated SVDs: only what is unique is compared - singular values, products and projectors."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import Components, LowRank, truncated_svd
from dcmerge_ext.errors import ConvergenceError

SHAPES = [(20, 30, 5), (30, 20, 20), (16, 16, 1), (1, 7, 1), (7, 1, 1), (1, 1, 1)]


def product(c: Components) -> Tensor:
    return c.U * c.S[..., None, :] @ c.Vh


def check_orthonormal_where_live(c: Components, atol: float) -> None:
    """U'U and V'V are the identity on live components and zero on null ones."""
    live = torch.diag_embed((c.S > 0).to(c.S.dtype))
    torch.testing.assert_close(c.U.mT @ c.U, live, rtol=0, atol=atol)
    torch.testing.assert_close(c.Vh @ c.Vh.mT, live, rtol=0, atol=atol)


class TestExact:
    @pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
    def test_equals_the_float64_oracle(self, m: int, n: int, rank: int, dtype: torch.dtype, tolerance: float) -> None:
        A = cases.with_spectrum(m, n, cases.power_law(min(m, n), 1.0), seed=m).to(dtype)
        found = truncated_svd(A, rank)
        assert (found.U.shape, found.S.shape, found.Vh.shape) == ((m, rank), (rank,), (rank, n))
        assert {x.dtype for x in found} == {dtype}
        assert cases.error(found.S[None], torch.linalg.svdvals(A.double())[None, :rank]) < tolerance
        assert cases.error(product(found), cases.truncated(A, rank)) < tolerance
        check_orthonormal_where_live(found, 10 * tolerance)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_decomposed_in_float32(self, dtype: torch.dtype) -> None:
        A = cases.normal(9, 6, seed=1).to(dtype)
        for half, single in zip(truncated_svd(A, 3), truncated_svd(A.float(), 3), strict=True):
            assert torch.equal(half, single)

    def test_leading_dimensions_equal_the_loop(self) -> None:
        A = cases.normal(2, 3, 9, 6, seed=2)
        A[0, 1] = 0
        A[1, 2] = cases.with_spectrum(9, 6, [2, 1], seed=3)
        found = truncated_svd(A, 4)
        assert found.U.shape == (2, 3, 9, 4)
        for i in range(2):
            for j in range(3):
                alone = truncated_svd(A[i, j], 4)
                assert cases.error(found.S[i, j][None], alone.S[None]) < 1e-13
                assert cases.error(product(found)[i, j], product(alone)) < 1e-12

    def test_strided_views(self) -> None:
        A = cases.normal(12, 20, seed=4).T[::2]
        assert cases.error(product(truncated_svd(A, 3)), cases.truncated(A, 3)) < 1e-12

    def test_repeated_singular_values_give_the_invariant_subspace(self) -> None:
        A = cases.with_spectrum(20, 15, [3, 3, 3, 1, 1], seed=5)
        found = truncated_svd(A, 3)
        assert cases.error(found.U @ found.U.T, A @ A.T @ found.U @ found.U.T / 9) < 1e-12
        assert cases.error(found.S[None], torch.full((1, 3), 3.0)) < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
    def test_null_slots_are_exactly_zero(self, dtype: torch.dtype, scale: float) -> None:
        A = (scale * cases.with_spectrum(40, 30, [4, 2, 1], seed=6)).to(dtype)
        found = truncated_svd(A, 10)
        assert (found.S[:3] > 0).all()
        assert (found.S[3:] == 0).all()
        assert (found.U[:, 3:] == 0).all()
        assert (found.Vh[3:] == 0).all()
        check_orthonormal_where_live(found, 1e-5 if dtype == torch.float32 else 1e-12)

    def test_a_zero_matrix_has_only_null_components(self) -> None:
        assert all((x == 0).all() for x in truncated_svd(torch.zeros(5, 4), 3))

    def test_the_input_is_left_alone(self) -> None:
        A = cases.normal(6, 5, seed=7)
        before = A.clone()
        truncated_svd(A, 2)
        assert torch.equal(A, before)


class TestLowRank:
    @pytest.mark.parametrize(("m", "n", "r"), [(40, 25, 4), (25, 40, 1), (6, 5, 9), (30, 3, 8)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_dense_product(self, m: int, n: int, r: int, dtype: torch.dtype) -> None:
        update = LowRank(cases.normal(m, r, seed=8, dtype=dtype), cases.normal(r, n, seed=9, dtype=dtype))
        rank = min(m, n, r)
        found = truncated_svd(update, rank)
        exact = update.left.double() @ update.right.double()
        assert {x.dtype for x in found} == {torch.float64}
        assert cases.error(product(found), exact) < 1e-12
        assert cases.error(found.S[None], torch.linalg.svdvals(exact)[None, :rank]) < 1e-12
        check_orthonormal_where_live(found, 1e-12)

    def test_truncates(self) -> None:
        update = cases.lora_updates([8], 40, 25)[0]
        assert cases.error(product(truncated_svd(update, 3)), cases.truncated(update, 3)) < 1e-12

    def test_slots_beyond_the_rank_are_null(self) -> None:
        found = truncated_svd(cases.lora_updates([3], 40, 25)[0], 7)
        assert (found.U.shape, found.S.shape, found.Vh.shape) == ((40, 7), (7,), (7, 25))
        assert int((found.S > 0).sum()) == 3
        check_orthonormal_where_live(found, 1e-12)

    def test_rank_zero_has_only_null_components(self) -> None:
        found = truncated_svd(LowRank(torch.ones(2, 5, 0), torch.ones(2, 0, 4)), 2)
        assert found.U.shape == (2, 5, 2)
        assert all((x == 0).all() for x in found)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_factors_that_share_directions_have_a_lower_rank(self, dtype: torch.dtype) -> None:
        left, right = cases.normal(30, 2, seed=10).to(dtype), cases.normal(2, 20, seed=11).to(dtype)
        found = truncated_svd(LowRank(torch.cat([left, left], dim=1), torch.cat([right, right])), 4)
        assert int((found.S > 0).sum()) == 2
        assert cases.error(product(found), 2 * left.double() @ right.double()) < 1e-12

    def test_round_off_of_float32_factors_is_no_direction(self) -> None:
        left = (cases.orthonormal(300, 2, 25) @ cases.normal(2, 4, seed=26)).float()
        found = truncated_svd(LowRank(left, cases.orthonormal(200, 4, 27).T.float()), 4)
        assert int((found.S > 0).sum()) == 2

    def test_an_untrained_adapter_is_null(self) -> None:
        found = truncated_svd(LowRank(torch.zeros(30, 4), cases.normal(4, 20, seed=12, dtype=torch.float32)), 4)
        assert all((x == 0).all() for x in found)

    def test_condition_of_the_factors_does_not_matter(self) -> None:
        # left and right are nearly parallel columns, and their product has a flat spectrum
        mix = cases.with_spectrum(4, 4, [1, 1e-2, 1e-4, 1e-6], seed=13)
        left, right = cases.orthonormal(30, 4, 14) @ mix, torch.linalg.inv(mix) @ cases.orthonormal(20, 4, 15).T
        assert cases.error(truncated_svd(LowRank(left, right), 4).S[None], torch.ones(1, 4)) < 1e-9

    def test_leading_dimensions_equal_the_loop(self) -> None:
        update = LowRank(cases.normal(3, 12, 4, seed=16), cases.normal(3, 4, 9, seed=17))
        update.left[1, :, 2:] = 0
        found = truncated_svd(update, 6)
        assert (found.S > 0).sum(-1).tolist() == [4, 2, 4]
        for i in range(3):
            assert cases.error(product(found)[i], update.dense()[i]) < 1e-12


class TestFast:
    @pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize(("m", "n"), [(120, 90), (90, 120)])
    def test_captures_nearly_the_optimal_squared_norm(self, exponent: float, m: int, n: int) -> None:
        A = cases.with_spectrum(m, n, cases.power_law(90, exponent), seed=18)
        found = truncated_svd(A, 20, accuracy="fast")
        optimal = cases.power_law(20, exponent).square().sum()
        captured = A.square().sum() - (A - product(found)).square().sum()
        assert 0.99 * optimal <= captured <= optimal * (1 + 1e-12)
        check_orthonormal_where_live(found, 1e-12)
        assert (found.S.diff() <= 0).all()

    def test_is_exact_on_a_matrix_of_low_rank(self) -> None:
        A = cases.with_spectrum(80, 60, [3, 2, 1], seed=19)
        found = truncated_svd(A, 10, accuracy="fast")
        assert cases.error(product(found), A) < 1e-12
        assert (found.S > 0).sum() == 3

    def test_the_seed_decides_the_result(self) -> None:
        A = cases.with_spectrum(80, 60, cases.power_law(60, 0.3), seed=20)
        first, again, other = (truncated_svd(A, 10, accuracy="fast", seed=s) for s in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first.S, other.S)

    def test_the_global_generator_is_neither_read_nor_changed(self) -> None:
        A = cases.with_spectrum(80, 60, cases.power_law(60, 0.3), seed=21)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = truncated_svd(A, 10, accuracy="fast")
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(truncated_svd(A, 10, accuracy="fast").S, first.S)

    def test_a_rank_near_the_side_is_computed_exactly(self) -> None:
        A = cases.with_spectrum(30, 30, cases.power_law(30, 0.3), seed=22)
        assert all(
            torch.equal(a, b) for a, b in zip(truncated_svd(A, 20, accuracy="fast"), truncated_svd(A, 20), strict=True)
        )

    def test_leading_dimensions(self) -> None:
        A = torch.stack([cases.with_spectrum(60, 50, cases.power_law(50, 2.0), seed=s) for s in (23, 24)])
        found = truncated_svd(A, 5, accuracy="fast")
        for i in range(2):
            assert cases.error(product(found)[i], cases.truncated(A[i], 5)) < 1e-4


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (0, {}, r"rank must lie in 1 \.\. 4 for a 5 x 4 matrix, got 0"),
        (5, {}, r"rank must lie in 1 \.\. 4 for a 5 x 4 matrix, got 5"),
        (2, {"accuracy": "rough"}, r"accuracy must be 'exact' or 'fast', got 'rough'"),
    ],
)
@pytest.mark.parametrize("A", [torch.ones(5, 4), LowRank(torch.ones(5, 2), torch.ones(2, 4))], ids=["dense", "lowrank"])
def test_wrong_arguments_are_named(A: Tensor | LowRank, rank: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncated_svd(A, rank, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_non_finite_input_raises(value: float, accuracy: str) -> None:
    A = torch.ones(40, 30)
    A[3, 4] = value
    with pytest.raises(ConvergenceError, match=r"SVD of a .* matrix failed"):
        truncated_svd(A, 2, accuracy=accuracy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_beyond_the_range_of_the_dtype_raise(dtype: torch.dtype) -> None:
    A = torch.full((40, 30), torch.finfo(dtype).max / 2, dtype=dtype)
    with pytest.raises(ConvergenceError, match=r"SVD of a 40 x 30 matrix failed"):
        truncated_svd(A, 2)
