"""Measures of similarity against their definitions, in every form an update has, and on degenerate input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dcmerge_ext
from dcmerge_ext import Components, LowRank, truncated_svd
from dcmerge_ext.errors import InputError
from dcmerge_ext.linalg import polar
from dcmerge_ext.lowrank import Update
from dcmerge_ext.metrics import (
    basis_coefficients,
    cos_sim,
    dir_sim,
    normalized_accuracy,
    normalized_accuracy_improvement,
    projected_cos_sim,
    projected_dir_sim,
    r_matrix,
)

Measure = Callable[..., Tensor]
MEASURES = [cos_sim, dir_sim, projected_cos_sim, projected_dir_sim]
FORMS: dict[str, Callable[[Update], Update | Components]] = {
    "lowrank": lambda u: u,
    "dense": cases.dense,
    "components": lambda u: truncated_svd(u, 2),
}
every_measure = pytest.mark.parametrize("measure", MEASURES)


# --- the definitions, written out ------------------------------------------------------------------------------------


def isometry(A: Tensor, rank: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :rank] @ Vh[:rank]


def cosine(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum() / (A.norm() * B.norm()))


def projected(A: Tensor, merged: Tensor, rank: int) -> Tensor:
    U = torch.linalg.svd(A, full_matrices=False)[0][:, :rank]
    return U @ (U.T @ merged)


def defined(measure: Measure, A: Tensor, B: Tensor, rank: int) -> float:
    """Of dense float64 matrices of that numerical rank, from full SVDs of m x n matrices."""
    if measure is projected_cos_sim:
        return cosine(A, projected(A, B, rank))
    if measure is projected_dir_sim:
        return cosine(isometry(A, rank), isometry(projected(A, B, rank), rank))
    return cosine(A, B) if measure is cos_sim else cosine(isometry(A, rank), isometry(B, rank))


def close(actual: Tensor, expected: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


class TestWorkedNumbers:
    @pytest.mark.parametrize("first", FORMS)
    @pytest.mark.parametrize("second", FORMS)
    def test_pair(self, first: str, second: str, backend: str) -> None:
        left, right = cases.worked_pair()
        a, b = FORMS[first](left), FORMS[second](right)
        close(r_matrix(a, b, rank=2), [[0.230940, 0.486864], [0, -0.096225]])
        close(cos_sim(a, b), 0.418718)
        close(dir_sim(a, b), 0.310790)

    @pytest.mark.parametrize("form", FORMS)
    def test_sum(self, form: str) -> None:
        pair = cases.worked_pair()
        total = sum(u.dense() for u in pair)
        for update, numbers in zip(pair, [(0.606536, 0.696256, 0.892812), (0.686857, 0.949783, 0.888134)], strict=True):
            found = [f(FORMS[form](update), total) for f in (dir_sim, projected_dir_sim, projected_cos_sim)]
            close(torch.stack(found), numbers)


class TestDefinitions:
    @every_measure
    @pytest.mark.parametrize(("m", "n", "rank"), [(12, 9, 3), (9, 12, 4), (10, 10, 10), (40, 30, 7)])
    def test_full_decompositions_agree(self, measure: Measure, m: int, n: int, rank: int) -> None:
        a, b = (u.dense() for u in cases.lora_updates([rank, rank], m, n, seed=m))
        assert float(measure(a, b)) == pytest.approx(defined(measure, a, b, rank), abs=1e-12)

    @pytest.mark.parametrize("rank", [1, 3, 8])
    def test_rank_truncates(self, rank: int) -> None:
        a, b = cases.full_updates(2, 14, 11, exponent=1.0)
        parts = [torch.linalg.svd(x, full_matrices=False) for x in (a, b)]
        assert float(dir_sim(a, b, rank=rank)) == pytest.approx(cosine(isometry(a, rank), isometry(b, rank)), abs=1e-12)
        for measure in (projected_dir_sim, projected_cos_sim):
            expected = defined(measure, cases.truncated(a, rank), b, rank)
            assert float(measure(a, b, rank=rank)) == pytest.approx(expected, abs=1e-12)
        R = (parts[0][0][:, :rank].T @ parts[1][0][:, :rank]) * (parts[0][2][:rank] @ parts[1][2][:rank].T)
        close(r_matrix(a, b, rank=rank), R, 1e-12)

    @settings(max_examples=25)
    @given(
        shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        seed=st.integers(0, 1000),
    )
    def test_through_r(self, shape: tuple[int, int], ranks: tuple[int, int], seed: int) -> None:
        m, n = shape
        a, b = (
            LowRank(cases.normal(m, r, seed=seed + i), cases.normal(r, n, seed=seed + i + 7))
            for i, r in enumerate(ranks)
        )
        R = r_matrix(a, b)
        s, t = (truncated_svd(x, R.shape[i]).S for i, x in enumerate((a, b)))
        assert float(cos_sim(a, b)) == pytest.approx(float(s @ R @ t / (s.norm() * t.norm())), abs=1e-11)
        assert float(dir_sim(a, b)) == pytest.approx(float(R.sum() / (len(s) * len(t)) ** 0.5), abs=1e-11)
        for measure in MEASURES:
            assert float(measure(a, b)) == pytest.approx(float(measure(a.dense(), b.dense())), abs=1e-10)

    def test_coefficients(self) -> None:
        U, V = cases.orthonormal(12, 4, 1), cases.orthonormal(9, 4, 2)
        (update,) = cases.lora_updates([3], 12, 9)
        for form in (update, update.dense()):
            found = basis_coefficients(U, V, form)
            close(found, (U.T @ update.dense() @ V).diagonal(), 1e-13)
            # sum / (sqrt(k) |Delta|) is the cosine with U V'
            angle = found.sum() / (2 * update.dense().norm())
            close(cos_sim(LowRank(U, V.T), form), angle, 1e-13)

    def test_own_coefficients_are_the_singular_values(self) -> None:
        (update,) = cases.full_updates(1, 12, 9)
        U, S, Vh = truncated_svd(update, 5)
        close(basis_coefficients(U, Vh.T, update), S, 1e-12)


class TestIdentities:
    @every_measure
    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    def test_an_update_agrees_with_itself(self, measure: Measure, form: str) -> None:
        (update,) = cases.lora_updates([4], 12, 9)
        same = FORMS[form](update)
        close(measure(same, same), 1.0, 1e-14)
        close(measure(same, update * -2.0), -1.0, 1e-14)
        assert float(measure(same, same)) <= 1.0

    @pytest.mark.parametrize("measure", [cos_sim, dir_sim])
    def test_symmetric(self, measure: Measure) -> None:
        a, b = cases.full_updates(2, 12, 9)
        close(measure(a, b), measure(b, a), 1e-13)

    @every_measure
    @pytest.mark.parametrize(("factor", "other"), [(1e-30, 1e30), (0.3, 7.0), (1e200, 1e200), (1e-200, 1e-200)])
    @pytest.mark.parametrize("first", ["lowrank", "dense"])
    @pytest.mark.parametrize("second", ["lowrank", "dense"])
    def test_scales_do_not_matter(self, measure: Measure, factor: float, other: float, first: str, second: str) -> None:
        a, b = cases.lora_updates([3, 4], 12, 9)
        close(measure(FORMS[first](a * factor), FORMS[second](b * other)), measure(a, b), 1e-12)

    def test_r_of_an_update_with_itself(self) -> None:
        (update,) = cases.full_updates(1, 12, 9)
        close(r_matrix(update, update), torch.eye(9), 1e-12)

    def test_dir_sim_is_the_cosine_of_the_polar_factors(self) -> None:
        a, b = cases.full_updates(2, 12, 9)
        close(dir_sim(a, b), cosine(polar(a).Q, polar(b).Q), 1e-12)

    def test_orthogonal_updates(self) -> None:
        P, Q = cases.orthonormal(12, 6, 1), cases.orthonormal(9, 6, 2)
        a, b = (LowRank(P[:, i], Q[:, i].T) for i in (slice(0, 3), slice(3, 6)))
        for x, y in ((a.dense().float(), b.dense()), (a.to(torch.float32), b), (a.dense(), b.dense().float())):
            assert projected_dir_sim(x, y) == projected_cos_sim(x, y) == 0  # to the digits of the coarser of the two
        for dtype in (torch.float32, torch.float64):
            a, b = (LowRank(P[:, i].to(dtype), Q[:, i].T.to(dtype)) for i in (slice(0, 3), slice(3, 6)))
            for measure in MEASURES:
                for x, y in ((a, b), (a.dense(), b.dense()), (a, b.dense())):
                    assert abs(float(measure(x, y))) < torch.finfo(dtype).eps * 10  # round-off has no direction


class TestForms:
    @every_measure
    def test_every_pair_of_forms(self, measure: Measure) -> None:
        a, b = cases.lora_updates([2, 2], 12, 9)
        expected = measure(a, b)
        for first in FORMS.values():
            for second in FORMS.values():
                close(measure(first(a), second(b)), expected, 1e-12)

    @every_measure
    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_other_dtypes(self, measure: Measure, form: str, dtype: torch.dtype) -> None:
        a, b = (FORMS[form](u.to(dtype)) for u in cases.lora_updates([5, 3], 40, 30))
        wide = [x.to(torch.float64) for x in (a, b)]  # what the entries are, exactly
        rank = {} if measure is cos_sim else {"rank": 3}
        found = measure(a, b, **rank)
        assert found.dtype == torch.float64
        close(found, measure(*wide, **rank), 1e-5)

    @every_measure
    @pytest.mark.parametrize("form", ["lowrank", "dense", "components"])
    def test_batches(self, measure: Measure, form: str) -> None:
        pairs = [cases.lora_updates([3, 2], 12, 9, seed=s) for s in range(6)]
        stacked = [
            LowRank(
                *(torch.stack([getattr(p[i], x) for p in pairs]).reshape(2, 3, *getattr(pairs[0][i], x).shape)
                  for x in ("left", "right"))
            )
            for i in range(2)
        ]  # fmt: skip
        found = measure(*(FORMS[form](u) for u in stacked))
        assert found.shape == (2, 3)
        alone = [measure(*(FORMS[form](u) for u in p)) for p in pairs]
        close(found.flatten(), torch.stack(alone), 1e-12)

    def test_low_rank_is_never_multiplied_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: LowRank) -> Tensor:
            raise AssertionError("made dense")

        a, b = cases.lora_updates([3, 2], 12, 9)
        monkeypatch.setattr(LowRank, "dense", refuse)
        big = LowRank(torch.ones(1_000_000, 1), torch.ones(1, 1_000_000))  # 3.6 TiB
        for measure in MEASURES:
            measure(a, b)
            close(measure(big, big), 1.0)
        close(basis_coefficients(big.left, big.right.mT, big), [1e12], 1.0)

    def test_a_basis_in_a_batch(self) -> None:
        U, V = cases.normal(2, 6, 3, seed=1), cases.normal(2, 5, 3, seed=2)
        update = cases.normal(2, 6, 5, seed=3)
        found = basis_coefficients(U, V, update)
        close(found, (U.mT @ update @ V).diagonal(dim1=-2, dim2=-1), 1e-12)


class TestRank:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    def test_null_components_do_not_count(self, dtype: torch.dtype, form: str) -> None:
        # rank 2 in factors of 5 columns; an SVD gives the null ones directions of their own
        (thin,) = cases.lora_updates([2], 40, 30, dtype=dtype)
        mix = cases.normal(2, 5, seed=3).to(dtype)
        wide = LowRank(thin.left @ mix, torch.linalg.pinv(mix) @ thin.right)
        (other,) = cases.lora_updates([4], 40, 30, seed=9, dtype=dtype)
        for measure in MEASURES:
            expected = measure(thin.to(torch.float64), other.to(torch.float64))
            close(measure(FORMS[form](wide), FORMS[form](other)), expected, 1e-12 if dtype == torch.float64 else 1e-5)
        R = r_matrix(FORMS[form](wide), FORMS[form](other))
        assert R[2:].count_nonzero() == 0

    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    def test_tolerance(self, form: str) -> None:
        a = LowRank(cases.orthonormal(12, 3, 1) * torch.tensor([1.0, 0.5, 1e-3]).double(), cases.orthonormal(9, 3, 2).T)
        b, c = cases.lora_updates([3, 2], 12, 9)
        x, y = FORMS[form](a), FORMS[form](b)
        close(dir_sim(x, y, tol=1e-2), dir_sim(truncated_svd(a, 2), b), 1e-12)
        assert (dir_sim(x, y) - dir_sim(x, y, tol=1e-2)).abs() > 1e-3
        assert r_matrix(x, y, tol=1e-2)[2].count_nonzero() == 0
        close(projected_dir_sim(x, y, tol=1e-2), projected_dir_sim(truncated_svd(a, 2), b, tol=1e-2), 1e-12)
        close(dir_sim(x, FORMS[form](c), tol=1.0), 0.0)  # everything is null

    def test_what_is_round_off_of_the_merged_update_is_null(self) -> None:
        P, Q = cases.orthonormal(30, 6, 1), cases.orthonormal(20, 6, 2)
        task, other = (LowRank(P[:, i], Q[:, i].T) for i in (slice(0, 3), slice(3, 6)))
        leak = LowRank(P[:, :1] * 1e-17, Q[:, :1].T)
        for merged in (other.dense() + leak.dense(), LowRank(other.left, other.right)):
            assert projected_dir_sim(task, merged) == projected_cos_sim(task, merged) == 0
        assert projected_dir_sim(task, other.dense() + 1e-6 * P[:, :1] @ Q[:, :1].T) > 0.5


class TestDegenerate:
    @every_measure
    @pytest.mark.parametrize("form", ["lowrank", "dense"])
    def test_zero_measures_zero(self, measure: Measure, form: str) -> None:
        a, zero = cases.lora_updates([3, 0], 12, 9)
        a, zero = FORMS[form](a), FORMS[form](zero)
        for x, y in ((a, zero), (zero, a), (zero, zero)):
            close(measure(x, y), 0.0, 0.0)

    @every_measure
    def test_one_zero_in_a_batch(self, measure: Measure) -> None:
        a, b = cases.full_updates(2, 6, 5)
        found = measure(torch.stack([a, a * 0]), torch.stack([b, b]))
        close(found, torch.stack([measure(a, b), torch.zeros((), dtype=torch.float64)]), 1e-12)

    @every_measure
    @pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
    def test_single_rows_and_columns(self, measure: Measure, shape: tuple[int, int]) -> None:
        a, b = (cases.normal(*shape, seed=s) for s in (1, 2))
        found = measure(a, b)
        assert found.isfinite()
        if shape == (1, 1):
            close(found, float((a * b).sign()), 1e-14)

    @every_measure
    @pytest.mark.parametrize(("factor", "other"), [(1e25, 1e-30), (1e25, 1e25), (1e-30, 1e-30)])
    @pytest.mark.parametrize("first", ["lowrank", "dense"])
    @pytest.mark.parametrize("second", ["lowrank", "dense"])
    def test_float32_beyond_the_range_of_its_squares(
        self, measure: Measure, factor: float, other: float, first: str, second: str
    ) -> None:
        a, b = cases.lora_updates([4, 4], 12, 9, dtype=torch.float32)
        options = {} if measure is cos_sim else {"rank": 4}
        found = measure(FORMS[first](a * factor), FORMS[second](b * other), **options)
        close(found, measure(a, b), 1e-5)


class TestErrors:
    A = torch.ones(4, 3)

    @pytest.mark.parametrize("measure", [*MEASURES, r_matrix])
    def test_shapes(self, measure: Measure) -> None:
        with pytest.raises(InputError, match=rf"{measure.__name__}: .*\(4, 3\) and \(3, 4\)"):
            measure(self.A, self.A.T)
        with pytest.raises(InputError, match=r"of one shape, got \(3,\) and \(3,\)"):
            measure(self.A[0], self.A[0])

    @pytest.mark.parametrize("measure", [*MEASURES, r_matrix])
    def test_values(self, measure: Measure) -> None:
        with pytest.raises(InputError, match=rf"{measure.__name__}: .*\(4, 3\) holds 12 NaN or Inf"):
            measure(self.A, self.A / 0)
        with pytest.raises(TypeError, match=rf"{measure.__name__}: needs a floating dtype, got torch.int64"):
            measure(self.A.long(), self.A)

    @pytest.mark.parametrize("measure", [r_matrix, dir_sim, projected_cos_sim, projected_dir_sim])
    def test_options(self, measure: Measure) -> None:
        with pytest.raises(ValueError, match="tol must be 0 or more"):
            measure(self.A, self.A, tol=-1.0)
        with pytest.raises(ValueError, match=r"rank must lie in 1 \.\. 3"):
            measure(self.A, self.A, rank=4)
        with pytest.raises(ValueError, match=r"rank must lie in 1 \.\. 2, the components given, got 3"):
            measure(truncated_svd(self.A, 2), self.A, rank=3)

    def test_bases(self) -> None:
        with pytest.raises(InputError, match=r"needs U \(4,\) x k and V \(3,\) x k .* got \(4, 2\) and \(2, 3\)"):
            basis_coefficients(torch.ones(4, 2), torch.ones(2, 3), self.A)
        with pytest.raises(InputError, match="holds 6 NaN"):
            basis_coefficients(torch.ones(4, 2), torch.full((3, 2), float("nan")), self.A)


# --- accuracies (normalized_accuracy itself: tests/test_demo.py) -----------------------------------------------------


class TestImprovement:
    def test_share_of_the_gain(self) -> None:
        found = normalized_accuracy_improvement([0.7, 0.5, 0.9, 0.4], [0.9, 0.9, 0.8, 0.9], [0.5] * 4)
        assert found == pytest.approx([0.5, 0.0, 4 / 3, -0.25])

    def test_from_a_base_that_knows_nothing_its_mean_is_normalized_accuracy(self) -> None:
        merged, tuned = [0.4, 0.9], [0.8, 0.9]
        found = normalized_accuracy_improvement(merged, tuned, [0.0, 0.0])
        assert sum(found) / 2 == pytest.approx(normalized_accuracy(merged, tuned))

    @pytest.mark.parametrize(
        ("merged", "finetuned", "base", "message"),
        [
            ([0.5, 0.5], [0.9, 0.6], [0.1, 0.6], "took task 1 from accuracy 0.6 to 0.6"),
            ([0.5], [0.4], [0.6], "took task 0 from accuracy 0.6 to 0.4"),
            ([0.5], [float("nan")], [0.1], "to nan"),
            ([0.5], [0.9, 0.9], [0.1], "1 of the merged model and 2 of the fine-tuned models and 1 of the base"),
            ([], [], [], "0 of the merged model"),
        ],
    )
    def test_refused(self, merged: list[float], finetuned: list[float], base: list[float], message: str) -> None:
        with pytest.raises(InputError, match=message):
            normalized_accuracy_improvement(merged, finetuned, base)


def test_the_module_is_part_of_the_package() -> None:
    assert dcmerge_ext.metrics.dir_sim is dir_sim
    assert all(hasattr(dcmerge_ext.metrics, name) for name in dcmerge_ext.metrics.__all__)
