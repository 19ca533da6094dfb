"""DC-Merge: the published algorithm, its identities, and input where a careless implementation breaks."""

from __future__ import annotations

import importlib
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import Context, create, dc_merge
from dcmerge_ext.updates import Updates

MODULE = importlib.import_module("dcmerge_ext.methods.dc_merge")  # its package hides it behind the function
NO_MASK_SUM = {"smoothing": "none", "aggregate": "sum", "block_size": 0}
MASKED_SUM = {"smoothing": "none", "aggregate": "sum"}


# --- the published algorithm, written out ----------------------------------------------------------------------------


def smoothed(s: Tensor, kind: str, rho: float, tau: float) -> Tensor:
    if kind == "average":
        return torch.full_like(s, s.mean())
    if kind == "linear":
        weights = torch.linspace(min(rho, (s[0] / s[-1]).item()), 1, len(s), dtype=s.dtype)
        return s.sum() * weights / weights.sum()
    return s if kind == "none" else tau * s + (1 - tau) * s.mean()


def procrustes(X: Tensor) -> Tensor:
    P, _, Qh = torch.linalg.svd(X, full_matrices=False)
    return P @ Qh


def published(
    updates: Sequence[Tensor],
    rank: int,
    *,
    count: int,
    smoothing: str = "none",
    rho: float = 5.0,
    tau: float = 0.5,
    aggregate: str = "ties",
    block_size: int | None = None,
) -> Tensor:
    """arXiv 2603.06242, section 3: full SVDs, dense truncated updates, dense projections."""
    parts = [(U[:, :rank], smoothed(S[:rank], smoothing, rho, tau), Vh[:rank]) for U, S, Vh in map(full_svd, updates)]
    left, right = procrustes(torch.cat([p[0] for p in parts], 1)), procrustes(torch.cat([p[2].T for p in parts], 1))
    cores = torch.stack([left.T @ (U * S @ Vh) @ right for U, S, Vh in parts])
    if aggregate == "ties":
        limits = cores.abs().flatten(1).sort(dim=1, descending=True).values[:, count - 1]
        cores = torch.where(cores.abs() >= limits[:, None, None], cores, 0)
        agree = (cores.sign() == cores.sum(0).sign()) & (cores != 0)
        core = (cores * agree).sum(0) / agree.sum(0).clamp(min=1)
    else:
        core = cores.sum(0) / (len(updates) if aggregate == "mean" else 1)
    block = torch.arange(core.shape[0]) // (block_size or (len(core) if block_size == 0 else rank))
    return left @ (core * (block[:, None] == block)) @ right.T


def full_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(A, full_matrices=False)


class TestPublishedAlgorithm:
    @pytest.mark.parametrize(("m", "n", "tasks", "rank", "options"), cases.PUBLISHED)
    def test_agrees(self, m: int, n: int, tasks: int, rank: int | None, options: dict[str, Any], backend: str) -> None:
        updates = cases.full_updates(tasks, m, n, seed=m + n, exponent=0.7)
        chosen = dict(options)
        keep, base = chosen.pop("keep", None), chosen.pop("count_base", "cover")
        r = rank or int(min(m, n) / tasks)
        total = min(m, n) ** 2 if base == "min_dim" else (tasks * r) ** 2
        count = max(int(1e-3 * total), r) if keep is None else max(1, int(keep * total))
        expected = published(updates, r, count=count, **chosen)
        assert cases.error(dc_merge(updates, rank=rank, **options), expected) < 1e-10

    @pytest.mark.parametrize(("preset", "m", "n", "tasks"), cases.PRESET_CASES)
    def test_agrees_with_the_presets(self, preset: str, m: int, n: int, tasks: int) -> None:
        updates = cases.full_updates(tasks, m, n, seed=m)
        q = min(m, n)
        if preset == "fft":
            rank, smoothing, total = int(q * (1 / tasks)), "none", q * q
        else:
            rank, smoothing, total = 16, "average", (16 * tasks) ** 2
        expected = published(updates, rank, count=max(1, int(1e-3 * total)), smoothing=smoothing)
        assert cases.error(dc_merge(updates, official=preset), expected) < 1e-10

    def test_lora_preset_takes_adapters_in_factors(self) -> None:
        updates = cases.lora_updates([16, 16, 16], 70, 60)
        expected = published([u.dense() for u in updates], 16, count=2, smoothing="average")
        assert cases.error(dc_merge(updates, official="lora"), expected) < 1e-10

    @pytest.mark.parametrize("preset", ["lora", "vlm"])
    def test_adapters_of_matrices_below_sixteen_keep_what_they_have(self, preset: str) -> None:
        updates = [LowRank(cases.normal(10, r, seed=r), cases.normal(r, 30, seed=r + 1)) for r in (8, 16)]
        merged = dc_merge(updates, official=preset)
        assert merged.rank == 18
        assert cases.error(merged, dc_merge(updates, rank=[8, 10], keep=1e-3)) < 1e-14

    def test_linear_smoothing_caps_at_five_unless_told(self) -> None:
        updates = cases.full_updates(2, 20, 16, exponent=2.0)
        default, five, two = (dc_merge(updates, smoothing="linear", **o) for o in ({}, {"rho": 5.0}, {"rho": 2.0}))
        assert torch.equal(default, five)
        assert cases.error(two, five) > 1e-3

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_smoothing_defaults_to_average_for_adapters_only(self, form: str) -> None:
        updates: Sequence[Update] = cases.lora_updates([3, 3], 20, 16)
        if form == "dense":
            updates = [u.dense() for u in updates]
        average, none, default = (dc_merge(updates, rank=3, smoothing=s) for s in ("average", "none", None))
        assert cases.error(default, average if form == "lowrank" else none) == 0
        assert cases.error(average, none) > 1e-3


