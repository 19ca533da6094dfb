"""Truncated SVDs: only what is unique is compared - singular values, products and projectors."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcmerge_ext import Components, LowRank, reference, truncated_svd, use_backend
from dcmerge_ext.errors import ConvergenceError
from dcmerge_ext.products import gram_float64
from dcmerge_ext.svd import cost, decompose

SHAPES = [(20, 30, 5), (30, 20, 20), (16, 16, 1), (1, 7, 1), (7, 1, 1), (1, 1, 1)]

# what fast approximates, 90 singular values each
SPECTRA = {
    "j^-0.1": cases.power_law(90, 0.1),
    "j^-0.5": cases.power_law(90, 0.5),
    "j^-1": cases.power_law(90, 1.0),
    "j^-2": cases.power_law(90, 2.0),
    "0.9^j": 0.9 ** torch.arange(90, dtype=torch.float64),
    "0.5^j": 0.5 ** torch.arange(90, dtype=torch.float64),
    "flat": torch.ones(90, dtype=torch.float64),
    "two values": torch.cat([torch.ones(10), torch.full((80,), 0.1)]).double(),
    "copies": cases.power_law(9, 0.5).repeat_interleave(10),
    "an outlier": torch.cat([torch.tensor([1e3]), cases.power_law(89, 0.1)]),
    "rank 7": cases.power_law(7, 0.5),
}


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

    @pytest.mark.parametrize(("m", "n", "rank"), [(512, 512, 16), (700, 400, 8), (400, 700, 8)])
    def test_a_large_matrix_takes_the_krylov_route_and_equals_the_float64_oracle(
        self, m: int, n: int, rank: int
    ) -> None:
        A = cases.with_spectrum(m, n, cases.power_law(400, 0.5), seed=m).float()
        found, (evidence,) = decompose(A, rank)
        assert (evidence.route, cost.plan(m, n, rank).route) == ("krylov", "krylov")
        U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
        assert cases.error(found.S[None], S[None, :rank]) < 3e-7
        assert cases.error(found.U.double() @ found.U.double().T, U[:, :rank] @ U[:, :rank].T) < 5e-6
        assert cases.error(found.Vh.double().T @ found.Vh.double(), Vh[:rank].T @ Vh[:rank]) < 5e-6
        check_orthonormal_where_live(found, 1e-5)

    @pytest.mark.parametrize(("seed", "n"), [(414, 256), (515, 512)])
    def test_sparse_matrices_on_which_the_eigensolver_gives_up(self, seed: int, n: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(n, n, generator=generator)
        A *= torch.rand(n, 1, generator=generator) < 0.3
        A *= torch.rand(1, n, generator=generator) < 0.1
        found = truncated_svd(A, n // 2)
        assert (found.S.double() - torch.linalg.svdvals(A.double())[: n // 2]).abs().max() < 2e-6 * found.S[0]
        assert cases.error(product(found), A) < 3e-6
        check_orthonormal_where_live(found, 1e-5)

    def test_no_gradient_is_recorded(self) -> None:
        assert not truncated_svd(cases.normal(6, 5, seed=7).requires_grad_(), 2).S.requires_grad

    @pytest.mark.parametrize(("m", "n"), [(1, 40), (40, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_one_row_or_column(self, m: int, n: int, dtype: torch.dtype) -> None:
        A = cases.normal(m, n, seed=28, dtype=dtype)
        found = truncated_svd(A, 1)
        assert found.S.item() == pytest.approx(A.norm().item(), rel=1e-6)
        assert cases.error(product(found), A) < 1e-6

    @given(
        m=st.integers(1, 24),
        n=st.integers(1, 24),
        values=st.lists(st.sampled_from([0.0, 1e-9, 1e-4, 0.5, 1.0, 1.0, 3.0]), max_size=24),
        rank=st.integers(1, 24),
        seed=st.integers(0, 999),
    )
    def test_any_small_matrix(self, m: int, n: int, values: list[float], rank: int, seed: int) -> None:
        values = sorted(values, reverse=True)[: min(m, n)]
        rank = min(rank, m, n)
        A = cases.with_spectrum(m, n, values, seed).float() if values else torch.zeros(m, n)
        found = truncated_svd(A, rank)
        exact = torch.linalg.svdvals(A.double())
        assert (found.S.double() - exact[:rank]).abs().max() <= 2e-6 * exact[0]
        check_orthonormal_where_live(found, 1e-5)
        assert (A.double() - product(found).double()).norm() <= exact[rank:].norm() + 1e-5 * exact[0]


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

    @pytest.mark.parametrize("condition", [1e4, 1e6, 1e8, 1e10, 1e12, 1e14])
    @pytest.mark.parametrize("side", ["left", "right", "both"])
    def test_nearly_dependent_columns(self, condition: float, side: str) -> None:
        exponents = torch.linspace(0, -1, 12, dtype=torch.float64)
        left, right = cases.orthonormal(90, 12, 29), cases.orthonormal(70, 12, 30).T
        if side != "right":
            left = cases.with_spectrum(90, 12, condition**exponents, seed=29)
        if side != "left":
            right = cases.with_spectrum(12, 70, condition**exponents, seed=30)
        found = truncated_svd(LowRank(left, right), 12)
        exact = torch.linalg.svdvals(left @ right)
        assert cases.error(found.S[None], exact[None, :12]) < 1e-14
        assert cases.error(product(found), left @ right) < 1e-13
        check_orthonormal_where_live(found, 1e-12)

    def test_nearly_dependent_columns_go_to_householders_qr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        qr, called = torch.linalg.qr, []

        def counted(X: Tensor) -> object:
            called.append(X.shape)
            return qr(X)

        monkeypatch.setattr(torch.linalg, "qr", counted)
        left = cases.normal(3, 30, 4, seed=31)
        update = LowRank(left, cases.normal(3, 4, 20, seed=32))
        truncated_svd(update, 4)
        assert called == []
        left[1, :, 3] = left[1, :, 0] + 1e-9 * left[1, :, 3]
        found = truncated_svd(update, 4)
        assert called == [left.shape]  # one of a batch takes the others with it
        assert cases.error(product(found), update.dense()) < 1e-12
        check_orthonormal_where_live(found, 1e-12)

    @pytest.mark.parametrize("r", [7, 12, 40])
    @pytest.mark.parametrize("rank", [1, 4, 6])
    def test_more_columns_than_rows(self, r: int, rank: int) -> None:
        update = LowRank(cases.normal(2, 6, r, seed=33), cases.normal(2, r, 9, seed=34))
        found = truncated_svd(update, rank)
        for i in range(2):
            assert cases.error(product(found)[i], cases.truncated(update.dense()[i], rank)) < 1e-12
        check_orthonormal_where_live(found, 1e-12)

    def test_magnitudes_far_from_one(self) -> None:
        left, right = cases.normal(30, 3, seed=35), cases.normal(3, 20, seed=36)
        exact = torch.linalg.svdvals(left @ right)[None, :3]
        for scale in (1e-100, 1e-12, 1e12, 1e100):
            for update in (
                LowRank(scale * left, right),
                LowRank(left, scale * right),
                LowRank(scale * left, right / scale),
            ):
                found = truncated_svd(update, 3)
                size = found.S[0].item() / exact[0, 0].item()
                assert cases.error(found.S[None] / size, exact) < 1e-13
                check_orthonormal_where_live(found, 1e-12)

    def test_a_batch_equals_the_matrices_alone(self) -> None:
        update = LowRank(cases.normal(5, 40, 6, seed=37), cases.normal(5, 6, 30, seed=38))
        update.left[2, :, 4:] = 0
        update.right[3] *= 1e-12
        update.left[4] = 0
        found, (evidence,) = decompose(update, 8)
        assert (evidence.route, evidence.dimension, evidence.residual) == ("factors", 6, None)
        for i in range(5):
            alone = truncated_svd(LowRank(update.left[i], update.right[i]), 8)
            assert cases.error(found.S[i][None], alone.S[None]) < 1e-14
            assert cases.error(product(found)[i], product(alone)) < 1e-13
        assert (found.S > 0).sum(-1).tolist() == [6, 6, 4, 6, 0]

    @pytest.mark.parametrize("leading", [(0,), (2, 0)])
    def test_an_empty_batch(self, leading: tuple[int, ...]) -> None:
        found = truncated_svd(LowRank(torch.zeros(*leading, 6, 3), torch.zeros(*leading, 3, 5)), 2)
        assert [x.shape for x in found] == [(*leading, 6, 2), (*leading, 2), (*leading, 2, 5)]

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

    @pytest.mark.parametrize("spectrum", SPECTRA)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("m", "n", "rank"), [(120, 90, 20), (90, 120, 8), (90, 90, 40)])
    def test_evidence_holds_the_fraction_of_the_squared_norm_captured(
        self, spectrum: str, dtype: torch.dtype, m: int, n: int, rank: int
    ) -> None:
        A = cases.with_spectrum(m, n, SPECTRA[spectrum], seed=rank).to(dtype)
        found, (evidence,) = decompose(A, rank, accuracy="fast")
        assert (evidence.route, evidence.residual) == ("subspace", None)
        total, exact = A.double().square().sum().item(), torch.linalg.svdvals(A.double())
        left = (A.double() - found.U.double() * found.S.double() @ found.Vh.double()).square().sum().item()
        assert evidence.captured == pytest.approx(1 - left / total, abs=1e-5 if dtype == torch.float32 else 1e-12)
        # 0.93 of the optimum is what two power steps reach on a spectrum as flat as j^-0.1
        share = 0.92 if spectrum == "j^-0.1" else 0.99
        assert evidence.captured >= share * exact[:rank].square().sum().item() / total
        assert (found.S.double() <= exact[:rank] * (1 + 1e-5) + 1e-5 * exact[0]).all()  # never above the true values
        check_orthonormal_where_live(found, 2e-5)

    def test_a_zero_matrix_is_captured_whole(self) -> None:
        found, (evidence,) = decompose(torch.zeros(60, 50), 5, accuracy="fast")
        assert all((x == 0).all() for x in found)
        assert evidence.captured == 1

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_far_from_one(self, scale: float) -> None:
        A = cases.with_spectrum(60, 50, cases.power_law(50, 1.0), seed=39).float()
        plain, scaled = truncated_svd(A, 5, accuracy="fast"), truncated_svd(scale * A, 5, accuracy="fast")
        assert cases.error(scaled.S[None].double() / scale, plain.S[None]) < 1e-5

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


class TestProducts:
    @pytest.mark.parametrize("rows", [1, 2, 3, 63, 64, 65, 129])
    @pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1_000, 5_003])
    def test_the_gram_matrix_in_float64(self, rows: int, length: int) -> None:
        X = cases.normal(rows, length, seed=rows, dtype=torch.float32)
        found = gram_float64(X)
        assert found.dtype == torch.float64
        exact = (X.double() @ X.double().T).tril()  # the lower triangle alone is complete
        torch.testing.assert_close(found.tril(), exact, rtol=0, atol=1e-13 * max(length, 1))

    def test_of_strided_rows(self) -> None:
        X = cases.normal(300, 90, seed=40, dtype=torch.float32).T[::2]
        torch.testing.assert_close(gram_float64(X).tril(), (X.double() @ X.double().T).tril(), rtol=0, atol=1e-11)

    def test_no_digit_of_float32_is_lost(self) -> None:
        X = torch.full((3, 200_003), 1 + 2.0**-23)
        assert gram_float64(X).diagonal().tolist() == pytest.approx([200_003 * (1 + 2.0**-23) ** 2] * 3, rel=1e-13)


@pytest.mark.parametrize("rank", [1, 20, 50, 100])
@pytest.mark.parametrize(("m", "n"), [(500, 500), (900, 500)])
def test_matrices_of_low_rank_at_sizes_of_randomized_decompositions(m: int, n: int, rank: int) -> None:
    A = (cases.normal(m, rank, seed=31) @ cases.normal(rank, n, seed=32)).float()
    found = truncated_svd(A, 62)
    exact = torch.linalg.svdvals(A.double())[:62]
    assert (found.S - exact).abs().max() < 1e-5 * exact[0]
    assert int((found.S > 0).sum()) == min(rank, 62)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 5.0])
def test_spectra_that_fall_below_round_off(exponent: float) -> None:
    A = cases.with_spectrum(500, 500, cases.power_law(500, exponent), seed=33).float()
    found = truncated_svd(A, 62)
    assert (found.S - torch.linalg.svdvals(A.double())[:62]).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("A", "rank"),
    [
        (torch.ones(4), 1),
        (torch.ones(4, 3, dtype=torch.int64), 1),
        (torch.ones(4, 3, dtype=torch.complex64), 1),
        (torch.ones(4, 3), 1.5),
        (torch.ones(4, 3), None),
    ],
)
def test_what_is_no_matrix_or_no_rank_is_refused(A: Tensor, rank: Any) -> None:
    with pytest.raises(TypeError, match=r"truncated_svd: (needs a floating|rank must be an int)"):
        truncated_svd(A, rank)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_fast_survives_an_eigensolver_that_does_not_converge(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    A = cases.with_spectrum(*shape, cases.power_law(60, 1.0), seed=50).float()
    expected = truncated_svd(A, 8, accuracy="fast")

    def fails(symmetric: Tensor) -> tuple[Tensor, Tensor]:
        raise ConvergenceError("eigh did not converge")

    monkeypatch.setattr("dcmerge_ext.svd.dense.eigh", fails)
    U, S, Vh = truncated_svd(A, 8, accuracy="fast")
    assert torch.allclose(S, expected.S, rtol=1e-5)
    assert cases.error(U * S @ Vh, expected.U * expected.S @ expected.Vh) < 1e-5


def test_a_matrix_that_lapack_gives_up_on_in_float32_is_decomposed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    A = cases.normal(30, 30, seed=1, dtype=torch.float32)
    expected = truncated_svd(A, 30)
    original = reference.svd

    def give_up(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if X.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(X)

    monkeypatch.setattr(reference, "svd", give_up)
    with use_backend("reference"):
        found = truncated_svd(A, 30)
    assert found.U.dtype == torch.float32
    assert cases.error(found.S[None], expected.S[None]) < 1e-6
    assert cases.error(product(found), A) < 1e-6
    A[0, 0] = torch.nan
    with use_backend("reference"), pytest.raises(ConvergenceError):
        truncated_svd(A, 30)
