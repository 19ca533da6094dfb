"""Iso-C and Iso-CTS: worked numbers, the published algorithms, their identities, and degenerate input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcmerge_ext import LowRank, list_methods, merge_updates
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import Context, create, iso_c, iso_cts
from dcmerge_ext.methods.registry import preset_of
from dcmerge_ext.updates import Updates, UpdateSpec

# What the authors' code returns for the worked pair.
WORKED_C = [
    [1.656901, 0.906474, -0.840577, 2.024886],
    [-0.889370, 0.065800, 2.224507, 1.621731],
    [1.325345, 1.733564, 1.408678, -1.275772],
    [-1.755252, 2.131310, -0.856958, 0.126409],
]
WORKED_CTS = [
    [1.834618, 0.828616, -2.253811, 0.667249],
    [-0.280626, 2.081558, 1.122020, 1.976550],
    [1.294354, 1.593771, 1.024829, -2.076434],
    [-2.111252, 1.420464, -1.479339, -0.955910],
]
# q, tasks, (c, p)
PUBLISHED_SIZES = [
    (768, 8, (616, 19)),
    (768, 14, (614, 11)),
    (768, 20, (608, 8)),
    (1024, 8, (816, 26)),
    (1024, 14, (814, 15)),
    (1024, 20, (824, 10)),
    (512, 8, (408, 13)),
    (512, 14, (414, 7)),
    (512, 20, (412, 5)),
    (50, 20, (50, 0)),
]

both = pytest.mark.parametrize("method", ["iso_c", "iso_cts"])


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(A, full_matrices=False)


def procrustes(X: Tensor) -> Tensor:
    P, _, Qh = svd(X)
    return P @ Qh


def published_c(updates: Sequence[Tensor]) -> Tensor:
    """arXiv 2502.04959, Iso-C: the SVD of the sum, with its mean singular value."""
    U, S, Vh = svd(torch.stack(list(updates)).sum(0))
    return S.mean() * U @ Vh


def published_cts(updates: Sequence[Tensor], gamma: float = 0.8, q: int | None = None) -> Tensor:
    """arXiv 2502.04959, Iso-CTS: projection of each dense update, full SVDs, task blocks before the common one."""
    U, S, Vh = svd(torch.stack(list(updates)).sum(0))
    q = q or min(updates[0].shape)
    own = round((q - int(q * gamma)) / len(updates))
    common = q - own * len(updates)
    basis = U[:, :common]
    rests = [svd(update - basis @ basis.T @ update) for update in updates]
    left = torch.cat([P[:, :own] for P, _, _ in rests] + [basis], 1)
    right = torch.cat([Qh[:own].T for _, _, Qh in rests] + [Vh[:common].T], 1)
    values = torch.cat([s[:own] for _, s, _ in rests] + [S[:common]])
    return values.mean() * procrustes(left) @ procrustes(right).T


class TestPublished:
    @pytest.mark.parametrize(
        ("method", "options", "expected"), [("iso_c", {}, WORKED_C), ("iso_cts", {"gamma": 0.5}, WORKED_CTS)]
    )
    @pytest.mark.parametrize("form", ["dense", "lowrank", "mixed"])
    def test_worked_numbers(
        self, method: str, options: dict[str, Any], expected: list, form: str, backend: str
    ) -> None:
        updates: list[Update] = list(cases.worked_pair())
        for i in range({"dense": 2, "mixed": 1, "lowrank": 0}[form]):
            updates[i] = cases.dense(updates[i])
        merged = merge_updates(updates, method, **options)
        assert isinstance(merged, LowRank) == (form == "lowrank")
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(cases.dense(merged), wanted, rtol=0, atol=1e-6)

    def test_singular_values_of_the_worked_sum(self) -> None:
        total = sum(u.dense() for u in cases.worked_pair())
        wanted = torch.tensor([7.006254, 3.283708, 1.032399, 0.252612], dtype=torch.float64)
        torch.testing.assert_close(torch.linalg.svdvals(total), wanted, rtol=0, atol=1e-6)
        found = torch.linalg.svdvals(cases.dense(iso_c(cases.worked_pair())))
        torch.testing.assert_close(found, wanted.mean().expand(4), rtol=0, atol=1e-6)

    @settings(max_examples=25)
    @given(m=st.integers(1, 24), n=st.integers(1, 24), tasks=st.integers(1, 5), seed=st.integers(0, 99))
    def test_iso_c_agrees_on_any_shape(self, m: int, n: int, tasks: int, seed: int) -> None:
        updates = cases.full_updates(tasks, m, n, seed=seed)
        assert cases.error(iso_c(updates), published_c(updates)) < 1e-9

    @pytest.mark.parametrize(("m", "n", "tasks"), [(24, 40, 4), (40, 24, 3), (32, 32, 2), (300, 280, 3)])
    def test_iso_c_agrees(self, m: int, n: int, tasks: int, backend: str) -> None:
        updates = cases.full_updates(tasks, m, n, seed=m)
        assert cases.error(iso_c(updates), published_c(updates)) < 1e-10

    @pytest.mark.parametrize(
        ("m", "n", "tasks", "gamma"),
        [
            (24, 40, 4, 0.8),
            (40, 24, 3, 0.8),
            (32, 32, 2, 0.5),
            (30, 20, 5, 0.25),
            (30, 20, 3, 0.05),
            (30, 20, 4, 0.0),  # no common direction
            (20, 30, 3, 1.0),
            (18, 13, 6, 0.8),  # p = round(3 / 6) = 0
            (50, 60, 8, 0.8),  # round(1.25) = 1
            (20, 30, 8, 0.4),  # round(1.5) = 2
            (25, 30, 2, 0.8),  # round(2.5) = 2, half to even
        ],
    )
    def test_iso_cts_agrees(self, m: int, n: int, tasks: int, gamma: float, backend: str) -> None:
        updates = cases.full_updates(tasks, m, n, seed=m + n, exponent=0.7)
        assert cases.error(iso_cts(updates, gamma=gamma), published_cts(updates, gamma)) < 1e-9

    @pytest.mark.parametrize(("q", "tasks", "sizes"), PUBLISHED_SIZES)
    def test_sizes_of_the_subspaces(self, q: int, tasks: int, sizes: tuple[int, int]) -> None:
        common, own = create("iso_cts", {}).sizes(cases.dense_specs(tasks, q, q + 10))
        assert (common, own) == (sizes[0], [sizes[1]] * tasks)

    @both
    def test_presets(self, method: str) -> None:
        found = preset_of(list_methods()[method], {"official": "fft"})
        assert found is not None
        assert (found.lora_scale, found.mean_tensors) == ("apply", "text_projection")
        chosen: Any = create(method, {"official": "fft"})
        assert chosen.mean_over == "min_dim"
        adapters = cases.lora_updates([3, 2], 20, 16)
        official, default = (merge_updates(adapters, method, **o) for o in ({"official": "fft"}, {}))
        assert cases.error(official, default.dense() * (5 / 16)) < 1e-12


class TestIdentities:
    @both
    def test_order_of_the_tasks_does_not_matter(self, method: str) -> None:
        updates = cases.full_updates(3, 24, 30, exponent=1.0)
        merged = [merge_updates(list(p), method) for p in itertools.permutations(updates)]
        assert max(cases.error(m, merged[0]) for m in merged) < 1e-10

    @both
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    @pytest.mark.parametrize("factor", [4.0, 0.3, -1.0])
    def test_homogeneous(self, method: str, form: str, factor: float) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(3, 20, 16) if form == "dense" else cases.lora_updates([3, 5, 2], 20, 16)
        )
        expected = factor * cases.dense(merge_updates(updates, method))
        assert cases.error(merge_updates([u * factor for u in updates], method), expected) < 1e-11

    @both
    def test_rotations_carry_over(self, method: str) -> None:
        updates = cases.full_updates(3, 20, 24, exponent=1.0)
        P, Q = cases.orthonormal(20, 20, 5), cases.orthonormal(24, 24, 6)
        rotated = merge_updates([P @ u @ Q for u in updates], method)
        assert cases.error(rotated, P @ merge_updates(updates, method) @ Q) < 1e-10

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_iso_c_is_odd_in_rows_and_columns(self, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(3, 20, 24) if form == "dense" else cases.lora_updates([3, 5, 2], 20, 24)
        )
        transposed = iso_c([u.mT for u in updates])
        assert cases.error(transposed, cases.dense(iso_c(updates)).mT) < 1e-11

    @both
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_every_direction_has_the_same_singular_value(self, method: str, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(3, 30, 24) if form == "dense" else cases.lora_updates([3, 5, 2], 30, 24)
        )
        rank = 24 if form == "dense" else 10
        values = torch.linalg.svdvals(cases.dense(merge_updates(updates, method)))
        torch.testing.assert_close(values[:rank], values[:1].expand(rank), rtol=1e-10, atol=0)
        assert float(values[rank:].sum()) < 1e-12

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_iso_c_keeps_the_sum_of_the_singular_values(self, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(3, 30, 24) if form == "dense" else cases.lora_updates([3, 5, 2], 30, 24)
        )
        total = sum(cases.dense(u) for u in updates)
        merged = cases.dense(iso_c(updates))
        assert float(torch.linalg.svdvals(merged).sum()) == pytest.approx(float(torch.linalg.svdvals(total).sum()))

    @pytest.mark.parametrize("ranks", [[3, 5, 2], [4, 4], [10, 9], [20, 3]])  # 19 and 23 exceed q = 16
    @pytest.mark.parametrize("over", ["rank", "min_dim"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("wide", [False, True])
    def test_iso_c_of_adapters_equals_that_of_their_products(
        self, ranks: list[int], over: str, dtype: torch.dtype, wide: bool
    ) -> None:
        adapters = [LowRank(cases.normal(20, r, seed=r), cases.normal(r, 16, seed=50 + r)).to(dtype) for r in ranks]
        if wide:
            adapters = [u.mT for u in adapters]
        factored = iso_c(adapters, mean_over=over)
        assert isinstance(factored, LowRank)
        rank = min(16, sum(ranks))
        assert (factored.rank, factored.dtype) == (rank, dtype)
        assert create("iso_c", {}).merged_rank(Updates.of(adapters).specs, len(ranks)) == rank
        formed = iso_c([u.dense() for u in adapters], mean_over=over)
        assert cases.error(formed, factored) < (3e-5 if dtype == torch.float32 else 1e-12)

    def test_mean_over_rank_and_over_the_smaller_side(self) -> None:
        adapters = cases.lora_updates([6, 6], 60, 40)  # 12 directions of 40
        merged = iso_c(adapters)
        values = torch.linalg.svdvals(sum(u.dense() for u in adapters))
        assert float(torch.linalg.svdvals(merged.dense())[0]) == pytest.approx(float(values.sum()) / 12)
        over_q = iso_c([u.dense() for u in adapters])
        assert cases.error(over_q, merged.dense() * (12 / 40)) < 1e-12

    def test_iso_c_of_adapters_depends_on_their_sum_alone(self) -> None:
        first, second = cases.lora_updates([3, 4], 30, 24)
        split = [first * 0.5, first * 0.5, second]  # ranks 3 + 3 + 4 of a sum of rank 7
        padded = LowRank(
            torch.cat([first.left, torch.zeros(30, 5, dtype=torch.float64)], 1),
            torch.cat([first.right, cases.normal(5, 24, seed=9)]),
        )
        for updates in (split, [padded, second]):
            assert cases.error(iso_c(updates), iso_c([first, second])) < 1e-11

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_one_task_or_no_own_direction_makes_both_methods_one(self, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(3, 20, 16) if form == "dense" else cases.lora_updates([3, 5, 2], 20, 16)
        )
        assert cases.error(iso_cts(updates[:1]), iso_c(updates[:1])) < 1e-11
        assert cases.error(iso_cts(updates, gamma=1), iso_c(updates)) < 1e-11
        assert cases.error(iso_cts(updates), iso_c(updates)) > 1e-2

    @pytest.mark.parametrize("ranks", [[8, 8], [5, 5, 6]])
    def test_iso_cts_of_adapters_that_fill_the_matrix_equals_that_of_their_products(self, ranks: list[int]) -> None:
        adapters = cases.lora_updates(ranks, 20, 16)
        factored = iso_cts(adapters)
        assert isinstance(factored, LowRank)
        assert cases.error(factored, published_cts([u.dense() for u in adapters])) < 1e-9

    def test_iso_cts_of_adapters_is_the_published_algorithm_on_their_budget(self) -> None:
        adapters = cases.lora_updates([6, 6, 6], 50, 40)
        assert create("iso_cts", {}).sizes(Updates.of(adapters).specs) == (15, [1, 1, 1])
        merged = iso_cts(adapters)
        assert merged.rank == 18
        assert cases.error(merged, published_cts([u.dense() for u in adapters], q=18)) < 1e-9

    @pytest.mark.parametrize(
        ("ranks", "gamma", "sizes"),
        [
            ([16] * 8, 0.8, (104, [3] * 8)),  # round(3.25)
            ([1, 64], 0.8, (58, [1, 6])),  # round(6.5), and one rank has no more
            ([0, 3], 0.8, (2, [0, 1])),
            ([2, 2], 0.8, (2, [1, 1])),  # round(0.5) = 0, at least one
            ([2, 2], 1.0, (4, [0, 0])),
            ([3] * 5, 0.0, (0, [3] * 5)),
            ([0, 0], 0.8, (0, [0, 0])),
            ([4] * 200, 0.8, (128, [0] * 200)),  # more tasks than directions
        ],
    )
    def test_budget_of_adapters(self, ranks: list[int], gamma: float, sizes: tuple[int, list[int]]) -> None:
        specs = [UpdateSpec((128, 300), r, torch.float32) for r in ranks]
        assert create("iso_cts", {"gamma": gamma}).sizes(specs) == sizes

    @both
    def test_adapters_beside_full_fine_tunes_count_as_their_products(self, method: str) -> None:
        updates: list[Update] = [*cases.lora_updates([3, 5], 20, 16), *cases.full_updates(1, 20, 16)]
        merged = merge_updates(updates, method)
        assert isinstance(merged, Tensor)
        assert cases.error(merged, merge_updates([cases.dense(u) for u in updates], method)) < 1e-11

    @both
    def test_weights_multiply_the_updates(self, method: str) -> None:
        updates = cases.lora_updates([3, 2], 20, 16)
        weighted = merge_updates(updates, method, weights=[2.0, -0.3])
        assert cases.error(weighted, merge_updates([updates[0] * 2.0, updates[1] * -0.3], method)) < 1e-12
        assert cases.error(weighted, merge_updates(updates, method)) > 1e-2

    @both
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_float32_agrees_with_float64(self, method: str, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(4, 120, 96) if form == "dense" else cases.lora_updates([6, 6, 6], 120, 96)
        )
        narrow = [u.to(torch.float32) for u in updates]
        expected = merge_updates([u.to(torch.float64) for u in narrow], method)
        merged = merge_updates(narrow, method)
        assert merged.dtype == torch.float32
        values = torch.linalg.svdvals(sum(cases.dense(u).double() for u in narrow))
        rank = 96 if form == "dense" else 18
        condition = float(values[0] / values[rank - 1])
        # factors are worked on in float64, and rounded once
        assert cases.error(merged, expected) < (1e-6 * condition if form == "dense" else 3e-7)


class TestDegenerate:
    @both
    def test_zero_updates_merge_to_zero(self, method: str) -> None:
        assert torch.equal(merge_updates([torch.zeros(6, 5)] * 2, method), torch.zeros(6, 5))
        merged = merge_updates(cases.lora_updates([0, 0], 6, 5), method)
        assert (type(merged), merged.rank, merged.shape) == (LowRank, 0, (6, 5))
        merged = merge_updates([LowRank(torch.zeros(6, 2), torch.ones(2, 5))] * 2, method)
        assert torch.equal(merged.dense(), torch.zeros(6, 5))
        assert merge_updates([torch.zeros(0, 6, 5)] * 2, method).shape == (0, 6, 5)

    @both
    def test_tasks_that_cancel_leave_nothing(self, method: str) -> None:
        (full,), (adapter,) = cases.full_updates(1, 20, 16), cases.lora_updates([3], 20, 16)
        assert merge_updates([full, -full], method).norm() < 1e-11
        assert cases.dense(merge_updates([adapter, adapter * -1.0], method)).norm() < 1e-11
        # nearly: what is left has three directions, and round-off of the two that cancel adds none
        small = cases.lora_updates([3], 20, 16, seed=3)[0] * 1e-4
        assert cases.error(iso_c([adapter, small, adapter * -1.0]), iso_c([small])) < 1e-9

    @both
    def test_a_zero_task_adds_nothing(self, method: str) -> None:
        adapters = cases.lora_updates([3, 0, 2], 20, 16)
        assert cases.error(merge_updates(adapters, method), merge_updates([adapters[0], adapters[2]], method)) < 1e-12
        updates = cases.full_updates(2, 20, 16)
        merged = merge_updates(
            [*updates, torch.zeros_like(updates[0])], method, **({} if method == "iso_c" else {"gamma": 1})
        )
        assert cases.error(merged, iso_c(updates)) < 1e-11

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_rank_deficient_sum_gets_no_made_up_directions(self, dtype: torch.dtype) -> None:
        updates = [cases.with_spectrum(40, 32, [3 + i, 2, 1], seed=8 + i).to(dtype) for i in range(2)]
        U, S, Vh = svd(sum(u.double() for u in updates))
        expected = S.sum() / 32 * U[:, :6] @ Vh[:6]
        for method in ("iso_c", "iso_cts"):  # nothing of a task is left outside of the common subspace
            merged = merge_updates(updates, method)
            assert cases.error(merged, expected) < (3e-6 if dtype == torch.float32 else 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_parts_of_a_task_at_round_off_get_no_weight(self, dtype: torch.dtype) -> None:
        """Copies of an adapter, one scaled in its dtype: what its rounding leaves outside the sum is no direction."""
        (adapter,) = cases.lora_updates([4], 40, 32, dtype=dtype)
        other = LowRank(adapter.left * 0.3, adapter.right)
        merged = iso_cts([adapter, other])
        expected = iso_c([adapter, other])
        assert cases.error(merged, expected) < (1e-6 if dtype == torch.float32 else 1e-11)
        once = iso_c([adapter * 1.3])
        assert cases.error(merged, once) < (1e-6 if dtype == torch.float32 else 1e-11)

    def test_copies_of_a_full_fine_tune(self) -> None:
        (update,) = cases.full_updates(1, 30, 20)
        assert cases.error(iso_c([update, update]), published_c([update, update])) < 1e-11
        common, own = create("iso_cts", {}).sizes(cases.dense_specs(2, 30, 20))
        assert (common, own) == (16, [2, 2])
        U, S, Vh = svd(update)
        mean = (2 * S[:16].sum() + 2 * S[16:18].sum()) / 20  # both copies have the same two directions of their own
        assert cases.error(iso_cts([update, update]), mean * U[:, :18] @ Vh[:18]) < 1e-11

    @both
    def test_one_by_one(self, method: str) -> None:
        assert merge_updates([torch.tensor([[-2.5]])], method).item() == pytest.approx(-2.5)
        assert merge_updates([torch.tensor([[2.0]]), torch.tensor([[-6.0]])], method).item() == pytest.approx(-4.0)

    @both
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_more_tasks_than_rows(self, method: str, form: str) -> None:
        adapters = cases.lora_updates([2] * 5, 3, 8)
        updates = adapters if form == "lowrank" else [u.dense() for u in adapters]
        merged = merge_updates(updates, method)
        assert cases.error(merged, published_c([u.dense() for u in adapters])) < 1e-10
        specs = Updates.of(updates).specs
        assert create(method, {}).flops(specs, 5) > 0
        if isinstance(merged, LowRank):
            assert merged.rank == create(method, {}).merged_rank(specs, 5) == 3

    @both
    def test_leading_dimensions_equal_the_loop(self, method: str) -> None:
        batch = [torch.stack([cases.normal(18, 15, seed=20 + 10 * i + b) for b in range(4)]) for i in range(3)]
        batch[0][1] = cases.with_spectrum(18, 15, [2, 1], seed=90)
        batch[2][1], batch[1][2] = 0, batch[0][2]
        for u in batch:
            u[3] = 0
        adapters = [LowRank(cases.normal(4, 18, r, seed=30 + r), cases.normal(4, r, 15, seed=40 + r)) for r in (3, 2)]
        adapters[0].left[1, :, 1:] = 0
        adapters[1].left[2] = 0
        factored = merge_updates(adapters, method)
        assert factored.shape == (4, 18, 15)
        for updates in (batch, [u.mT for u in batch]):
            merged = merge_updates([u.reshape(2, 2, *u.shape[1:]) for u in updates], method)
            for b in range(4):
                alone = merge_updates([u[b] for u in updates], method)
                assert cases.error(merged.reshape(updates[0].shape)[b], alone) < 1e-9
        for b in range(4):
            alone = merge_updates([LowRank(u.left[b], u.right[b]) for u in adapters], method)
            assert cases.error(factored.dense()[b], alone) < 1e-9

    @both
    @pytest.mark.parametrize("scale", [1e-20, 1e15])
    def test_extreme_scales_in_float32(self, method: str, scale: float) -> None:
        updates = cases.full_updates(2, 24, 20, dtype=torch.float32)
        scaled = merge_updates([u * scale for u in updates], method)
        assert cases.error(scaled.double() / scale, merge_updates(updates, method)) < 1e-4


@pytest.mark.parametrize("form", ["dense", "lowrank"])
def test_what_counts_as_null_can_be_said(form: str) -> None:
    """Singular values 1, 1e-3, 1e-9 in float64: three directions, or as many as lie above the fraction given."""
    P, Q = cases.orthonormal(9, 3, 1), cases.orthonormal(7, 3, 2)
    S = torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64)
    update = LowRank(P * S, Q.T) if form == "lowrank" else P * S @ Q.T
    for tol, kept in ((None, 3), (0.01, 1), (1e-6, 2), (1e-12, 3)):
        expected = S[:kept].sum() / 7 * P[:, :kept] @ Q[:, :kept].T
        assert cases.error(iso_c([update], basis_tol=tol, mean_over="min_dim"), expected) < 1e-6


def test_basis_tolerance_drops_dependent_directions() -> None:
    updates = cases.full_updates(3, 24, 20, exponent=1.0)
    loose = iso_cts(updates, basis_tol=0.5)
    assert int((torch.linalg.svdvals(loose) > 1e-9).sum()) < 20
    assert cases.error(loose, iso_cts(updates)) > 1e-2


def test_accuracy_and_seed_reach_the_decomposition_of_the_tasks() -> None:
    updates = cases.full_updates(2, 120, 100, exponent=0.3)
    exact, first, again, other = (
        iso_cts(updates, gamma=0.9, **o)
        for o in ({}, {"accuracy": "fast"}, {"accuracy": "fast", "seed": 0}, {"accuracy": "fast", "seed": 100})
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 1e-6 < cases.error(first, exact) < 1


def test_facts() -> None:
    updates = Updates.of(cases.full_updates(3, 40, 32))
    ctx = Context(3, "layer")
    create("iso_cts", {}).merge(updates, ctx)
    assert (ctx.facts["common"], ctx.facts["own"], ctx.facts["rank"]) == (26, [2, 2, 2], 32)
    assert ctx.facts["cover_u"]["dropped"] == 0
    ctx = Context(3, "layer")
    create("iso_c", {}).merge(Updates.of(cases.lora_updates([3, 2, 0], 40, 32)), ctx)
    assert ctx.facts["rank"] == 5


@both
def test_estimates_grow_with_the_work(method: str) -> None:
    chosen = create(method, {})
    small, large = (cases.dense_specs(4, size, size) for size in (64, 256))
    assert 0 < chosen.flops(small, 4) < chosen.flops(large, 4) / 16
    assert 64 * 64 * 2 < chosen.workspace(small, 4) < chosen.workspace(large, 4) / 8
    adapters = Updates.of(cases.lora_updates([4] * 4, 256, 256)).specs
    assert chosen.flops(adapters, 4) < chosen.flops(large, 4)
    assert chosen.workspace(adapters, 4) < chosen.workspace(large, 4)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("iso_c", {"mean_over": "k"}, r"mean_over"),
        ("iso_c", {"gamma": 0.5}, r"method 'iso_c' has no option 'gamma'"),
        ("iso_c", {"official": "lora"}, r"has no preset 'lora'; it has: fft"),
        ("iso_c", {"official": "fft", "mean_over": "rank"}, r"mean_over='rank' conflicts with official='fft'"),
        ("iso_cts", {"gamma": 1.5}, r"gamma"),
        ("iso_cts", {"gamma": -0.1}, r"gamma"),
        ("iso_cts", {"official": "fft", "gamma": 0.5}, r"gamma=0.5 conflicts with official='fft'"),
        ("iso_cts", {"basis_tol": 2.0}, r"basis_tol"),
        ("iso_cts", {"accuracy": "slow"}, r"accuracy"),
        ("iso_cts", {"seed": -1}, r"seed"),
    ],
)
def test_refused_options(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merge_updates([torch.ones(6, 5)] * 2, method, **options)


@both
@pytest.mark.parametrize("shape", [(5,), ()])
def test_an_update_that_is_no_matrix_is_refused(method: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"{method} merges matrices \(..., m, n\)"):
        merge_updates([torch.ones(shape)] * 2, method)