# --- identities ------------------------------------------------------------------------------------------------------


class TestIdentities:
    @pytest.mark.parametrize(
        ("m", "n", "ranks"), [(20, 30, [3, 3]), (30, 20, [5, 1, 2]), (10, 8, [6, 5, 4]), (8, 8, [8, 8])]
    )
    @pytest.mark.parametrize("form", ["dense", "lowrank", "mixed"])
    def test_unmasked_untrimmed_sum_is_the_sum_of_the_truncated_updates(
        self, m: int, n: int, ranks: list[int], form: str
    ) -> None:
        updates: list[Update] = list(cases.full_updates(len(ranks), m, n))
        for i in range(len(ranks)):
            if form == "lowrank" or (form == "mixed" and i % 2):
                updates[i] = cases.lora_updates([min(m, n, ranks[i] + 2)], m, n, seed=i)[0]
        merged = dc_merge(updates, rank=ranks, **NO_MASK_SUM)
        expected = torch.stack([cases.truncated(u, r) for u, r in zip(updates, ranks, strict=True)]).sum(0)
        assert cases.error(merged, expected) < 1e-11

    @pytest.mark.parametrize("options", [{"smoothing": "average"}, {"smoothing": "none", "keep": 0.6}, MASKED_SUM])
    def test_adapters_and_their_dense_products_agree_in_float32(self, options: dict[str, Any]) -> None:
        ranks = [4, 2, 6]
        adapters = [
            LowRank.from_lora(u.right, u.left, alpha, rslora)
            for u, alpha, rslora in zip(
                cases.lora_updates(ranks, 64, 48, dtype=torch.float32), (8, 2, 24), (False, True, True), strict=True
            )
        ]
        factored = dc_merge(adapters, rank=ranks, **options)
        formed = dc_merge([u.dense() for u in adapters], rank=ranks, **options)
        assert isinstance(factored, LowRank)
        assert isinstance(formed, Tensor)
        assert cases.error(formed, factored) < 1e-5

    @pytest.mark.parametrize("options", [{}, {"keep": 0.6}, {"block_size": 4}, {"block_size": 2}, MASKED_SUM])
    def test_order_of_the_tasks_does_not_matter(self, options: dict[str, Any]) -> None:
        updates = cases.full_updates(3, 24, 30, exponent=1.0)
        merged = [dc_merge(list(p), rank=4, **options) for p in itertools.permutations(updates)]
        assert max(cases.error(m, merged[0]) for m in merged) < 1e-11

    def test_order_of_tasks_with_different_ranks_does_not_matter(self) -> None:
        updates = cases.lora_updates([2, 5, 3], 24, 30)
        merged = [dc_merge(list(p)) for p in itertools.permutations(updates)]
        assert max(cases.error(m, merged[0]) for m in merged) < 1e-11

    @pytest.mark.parametrize("options", [{}, {"block_size": 0}, {"aggregate": "sum"}, {"keep": 1.0}])
    def test_a_single_task_comes_back_truncated(self, options: dict[str, Any]) -> None:
        (full,) = cases.full_updates(1, 20, 16)
        (adapter,) = cases.lora_updates([5], 20, 16)
        assert cases.error(dc_merge([full], **options), full) < 1e-12
        assert cases.error(dc_merge([full], rank=3, **options), cases.truncated(full, 3)) < 1e-12
        assert cases.error(dc_merge([adapter], smoothing="none", **options), adapter) < 1e-12
        assert (
            cases.error(dc_merge([adapter], smoothing="none", rank=2, **options), cases.truncated(adapter, 2)) < 1e-12
        )

    def test_a_single_task_comes_back_in_float32(self) -> None:
        (full,) = cases.full_updates(1, 300, 200, dtype=torch.float32)
        assert cases.error(dc_merge([full]), full) < 2e-6

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_tasks_in_orthogonal_spaces_merge_to_their_sum(self, form: str) -> None:
        P, Q = cases.orthonormal(20, 8, 1), cases.orthonormal(16, 8, 2)
        s = cases.power_law(4, 1.0)
        tasks = [LowRank(P[:, i] * s * (1 + i.start), Q[:, i].T) for i in (slice(0, 4), slice(4, 8))]
        updates = tasks if form == "lowrank" else [t.dense() for t in tasks]
        assert cases.error(dc_merge(updates, smoothing="none"), tasks[0].dense() + tasks[1].dense()) < 1e-12

    @pytest.mark.parametrize("keep", [1.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_round_off_never_votes(self, keep: float, dtype: torch.dtype) -> None:
        # Each core is zero up to round-off outside its own block: were that kept, it would halve the other's mean.
        P, Q = cases.orthonormal(60, 16, 7), cases.orthonormal(50, 16, 8)
        s = cases.power_law(8, 1.0)
        tasks = [(P[:, i] * s @ Q[:, i].T).to(dtype) for i in (slice(0, 8), slice(8, 16))]
        merged = dc_merge(tasks, rank=8, keep=keep)
        assert cases.error(merged, tasks[0] + tasks[1]) < (3e-6 if dtype == torch.float32 else 1e-13)

    def test_orthogonal_tasks_merge_to_their_sum_where_more_entries_are_kept_than_exist(self) -> None:
        r = 260  # int(1e-3 (2 r)^2) = 270 entries are asked for, and only 260 are not round-off
        P, Q = cases.orthonormal(530, 2 * r, 3), cases.orthonormal(525, 2 * r, 4)
        s = cases.power_law(r, 0.5)
        tasks = [LowRank(P[:, i] * s, Q[:, i].T) for i in (slice(0, r), slice(r, 2 * r))]
        assert cases.error(dc_merge(tasks, smoothing="none"), tasks[0].dense() + tasks[1].dense()) < 1e-11

    @pytest.mark.parametrize("options", [{}, {"keep": 0.6, "smoothing": "average"}, MASKED_SUM])
    def test_odd(self, options: dict[str, Any]) -> None:
        updates = cases.full_updates(3, 20, 24)
        assert cases.error(dc_merge([-u for u in updates], **options), -dc_merge(updates, **options)) < 1e-12

    @pytest.mark.parametrize("options", [{}, {"keep": 0.6, "smoothing": "average"}, MASKED_SUM, {"block_size": 5}])
    def test_rotations_of_rows_and_columns_carry_over(self, options: dict[str, Any]) -> None:
        updates = cases.full_updates(3, 20, 24, exponent=1.0)
        P, Q = cases.orthonormal(20, 20, 5), cases.orthonormal(24, 24, 6)
        rotated = dc_merge([P @ u @ Q for u in updates], **options)
        assert cases.error(rotated, P @ dc_merge(updates, **options) @ Q) < 1e-11

    @pytest.mark.parametrize("options", [{}, {"keep": 0.6}, MASKED_SUM])
    def test_transposes_carry_over(self, options: dict[str, Any]) -> None:
        updates = cases.full_updates(3, 20, 24, exponent=1.0)
        assert cases.error(dc_merge([u.T for u in updates], **options), dc_merge(updates, **options).T) < 1e-11

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_weights_multiply_the_updates(self, form: str) -> None:
        updates: Sequence[Update] = (
            cases.lora_updates([3, 2], 20, 16) if form == "lowrank" else cases.full_updates(2, 20, 16)
        )
        weighted = merge_updates(updates, weights=[2.0, -0.3])
        assert cases.error(weighted, dc_merge([updates[0] * 2.0, updates[1] * -0.3])) < 1e-12
        assert cases.error(weighted, dc_merge(updates)) > 1e-2

    @pytest.mark.parametrize("kind", ["none", "average", "linear"])
    def test_smoothing_rescales_each_task_before_the_merge(self, kind: str) -> None:
        updates = cases.full_updates(2, 20, 16, exponent=1.0)
        replaced = []
        for u in updates:
            U, S, Vh = full_svd(u)
            replaced.append(U[:, :4] * smoothed(S[:4], kind, 5.0, 0.5) @ Vh[:4])
        merged = dc_merge(updates, rank=4, smoothing=kind, aggregate="sum", block_size=0)
        assert cases.error(merged, replaced[0] + replaced[1]) < 1e-12

    def test_mean_is_the_sum_over_the_number_of_tasks(self) -> None:
        updates = cases.full_updates(3, 20, 16)
        total = dc_merge(updates, aggregate="sum")
        assert cases.error(dc_merge(updates, aggregate="mean"), total / 3) < 1e-14


# --- degenerate input ------------------------------------------------------------------------------------------------


class TestDegenerate:
    def test_a_zero_task_adds_nothing_to_a_sum(self) -> None:
        update, zero = cases.full_updates(1, 20, 16)[0], torch.zeros(20, 16, dtype=torch.float64)
        for tasks in ([update, zero], [zero, update]):
            assert cases.error(dc_merge(tasks, rank=4, **MASKED_SUM), cases.truncated(update, 4)) < 1e-12

    def test_a_zero_task_has_no_vote(self) -> None:
        update, zero = cases.full_updates(1, 20, 16)[0], torch.zeros(20, 16, dtype=torch.float64)
        assert cases.error(dc_merge([zero, update]), cases.truncated(update, 8)) < 1e-12

    def test_a_zero_task_does_not_change_what_is_kept_of_the_others(self) -> None:
        updates = cases.full_updates(2, 30, 20)
        with_zero = dc_merge([*updates, torch.zeros_like(updates[0])], rank=5, keep=0.5)
        assert cases.error(with_zero, dc_merge(updates, rank=5, keep=0.5)) < 1e-11

    @pytest.mark.parametrize("smoothing", ["none", "average", "linear"])
    def test_only_zero_tasks_merge_to_zero(self, smoothing: str) -> None:
        merged = dc_merge([torch.zeros(6, 5)] * 2, smoothing=smoothing)
        assert torch.equal(merged, torch.zeros(6, 5))

    def test_adapters_that_touch_nothing_merge_to_rank_zero(self) -> None:
        merged = dc_merge([LowRank(torch.ones(6, 0), torch.ones(0, 5))] * 2)
        assert isinstance(merged, LowRank)
        assert merged.rank == 0
        assert torch.equal(merged.dense(), torch.zeros(6, 5))

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("copies", [2, 3])
    def test_masked_sum_of_copies_returns_the_task_and_nothing_made_up(
        self, form: str, dtype: torch.dtype, copies: int
    ) -> None:
        if form == "dense":
            update = cases.full_updates(1, 96, 64, dtype=dtype)[0]
            merged = dc_merge([update] * copies, rank=20, **MASKED_SUM)
            expected = cases.truncated(update, 20)
        else:
            adapter = cases.lora_updates([6], 96, 64, dtype=dtype)[0]
            merged = dc_merge([adapter] * copies, **MASKED_SUM)
            expected = adapter.dense()
        assert cases.error(merged, expected) < (1e-5 if dtype == torch.float32 else 1e-12)

    @pytest.mark.parametrize("gap", [1e-3, 1e-6])
    @pytest.mark.parametrize("options", [{}, {"keep": 1.0}, MASKED_SUM, {"smoothing": "average"}])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_near_copies_stay_bounded(self, gap: float, options: dict[str, Any], dtype: torch.dtype) -> None:
        (update,) = cases.full_updates(1, 40, 32, exponent=1.0)
        other = update + gap * cases.normal(40, 32, seed=7)
        merged = dc_merge([update.to(dtype), other.to(dtype)], rank=8, **options)
        assert merged.isfinite().all()
        # |M_i| <= |H_u| |H_v| |s_i| with |H| <= sqrt(2), and the cover basis is an isometry
        assert merged.norm() <= 2 * (update.norm() + other.norm())

    def test_null_components_of_rank_deficient_updates_take_no_part(self) -> None:
        updates = [cases.with_spectrum(40, 32, [3 + i, 2, 1], seed=8 + i) for i in range(2)]
        for options in ({}, {"keep": 0.6}, {"smoothing": "average"}, {"smoothing": "linear"}, MASKED_SUM):
            default = dc_merge(updates, **options)  # 16 components each, 13 of them null
            assert cases.error(default, dc_merge(updates, rank=3, **options)) < 1e-11

    def test_default_rank_of_an_adapter_is_its_numerical_rank(self) -> None:
        factors = cases.lora_updates([3, 2], 40, 32)
        padded = [
            LowRank(
                torch.cat([u.left, torch.zeros(40, 5)], dim=1).double(),
                torch.cat([u.right, cases.normal(5, 32, seed=9)]),
            )
            for u in factors
        ]
        assert cases.error(dc_merge(padded), dc_merge(factors)) < 1e-11

    @pytest.mark.parametrize("values", [[2.0, 2, 2, 2], [3.0, 3, 1, 1]])
    def test_masked_sum_is_unique_where_singular_values_repeat(self, values: list[float]) -> None:
        def rotated(seed: int, rotation_seed: int) -> LowRank:
            """One matrix, whose factors are rotated inside each eigenspace."""
            s = torch.tensor(values, dtype=torch.float64)
            rotation = torch.zeros(4, 4, dtype=torch.float64)
            for value in set(values):
                where = torch.nonzero(s == value).flatten()
                rotation[where[:, None], where] = cases.orthonormal(len(where), len(where), rotation_seed)
            return LowRank(
                cases.orthonormal(20, 4, seed) @ rotation * s, rotation.T @ cases.orthonormal(16, 4, seed + 1).T
            )

        first = dc_merge([rotated(10, 1), rotated(20, 2)], **MASKED_SUM)
        second = dc_merge([rotated(10, 3), rotated(20, 4)], **MASKED_SUM)
        formed = dc_merge([rotated(10, 3).dense(), rotated(20, 4).dense()], rank=4, **MASKED_SUM)
        assert cases.error(first, second) < 1e-11
        assert cases.error(first, formed) < 1e-11

    def test_one_by_one(self) -> None:
        assert dc_merge([torch.tensor([[-2.5]])]).item() == pytest.approx(-2.5)
        assert dc_merge([torch.tensor([[2.0]]), torch.tensor([[-6.0]])]).item() == pytest.approx(-2.0)

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_more_tasks_than_rows_take_the_mean_with_a_warning(
        self, form: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        adapters = cases.lora_updates([2] * 5, 3, 8)
        updates = adapters if form == "lowrank" else [u.dense() for u in adapters]
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = merge_updates({"layer.weight": updates})["layer.weight"]
        assert isinstance(merged, LowRank) == (form == "lowrank")
        expected = sum(u.dense() for u in adapters) / 5
        assert cases.error(merged, expected) < 1e-14
        assert cases.dense(merged).norm() > 0
        if isinstance(merged, LowRank):
            assert create("dc_merge", {}).merged_rank(Updates.of(updates).specs, 5) == merged.rank
        assert [
            "layer.weight: 5 tasks leave a 3 x 8 matrix no component each" in r.message for r in caplog.records
        ] == [True]

    def test_adapters_that_leave_a_full_fine_tune_no_component_take_the_mean(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        updates = [*cases.lora_updates([4, 4], 8, 10), *cases.full_updates(1, 8, 10)]
        merged = dc_merge(updates)
        assert cases.error(merged, sum(cases.dense(u) for u in updates) / 3) < 1e-14
        assert "takes the mean" in caplog.text

    def test_no_warning_where_every_task_has_a_component(self, caplog: pytest.LogCaptureFixture) -> None:
        dc_merge(cases.full_updates(3, 3, 8))
        assert caplog.records == []

    @pytest.mark.parametrize("options", [{}, {"aggregate": "sum"}, {"keep": 1.0}, {"smoothing": "average"}])
    def test_more_components_than_rows(self, options: dict[str, Any]) -> None:
        updates = cases.lora_updates([4] * 4, 10, 12)  # k = 16 exceeds q = 10
        merged = dc_merge(updates, **options)
        assert isinstance(merged, LowRank)
        assert merged.rank == 16
        assert cases.dense(merged).isfinite().all()
        assert (
            cases.error(merged, dc_merge([u.dense() for u in updates], rank=4, **{"smoothing": "average"} | options))
            < 1e-10
        )

    @pytest.mark.parametrize(
        ("options", "m", "tasks"),
        [({"official": "fft", "rank": 1}, 100, 2), ({"keep": 1.0, "count_base": "min_dim"}, 50, 8)],
    )
    def test_a_count_beyond_the_entries_of_a_core_keeps_them_all(
        self, options: dict[str, Any], m: int, tasks: int
    ) -> None:
        updates = cases.full_updates(tasks, m, m)
        rank = options.get("rank")
        assert cases.error(dc_merge(updates, **options), dc_merge(updates, keep=1.0, rank=rank)) < 1e-12

    @pytest.mark.parametrize("scale", [1e-20, 1e15])
    def test_extreme_scales_in_float32(self, scale: float) -> None:
        updates = cases.full_updates(2, 24, 20, dtype=torch.float32)
        scaled = dc_merge([u * scale for u in updates])
        assert cases.error(scaled.double() / scale, dc_merge(updates)) < 1e-5

    def test_an_empty_batch_stays_empty(self) -> None:
        for updates in ([torch.zeros(0, 6, 5)] * 2, [LowRank(torch.zeros(0, 6, 2), torch.zeros(0, 2, 5))] * 2):
            merged = dc_merge(updates)
            assert type(merged) is type(updates[0])
            assert merged.shape == (0, 6, 5)

    @pytest.mark.parametrize("shape", [(5,), ()])
    def test_an_update_that_is_no_matrix_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"matri"):
            dc_merge([torch.ones(shape)] * 2)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("factor", ["dense", "left", "right"])
    def test_non_finite_values_are_refused_by_task_and_name(self, value: float, factor: str) -> None:
        good = cases.lora_updates([2], 6, 5)[0]
        left, right = good.left.clone(), good.right.clone()
        (right if factor == "right" else left)[0, 0] = value
        bad = torch.full((6, 5), value) if factor == "dense" else LowRank(left, right)
        count = 30 if factor == "dense" else 1
        with pytest.raises(InputError, match=rf"update 1 holds {count} NaN or Inf values"):
            dc_merge([good, bad])
        with pytest.raises(InputError, match=rf"update 1 of 'layer\.weight' holds {count} NaN"):
            merge_updates({"layer.weight": [good, bad, good]})


# --- forms of input and output ---------------------------------------------------------------------------------------


class TestForms:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_half_precision_is_merged_in_float32(self, dtype: torch.dtype, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(2, 20, 16, dtype=dtype)
            if form == "dense"
            else cases.lora_updates([3, 2], 20, 16, dtype=dtype)
        )
        merged, widened = dc_merge(updates), dc_merge([u.to(torch.float32) for u in updates])
        assert merged.dtype == torch.float32
        assert torch.equal(cases.dense(merged), cases.dense(widened))

    def test_the_widest_dtype_among_the_tasks_decides(self) -> None:
        first, second = cases.full_updates(2, 20, 16)
        merged = dc_merge([first.float(), second])
        assert merged.dtype == torch.float64
        assert cases.error(merged, dc_merge([first.float().double(), second])) < 1e-5

    @pytest.mark.parametrize("options", [{}, {"keep": 0.6}, MASKED_SUM])
    def test_strided_and_transposed_views(self, options: dict[str, Any]) -> None:
        wide = [cases.normal(32, 40, seed=10 + i) for i in range(2)]
        views = [w.T[::2] for w in wide]  # 20 x 32
        assert cases.error(dc_merge(views, **options), dc_merge([v.contiguous() for v in views], **options)) < 1e-11
        adapters = cases.lora_updates([3, 2], 32, 40)
        assert cases.error(dc_merge([a.mT for a in adapters]), dc_merge(adapters).mT) < 1e-11

    def test_the_updates_are_left_alone(self) -> None:
        updates = cases.full_updates(2, 20, 16)
        before = [u.clone() for u in updates]
        dc_merge(updates)
        assert all(torch.equal(a, b) for a, b in zip(updates, before, strict=True))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"keep": 0.6},
            {"smoothing": "average"},
            {"smoothing": "linear"},
            {"block_size": 3},
            {"official": "fft"},
            MASKED_SUM,
        ],
    )
    def test_leading_dimensions_equal_the_loop(self, options: dict[str, Any]) -> None:
        """A batch whose matrices have different numerical ranks, copies and zeros among them."""
        batch = [torch.stack([cases.normal(18, 15, seed=20 + 10 * i + b) for b in range(6)]) for i in range(3)]
        batch[0][1] = cases.with_spectrum(18, 15, [2, 1], seed=90)
        batch[2][1] = 0
        batch[1][2] = batch[0][2]
        for u in batch:
            u[3] = 0
        batch[1][4] = cases.with_spectrum(18, 15, [3, 2, 1, 0.5], seed=91)
        merged = dc_merge([u.reshape(2, 3, 18, 15) for u in batch], **options)
        assert merged.shape == (2, 3, 18, 15)
        for b in range(6):
            alone = dc_merge([u[b] for u in batch], **options)
            assert cases.error(merged.reshape(6, 18, 15)[b], alone) < 1e-10

    def test_batched_adapters_equal_the_loop(self) -> None:
        adapters = [LowRank(cases.normal(4, 18, r, seed=30 + r), cases.normal(4, r, 15, seed=40 + r)) for r in (3, 2)]
        adapters[0].left[1, :, 1:] = 0
        adapters[1].left[2] = 0
        merged = dc_merge(adapters)
        assert isinstance(merged, LowRank)
        assert merged.shape == (4, 18, 15)
        for b in range(4):
            alone = dc_merge([LowRank(u.left[b], u.right[b]) for u in adapters])
            assert cases.error(merged.dense()[b], alone) < 1e-10

    @pytest.mark.parametrize(
        ("lowrank", "rank", "expected"),
        [([3, 2, 4], None, 9), ([3, 2, 4], 2, 6), ([3, 2, 4], [1, 2, 3], 6), ([3, 0, 4], None, 7)],
    )
    def test_adapters_give_an_adapter_of_the_sum_of_the_ranks(
        self, lowrank: list[int], rank: int | list[int] | None, expected: int
    ) -> None:
        updates = cases.lora_updates(lowrank, 20, 16)
        merged = dc_merge(updates, rank=rank)
        assert isinstance(merged, LowRank)
        assert merged.rank == expected
        assert create("dc_merge", {"rank": rank}).merged_rank(Updates.of(updates).specs, len(updates)) == expected
        assert torch.linalg.matrix_rank(merged.dense()) <= expected

    def test_one_full_update_makes_the_result_a_tensor(self) -> None:
        updates = [*cases.lora_updates([3, 2], 20, 16), *cases.full_updates(1, 20, 16)]
        assert isinstance(dc_merge(updates), Tensor)

    def test_an_adapter_that_touches_nothing_counts_as_a_task_without_components(self) -> None:
        empty = LowRank(torch.zeros(20, 0).double(), torch.zeros(0, 16).double())
        updates = cases.lora_updates([3, 2], 20, 16)
        assert cases.error(dc_merge([updates[0], empty, updates[1]]), dc_merge(updates)) < 1e-14
        full = cases.full_updates(1, 20, 16)[0]
        assert cases.error(dc_merge([empty, full], **MASKED_SUM), full) < 1e-12


