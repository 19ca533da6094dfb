"""torch's signatures for singular values, and torch's functions replaced inside a block."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import dcmerge_ext as dcm
from dcmerge_ext import LowRank, accelerate
from dcmerge_ext.linalg import svd, svd_lowrank
from dcmerge_ext.svd import dense

TORCH_SVD, TORCH_SVD_LOWRANK = torch.linalg.svd, torch.svd_lowrank


def tall(*leading: int, seed: int = 1) -> Tensor:
    return cases.normal(*leading, 60, 20, seed=seed, dtype=torch.float32)


FULL: dict[str, Callable[[], Tensor]] = {
    "tall": tall,
    "wide": lambda: tall().mT,
    "square batch": lambda: cases.normal(3, 2, 24, 24, seed=2, dtype=torch.float32),
    "float64 batch": lambda: cases.normal(3, 24, 10, seed=3),
    "strided batch": lambda: cases.normal(20, 50, 4, seed=4, dtype=torch.float32).permute(2, 1, 0),
    "rank deficient": lambda: tall()[:, :5] @ cases.normal(5, 20, seed=5, dtype=torch.float32),
    "steep": lambda: cases.with_spectrum(60, 20, cases.power_law(20, 9.0), seed=6).float(),
    "repeated values": lambda: cases.with_spectrum(60, 20, torch.ones(20), seed=7).float(),
    "large batch": lambda: cases.normal(3, 120, 60, seed=10, dtype=torch.float32),
    "large batch, rank deficient": lambda: (
        cases.normal(3, 120, 9, seed=10, dtype=torch.float32) @ cases.normal(9, 60, seed=1, dtype=torch.float32)
    ),
    "large batch, steep": lambda: (
        cases.with_spectrum(400, 60, cases.power_law(60, 4.0), seed=6).float().expand(2, -1, -1)
    ),
    "large batch, tiny": lambda: 1e-30 * cases.normal(3, 120, 60, seed=10, dtype=torch.float32),
    "large and wide": lambda: cases.normal(90, 300, seed=10, dtype=torch.float32),
    "large batch of zeros": lambda: torch.zeros(2, 300, 60),
    "zero": lambda: torch.zeros(60, 20),
    "tiny": lambda: tall() * 1e-30,
    "huge": lambda: tall() * 1e30,
    "one column": lambda: tall()[:, :1],
    "1 x 1": lambda: torch.full((3, 1, 1), -2.0),
    "one matrix, left to torch": lambda: cases.normal(24, 20, seed=8, dtype=torch.float32),
    "complex, left to torch": lambda: torch.complex(tall(), tall(seed=9)),
    "empty batch": lambda: torch.zeros(0, 9, 4),
    "no columns": lambda: torch.zeros(3, 9, 0),
}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("full_matrices", [False, True])
def test_the_full_decomposition_is_that_of_torch(name: str, full_matrices: bool) -> None:
    A = FULL[name]()
    found, expected = svd(A, full_matrices), TORCH_SVD(A, full_matrices)
    assert type(found) is type(expected)
    size = max(float(expected.S.max()) if expected.S.numel() else 0.0, 1e-37)
    round_off = 20 * torch.finfo(A.dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    q = min(A.shape[-2:])
    assert bool((found.S[..., 1:] <= found.S[..., :-1]).all())
    torch.testing.assert_close(found.S / size, expected.S / size, rtol=0, atol=round_off)
    back = (found.U[..., :q] * (found.S / size)[..., None, :].to(A.dtype)) @ found.Vh[..., :q, :]
    torch.testing.assert_close(back, A / size, rtol=0, atol=round_off)
    for basis in (found.U, found.Vh.mH):  # null directions have orthonormal vectors, too
        identity = torch.eye(basis.shape[-1], dtype=A.dtype).expand(*A.shape[:-2], -1, -1)
        torch.testing.assert_close(basis.mH @ basis, identity, rtol=0, atol=round_off)


def test_batches_and_wide_matrices_do_not_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("torch was called")

    monkeypatch.setattr(sys.modules["dcmerge_ext.linalg.svd"], "_torch_svd", refuse)
    for shape in ((100, 400), (2, 100, 90)):
        assert svd(cases.normal(*shape, seed=1, dtype=torch.float32), False).S.shape[-1] in (100, 90)
    for shape in ((40, 30), (400, 100)):
        with pytest.raises(AssertionError, match="torch was called"):
            svd(cases.normal(*shape, seed=1, dtype=torch.float32), False)


def test_the_gram_route_is_taken_and_as_accurate_as_lapack() -> None:
    A = cases.with_spectrum(400, 90, cases.power_law(90, 3.0), seed=2).float()
    U, S, Vh = dense.full(A)
    oracle = torch.linalg.svdvals(A.double())
    lapack = TORCH_SVD(A, full_matrices=False)
    assert float((S - oracle).abs().max()) <= max(2 * float((lapack.S - oracle).abs().max()), 1e-7)
    assert float((U * S @ Vh - A).norm() / A.norm()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    A = tall().to(dtype)
    assert all(torch.equal(x, y) for x, y in zip(svd(A, False), svd(A.float(), False), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(svd_lowrank(A, 3), svd_lowrank(A.float(), 3), strict=True))


def test_a_rank_is_a_truncated_svd() -> None:
    A = tall(2)
    found, expected = svd(A, rank=4), dcm.truncated_svd(A, 4)
    assert isinstance(found, torch.return_types.linalg_svd)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_factors_are_never_made_dense() -> None:
    update = LowRank(cases.normal(40, 3, seed=1), cases.normal(3, 30, seed=2))
    for found, rank in ((svd(update), 3), (svd(update, rank=2), 2)):
        assert [x.shape for x in found] == [(40, rank), (rank,), (rank, 30)]
        torch.testing.assert_close(found.S, torch.linalg.svdvals(update.dense())[:rank])
        torch.testing.assert_close(found.U * found.S @ found.Vh, cases.truncated(update.dense(), rank))
    empty = svd(LowRank(torch.zeros(2, 5, 0), torch.zeros(2, 0, 4)))
    assert [x.shape for x in empty] == [(2, 5, 0), (2, 0), (2, 0, 4)]


@pytest.mark.parametrize("rank", [None, 3])
def test_gradients_are_those_of_torch(rank: int | None) -> None:
    A, B = (tall().requires_grad_() for _ in range(2))
    svd(A, False, rank=rank).S.square().sum().backward()
    TORCH_SVD(B, False).S[:rank].square().sum().backward()
    torch.testing.assert_close(A.grad, B.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(60, 20), (3, 24, 24), (3, 90, 80), (90, 300)])
@pytest.mark.parametrize("run", [svd, lambda A: svd(A, rank=2), lambda A: svd_lowrank(A, 2)])
def test_what_is_not_finite_raises_as_torch_does(run: Any, shape: tuple[int, ...], bad: float) -> None:
    A = cases.normal(*shape, seed=1, dtype=torch.float32)
    A[..., 1, 1] = bad
    with pytest.raises(torch.linalg.LinAlgError):
        run(A)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tol": 0.1}, "tol belongs to rank"),
        ({"rank": 0}, "rank must lie in 1 .. 20"),
        ({"rank": 21}, "rank must lie in 1 .. 20"),
        ({"rank": 2, "driver": "gesvd"}, "driver and out"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_svd_refuses(arguments: dict[str, Any], says: str, gradient: bool) -> None:
    with pytest.raises(ValueError, match=says):
        svd(tall().requires_grad_(gradient), **arguments)


class TestSvdLowrank:
    @pytest.mark.parametrize(("m", "n", "q"), [(90, 60, 5), (60, 90, 5), (30, 20, 6), (4, 3, 6), (1, 1, 1), (9, 8, 0)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_at_least_as_accurate_as_torch(self, m: int, n: int, q: int, dtype: torch.dtype) -> None:
        A = cases.with_spectrum(m, n, cases.power_law(min(m, n), 1.0), seed=m).to(dtype)
        U, S, V = svd_lowrank(A, q)
        kept = min(q, m, n)
        assert [x.shape for x in (U, S, V)] == [(m, kept), (kept,), (n, kept)]
        best = cases.truncated(A, kept).double() if kept else torch.zeros(m, n, dtype=torch.float64)
        missed, least = (float((A.double() - x).norm()) for x in ((U * S @ V.mT).double(), best))
        assert missed <= 1.002 * least + 1e-5
        if 0 < kept < min(m, n):
            torch.manual_seed(0)
            u, s, v = TORCH_SVD_LOWRANK(A, q)
            assert missed <= float((A.double() - (u * s @ v.mT).double()).norm()) * (1 + 1e-6)

    def test_power_steps_make_it_more_accurate(self) -> None:
        A = cases.with_spectrum(200, 150, cases.power_law(150, 0.3), seed=1).float()
        captured = [float(svd_lowrank(A, 5, niter)[1].square().sum()) for niter in (0, 1, 4)]
        assert captured[0] < captured[1] < captured[2]

    def test_batches_means_and_seeds(self) -> None:
        A, M = tall(2, 3), tall(2, 3, seed=2)[..., :1, :]
        whole = svd_lowrank(A, 3, M=M, seed=5)
        assert [x.shape for x in whole] == [(2, 3, 60, 3), (2, 3, 3), (2, 3, 20, 3)]
        single = svd_lowrank(A[1, 2] - M[1, 2], 3, seed=5)
        torch.testing.assert_close(whole[1][1, 2], single[1])
        big = cases.normal(80, 70, seed=3, dtype=torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(svd_lowrank(big, 4), svd_lowrank(big, 4), strict=True))
        assert not torch.equal(svd_lowrank(big, 4)[1], svd_lowrank(big, 4, seed=1)[1])

    def test_torch_keeps_what_is_not_ours(self) -> None:
        torch.manual_seed(0)
        A = cases.normal(40, 30, seed=1)
        sparse = svd_lowrank(A.to_sparse(), 30)
        torch.testing.assert_close(sparse[1], torch.linalg.svdvals(A))
        A.requires_grad_()
        svd_lowrank(A, 30)[1].sum().backward()
        assert A.grad is not None

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="q and niter"):
            svd_lowrank(tall(), -1)
        with pytest.raises(ValueError, match="q and niter"):
            svd_lowrank(tall(), 2, -1)


class TestAutocast:
    def test_keeps_out_of_the_decompositions(self) -> None:
        A, X = cases.normal(3, 200, 90, seed=1, dtype=torch.float32), tall()
        outside = [svd(A, False).S, svd_lowrank(A, 4)[1], dcm.truncated_svd(A, 9).S, dcm.linalg.polar(X).Q]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = [svd(A, False).S, svd_lowrank(A, 4)[1], dcm.truncated_svd(A, 9).S, dcm.linalg.polar(X).Q]
        assert all(torch.equal(x, y) for x, y in zip(inside, outside, strict=True))

    @pytest.mark.parametrize("method", ["dc_merge", "tsv_m", "iso_c", "wudi"])
    def test_keeps_out_of_the_methods(self, method: str) -> None:
        updates = [tall(seed=seed) for seed in range(3)]
        outside = dcm.merge_updates(updates, method=method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(dcm.merge_updates(updates, method=method), outside)


class TestAccelerate:
    def test_swaps_inside_the_block_alone(self) -> None:
        A = cases.normal(90, 300, seed=1, dtype=torch.float32)
        with accelerate():
            assert torch.linalg.svd is not TORCH_SVD
            inside = torch.linalg.svd(A, full_matrices=False)
            low = torch.svd_lowrank(A, 3)
        assert (torch.linalg.svd, torch.svd_lowrank) == (TORCH_SVD, TORCH_SVD_LOWRANK)
        assert all(torch.equal(x, y) for x, y in zip(inside, svd(A, False), strict=True))
        assert all(torch.equal(x, y) for x, y in zip(low, svd_lowrank(A, 3), strict=True))

    def test_is_undone_by_an_error_and_where_blocks_nest(self) -> None:
        A = cases.normal(40, 30, seed=1, dtype=torch.float32)

        def fail() -> None:
            with accelerate(rank=3, null_vectors="zero"):
                with accelerate():
                    assert bool((torch.linalg.svd(A).S > 0).all())
                assert int((torch.linalg.svd(A).S > 0).sum()) == 3
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert torch.linalg.svd is TORCH_SVD

    def test_other_threads_keep_torch(self) -> None:
        A = cases.normal(40, 30, seed=1, dtype=torch.float32)
        seen: list[int] = []

        def other() -> None:
            seen.append(int((torch.linalg.svd(A).S > 0).sum()))

        with accelerate(rank=3, null_vectors="zero"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            other()
        assert seen == [30, 3]

    @pytest.mark.parametrize("full_matrices", [False, True])
    @pytest.mark.parametrize("shape", [(40, 30), (30, 40), (2, 3, 25, 25)])
    def test_a_rank_keeps_the_shapes_of_torch(self, shape: tuple[int, ...], full_matrices: bool) -> None:
        A = cases.normal(*shape, seed=1, dtype=torch.float32)
        expected = TORCH_SVD(A, full_matrices)
        with accelerate(rank=4, null_vectors="zero"):
            U, S, Vh = found = torch.linalg.svd(A, full_matrices)
        assert [x.shape for x in found] == [x.shape for x in expected]
        torch.testing.assert_close(S[..., :4], expected.S[..., :4])
        assert not S[..., 4:].any()
        assert not U[..., 4:].any()
        assert not Vh[..., 4:, :].any()
        product = (U[..., :4] * S[..., None, :4]) @ Vh[..., :4, :]
        torch.testing.assert_close(product, cases.truncated(A, 4).float(), atol=2e-5, rtol=1e-4)

    def test_smaller_matrices_and_gradients_are_whole(self) -> None:
        A = cases.normal(9, 4, seed=1, dtype=torch.float32)
        B = cases.normal(40, 30, seed=1, dtype=torch.float32).requires_grad_()
        with accelerate(rank=4, null_vectors="zero"):
            assert bool((torch.linalg.svd(A).S > 0).all())
            S = torch.linalg.svd(B).S
        assert bool((S > 0).all())
        S.sum().backward()
        assert B.grad is not None

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"rank": 3}, "go together"),
            ({"null_vectors": "zero"}, "go together"),
            ({"rank": 0, "null_vectors": "zero"}, "1 or more"),
            ({"rank": 3, "null_vectors": "random"}, "'orthonormal' or 'zero'"),
        ],
    )
    def test_refuses(self, arguments: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says), accelerate(**arguments):
            pass
        assert torch.linalg.svd is TORCH_SVD

    def test_merges_inside_a_block_are_the_same(self) -> None:
        updates = [tall(seed=seed) for seed in range(3)]
        outside = dcm.methods.tsv_m(updates)
        with accelerate(
            rank=1, null_vectors="zero"
        ):  # the package itself never calls the functions that are swapped in
            inside = dcm.methods.tsv_m(updates)
        assert torch.equal(inside, outside)

    def test_deterministic_algorithms(self) -> None:
        A = cases.normal(3, 40, 30, seed=1, dtype=torch.float32)
        torch.use_deterministic_algorithms(True)
        try:
            results = [(*svd(A, False), *svd(A, rank=4), *svd_lowrank(A, 4)) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_svd_of_something_else() -> None:
    with pytest.raises(TypeError, match="svd: needs a tensor or a LowRank, got list"):
        svd([[1.0]])  # type: ignore[arg-type]