# --- how it is computed ----------------------------------------------------------------------------------------------


class TestComputation:
    def test_adapters_in_float32_are_merged_in_float64(self) -> None:
        # adapters of one initialisation share their right factors almost: the basis has a condition near 1e4
        shared = cases.orthonormal(40, 4, 12).T
        adapters = [
            LowRank(u.left.float(), (shared + 1e-4 * cases.normal(4, 40, seed=13 + i)).float())
            for i, u in enumerate(cases.lora_updates([4, 4, 4], 50, 40))
        ]
        expected = dc_merge([u.to(torch.float64) for u in adapters])
        assert cases.error(dc_merge(adapters), expected) < 3e-7  # the rounding of the result

    def test_accuracy_and_seed_reach_the_decomposition(self) -> None:
        updates = cases.full_updates(4, 120, 100, exponent=0.3)
        exact, first, again, other = (
            dc_merge(updates, rank=10, aggregate="sum", **o)
            for o in ({}, {"accuracy": "fast"}, {"accuracy": "fast", "seed": 0}, {"accuracy": "fast", "seed": 100})
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert 1e-3 < cases.error(first, exact) < 1

    def test_basis_tolerance_drops_near_copies(self) -> None:
        (update,) = cases.full_updates(1, 40, 32, exponent=1.0)
        near = update + 1e-6 * cases.normal(40, 32, seed=11)
        merged = dc_merge([update, near], rank=4, basis_tol=1e-3, **MASKED_SUM)
        assert cases.error(merged, cases.truncated(update, 4)) < 1e-4
        assert cases.error(dc_merge([update, near], rank=4, **MASKED_SUM), merged) > 0.1

    def test_facts_name_ranks_and_dropped_directions(self) -> None:
        first, second = cases.full_updates(2, 40, 32)
        ctx = Context(3, "layer")
        create("dc_merge", {"rank": [4, 4, 3]}).merge(Updates.of([first, first, second]), ctx)
        assert ctx.facts["rank"] == [4, 4, 3]
        assert ctx.facts["cover_rank"] == 11
        for side in ("cover_u", "cover_v"):
            assert ctx.facts[side]["dropped"] == 4
            assert 0 < ctx.facts[side]["smallest_kept"] <= math.sqrt(2)

    def test_facts_name_the_fallback(self) -> None:
        ctx = Context(4, "layer")
        create("dc_merge", {}).merge(Updates.of([torch.ones(2, 3)] * 4), ctx)
        assert ctx.facts["fallback"].startswith("mean: ")


def test_a_copy_of_a_task_adds_nothing_to_the_cover() -> None:
    """Large enough for randomized decompositions, whose round-off would differ between copies with starts of their own."""
    spectrum = cases.power_law(400, 1.0).float()
    one, other = (cases.with_spectrum(400, 400, spectrum.double(), seed=seed).float() for seed in (71, 72))
    context = Context(3, "name")
    create("dc_merge", {"rank": 96}).merge(Updates.of([one, other, one]), context)
    assert context.facts["svd"]["routes"] == {"krylov": 3}
    assert context.facts["cover_u"]["dropped"] == context.facts["cover_v"]["dropped"] == 96


@pytest.mark.parametrize("threads", [1, 2])
def test_a_matrix_has_the_same_bytes_alone_and_in_any_batch(threads: int) -> None:
    batch = [
        torch.stack(
            [cases.with_spectrum(300, 260, cases.power_law(260, 0.5), seed=10 * t + b) for b in range(3)]
        ).float()
        for t in range(4)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        merged = dc_merge(batch)
        assert torch.equal(merged[1], dc_merge([updates[1] for updates in batch]))
        assert torch.equal(merged[1:], dc_merge([updates[1:] for updates in batch]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("tasks", "rank"), [(4, 16), (3, 8), (2, 8), (8, 1)])
def test_dense_updates_of_low_rank(tasks: int, rank: int) -> None:
    """Full models that adapters were merged into: most components are null, at sizes where LAPACK is not chosen first."""
    updates = [1e-3 * cases.normal(500, rank, seed=80 + i) @ cases.normal(rank, 500, seed=90 + i) for i in range(tasks)]
    merged = dc_merge([u.float() for u in updates], aggregate="sum", block_size=0)
    expected = sum(updates)
    assert cases.error(merged.double(), expected) < 1e-4
