"""TSV-M: worked numbers, the published algorithm, its identities, and degenerate input."""

from __future__ import annotations

import itertools
import logging
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
from dcmerge_ext.methods import Context, create, tsv_m
from dcmerge_ext.methods.registry import preset_of
from dcmerge_ext.updates import Updates

# What the authors' code returns for the worked pair, r = 2.
WORKED = [
    [1.411009, 1.219106, 0.127328, 1.605249],
    [0.531227, -0.510734, 1.816419, 1.343423],
    [2.167091, 3.034899, 1.005950, -1.510351],
    [-2.344115, 2.804916, -0.848623, -0.000525],
]


def published(updates: Sequence[Tensor], rank: int | None = None) -> Tensor:
    """arXiv 2412.00081 as its authors run it: full SVDs, blocks of bases padded with zeros to min(m, n) columns."""
    m, n = updates[0].shape
    r = rank or int(min(m, n) * (1 / len(updates)))
    width = max(min(m, n), r * len(updates))
    left, right, values = (torch.zeros(*size, dtype=torch.float64) for size in ((m, width), (n, width), (width,)))
    for i, update in enumerate(updates):
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        block = slice(i * r, (i + 1) * r)
        left[:, block], values[block], right[:, block] = U[:, :r], S[:r], Vh[:r].T
    (P, _, Qh), (Pv, _, Qvh) = (torch.linalg.svd(X, full_matrices=False) for X in (left, right))
    return P @ Qh * values @ (Pv @ Qvh).T


class TestPublished:
    @pytest.mark.parametrize("form", ["dense", "lowrank", "mixed"])
    def test_worked_numbers(self, form: str, backend: str) -> None:
        updates: list[Update] = list(cases.worked_pair())
        for i in range({"dense": 2, "mixed": 1, "lowrank": 0}[form]):
            updates[i] = cases.dense(updates[i])
        merged = tsv_m(updates)
        assert isinstance(merged, LowRank) == (form == "lowrank")
        expected = torch.tensor(WORKED, dtype=torch.float64)
        torch.testing.assert_close(cases.dense(merged), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("m", "n", "tasks", "rank"),
        [
            (12, 9, 2, 3),
            (9, 12, 3, 3),
            (16, 16, 2, 8),
            (24, 40, 4, None),
            (40, 24, 5, None),  # r = 4: four columns of padding
            (50, 80, 8, None),  # r = 6: two
            (10, 8, 3, 4),  # k = 12 exceeds q = 8
            (6, 50, 5, None),  # one component per task
        ],
    )
    def test_agrees(self, m: int, n: int, tasks: int, rank: int | None, backend: str) -> None:
        updates = cases.full_updates(tasks, m, n, seed=m + n, exponent=0.7)
        assert cases.error(tsv_m(updates, rank=rank), published(updates, rank)) < 1e-10

    @settings(max_examples=25)
    @given(
        m=st.integers(1, 20),
        n=st.integers(1, 20),
        tasks=st.integers(1, 5),
        seed=st.integers(0, 99),
        power=st.booleans(),
    )
    def test_agrees_on_any_shape(self, m: int, n: int, tasks: int, seed: int, power: bool) -> None:
        updates = cases.full_updates(tasks, m, n, seed=seed, exponent=1.0 if power else 0.1)
        expected = sum(updates) / tasks if tasks > min(m, n) else published(updates)
        assert cases.error(tsv_m(updates), expected) < 1e-8

    def test_the_eigenvector_variant_of_the_code_is_the_same(self) -> None:
        parts = [torch.linalg.svd(u.dense()) for u in cases.worked_pair()]
        whitened = []
        for X in (torch.cat([U[:, :2] for U, _, _ in parts], 1), torch.cat([Vh[:2].T for _, _, Vh in parts], 1)):
            values, Z = torch.linalg.eigh(X.T @ X)
            whitened.append(X @ (Z / (values.abs().sqrt() + 1e-12)) @ Z.T)
        variant = whitened[0] * torch.cat([S[:2] for _, S, _ in parts]) @ whitened[1].T
        assert cases.error(tsv_m(cases.worked_pair()), variant) < 1e-9

    def test_components_per_task_are_the_published_ones(self) -> None:
        for q, tasks, rank in cases.FULL_RANKS:
            specs = cases.dense_specs(tasks, q, q + 100)
            assert create("tsv_m", {}).merged_rank(specs, tasks) == rank * tasks

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_lora_preset_keeps_sixteen(self, form: str) -> None:
        adapters = cases.lora_updates([20, 20], 50, 45)
        updates = adapters if form == "lowrank" else [u.dense() for u in adapters]
        assert cases.error(tsv_m(updates, official="lora"), published([u.dense() for u in adapters], 16)) < 1e-10

    @pytest.mark.parametrize(
        ("preset", "rank", "lora_scale", "mean"),
        [("fft", None, "apply", "text_projection"), ("lora", 16, "ignore", None)],
    )
    def test_presets(self, preset: str, rank: int | None, lora_scale: str, mean: str | None) -> None:
        found = preset_of(list_methods()["tsv_m"], {"official": preset})
        assert found is not None
        assert (found.lora_scale, found.mean_tensors) == (lora_scale, mean)
        chosen: Any = create("tsv_m", {"official": preset})
        assert chosen.rank == rank


class TestIdentities:
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_keeps_the_singular_values_of_the_tasks(self, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(3, 30, 24) if form == "dense" else cases.lora_updates([3, 8, 2], 30, 24)
        )
        ranks = [8, 8, 8] if form == "dense" else [3, 8, 2]
        kept = [torch.linalg.svdvals(cases.dense(u))[:r] for u, r in zip(updates, ranks, strict=True)]
        expected = torch.cat(kept).sort(descending=True).values
        found = torch.linalg.svdvals(cases.dense(tsv_m(updates)))[: len(expected)]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)

    def test_tasks_in_orthogonal_spaces_merge_to_their_sum(self) -> None:
        P, Q, s = cases.orthonormal(20, 8, 1), cases.orthonormal(16, 8, 2), cases.power_law(4, 1.0)
        tasks = [LowRank(P[:, i] * s, Q[:, i].T) for i in (slice(0, 4), slice(4, 8))]
        assert cases.error(tsv_m(tasks), tasks[0].dense() + tasks[1].dense()) < 1e-12
        assert cases.error(tsv_m([t.dense() for t in tasks]), tasks[0].dense() + tasks[1].dense()) < 1e-12

    @pytest.mark.parametrize("ranks", [[4, 2, 6], [5, 5, 5]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_adapters_equal_their_products(self, ranks: list[int], dtype: torch.dtype) -> None:
        adapters = cases.lora_updates(ranks, 64, 48, dtype=dtype)
        factored, formed = tsv_m(adapters), tsv_m([u.dense() for u in adapters], rank=ranks)
        assert isinstance(factored, LowRank)
        assert factored.rank == sum(ranks)
        assert cases.error(formed, factored) < (1e-5 if dtype == torch.float32 else 1e-11)

    def test_adapters_beside_full_fine_tunes(self) -> None:
        updates: list[Update] = [*cases.lora_updates([3], 20, 16), *cases.full_updates(2, 20, 16)]
        ranks = [3, 6, 6]  # int((16 - 3) / 2)
        merged = tsv_m(updates)
        assert isinstance(merged, Tensor)
        assert cases.error(merged, tsv_m([cases.dense(u) for u in updates], rank=ranks)) < 1e-11

    @pytest.mark.parametrize("options", [{}, {"rank": 4}])
    def test_order_of_the_tasks_does_not_matter(self, options: dict[str, Any]) -> None:
        updates = cases.full_updates(3, 24, 30, exponent=1.0)
        merged = [tsv_m(list(p), **options) for p in itertools.permutations(updates)]
        assert max(cases.error(m, merged[0]) for m in merged) < 1e-11

    def test_a_single_task_comes_back_truncated(self) -> None:
        (full,), (adapter,) = cases.full_updates(1, 20, 16), cases.lora_updates([5], 20, 16)
        assert cases.error(tsv_m([full]), full) < 1e-12
        assert cases.error(tsv_m([full], rank=3), cases.truncated(full, 3)) < 1e-12
        assert cases.error(tsv_m([adapter]), adapter) < 1e-12
        assert cases.error(tsv_m([adapter], rank=2), cases.truncated(adapter, 2)) < 1e-12

    def test_rotations_and_transposes_carry_over(self) -> None:
        updates = cases.full_updates(3, 20, 24, exponent=1.0)
        P, Q = cases.orthonormal(20, 20, 5), cases.orthonormal(24, 24, 6)
        merged = tsv_m(updates)
        assert cases.error(tsv_m([P @ u @ Q for u in updates]), P @ merged @ Q) < 1e-11
        assert cases.error(tsv_m([u.T for u in updates]), merged.T) < 1e-11

    def test_weights_multiply_the_updates(self) -> None:
        updates = cases.lora_updates([3, 2], 20, 16)
        weighted = merge_updates(updates, "tsv_m", weights=[2.0, -0.3])
        assert cases.error(weighted, tsv_m([updates[0] * 2.0, updates[1] * -0.3])) < 1e-12
        assert cases.error(weighted, tsv_m(updates)) > 1e-2

    def test_unique_where_singular_values_repeat(self) -> None:
        def task(seed: int, rotation: Tensor) -> LowRank:
            left, right = cases.orthonormal(20, 4, seed), cases.orthonormal(16, 4, seed + 1)
            return LowRank(left @ rotation * 2, rotation.T @ right.T)

        first, second = (
            tsv_m([task(10, cases.orthonormal(4, 4, seed)), task(20, cases.orthonormal(4, 4, seed + 1))])
            for seed in (1, 3)
        )
        assert cases.error(first, second) < 1e-11

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_float32_agrees_with_float64(self, form: str) -> None:
        updates: Sequence[Update] = (
            cases.full_updates(4, 120, 96) if form == "dense" else cases.lora_updates([6, 6, 6], 120, 96)
        )
        narrow = [u.to(torch.float32) for u in updates]
        expected = tsv_m([u.to(torch.float64) for u in narrow], rank=6)
        merged = tsv_m(narrow, rank=6)
        assert merged.dtype == torch.float32
        assert cases.error(merged, expected) < (1e-4 if form == "dense" else 1e-6)


class TestDegenerate:
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("copies", [2, 3])
    def test_copies_of_a_task_return_it_and_nothing_made_up(self, form: str, dtype: torch.dtype, copies: int) -> None:
        if form == "dense":
            update = cases.full_updates(1, 96, 64, dtype=dtype)[0]
            merged, expected = tsv_m([update] * copies, rank=20), cases.truncated(update, 20)
        else:
            adapter = cases.lora_updates([6], 96, 64, dtype=dtype)[0]
            merged, expected = tsv_m([adapter] * copies), adapter.dense()
        assert cases.error(merged, expected) < (1e-5 if dtype == torch.float32 else 1e-12)

    def test_a_zero_task_takes_no_part(self) -> None:
        updates = cases.full_updates(2, 20, 16)
        with_zero = tsv_m([updates[0], torch.zeros_like(updates[0]), updates[1]], rank=5)
        assert cases.error(with_zero, tsv_m(updates, rank=5)) < 1e-11
        adapters = cases.lora_updates([3, 0, 2], 20, 16)
        assert cases.error(tsv_m(adapters), tsv_m([adapters[0], adapters[2]])) < 1e-13

    def test_null_components_do_not_disturb_the_others(self) -> None:
        updates = [cases.with_spectrum(40, 32, [3 + i, 2, 1], seed=8 + i) for i in range(2)]
        assert cases.error(tsv_m(updates), tsv_m(updates, rank=3)) < 1e-11  # 16 components each, 13 of them null

    def test_zero_updates_merge_to_zero(self) -> None:
        assert torch.equal(tsv_m([torch.zeros(6, 5)] * 2), torch.zeros(6, 5))
        merged = tsv_m(cases.lora_updates([0, 0], 6, 5))
        assert (merged.rank, merged.shape) == (0, (6, 5))
        assert tsv_m([torch.zeros(0, 6, 5)] * 2).shape == (0, 6, 5)

    def test_one_by_one(self) -> None:
        assert tsv_m([torch.tensor([[-2.5]])]).item() == pytest.approx(-2.5)
        assert tsv_m([torch.tensor([[2.0]]), torch.tensor([[-6.0]])]).item() == pytest.approx(-2.0)

    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_more_tasks_than_rows_take_the_mean_with_a_warning(
        self, form: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        adapters = cases.lora_updates([2] * 5, 3, 8)
        updates = adapters if form == "lowrank" else [u.dense() for u in adapters]
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = tsv_m(updates)
        assert cases.error(merged, sum(u.dense() for u in adapters) / 5) < 1e-14
        assert "tsv_m: 5 tasks leave a 3 x 8 matrix no component each" in caplog.text
        specs = Updates.of(updates).specs
        assert create("tsv_m", {}).flops(specs, 5) == 0
        if isinstance(merged, LowRank):
            assert create("tsv_m", {}).merged_rank(specs, 5) == merged.rank

    def test_leading_dimensions_equal_the_loop(self) -> None:
        batch = [torch.stack([cases.normal(18, 15, seed=20 + 10 * i + b) for b in range(4)]) for i in range(3)]
        batch[0][1] = cases.with_spectrum(18, 15, [2, 1], seed=90)
        batch[2][1], batch[1][2], batch[1][3] = 0, batch[0][2], 0
        merged = tsv_m([u.reshape(2, 2, 18, 15) for u in batch]).reshape(4, 18, 15)
        adapters = [LowRank(cases.normal(4, 18, r, seed=30 + r), cases.normal(4, r, 15, seed=40 + r)) for r in (3, 2)]
        factored = tsv_m(adapters)
        for b in range(4):
            assert cases.error(merged[b], tsv_m([u[b] for u in batch])) < 1e-10
            assert cases.error(factored.dense()[b], tsv_m([LowRank(u.left[b], u.right[b]) for u in adapters])) < 1e-10

    @pytest.mark.parametrize("scale", [1e-20, 1e15])
    def test_extreme_scales_in_float32(self, scale: float) -> None:
        updates = cases.full_updates(2, 24, 20, dtype=torch.float32)
        assert cases.error(tsv_m([u * scale for u in updates]).double() / scale, tsv_m(updates)) < 1e-5

    def test_basis_tolerance_drops_near_copies(self) -> None:
        (update,) = cases.full_updates(1, 40, 32, exponent=1.0)
        near = update + 1e-6 * cases.normal(40, 32, seed=11)
        merged = tsv_m([update, near], rank=4, basis_tol=1e-3)
        assert cases.error(merged, cases.truncated(update, 4)) < 1e-4
        assert cases.error(tsv_m([update, near], rank=4), merged) > 0.1


def test_accuracy_and_seed_reach_the_decomposition() -> None:
    updates = cases.full_updates(4, 120, 100, exponent=0.3)
    exact, first, again, other = (
        tsv_m(updates, rank=10, **o)
        for o in ({}, {"accuracy": "fast"}, {"accuracy": "fast", "seed": 0}, {"accuracy": "fast", "seed": 100})
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 1e-3 < cases.error(first, exact) < 1


def test_facts_name_ranks_and_dropped_directions() -> None:
    first, second = cases.full_updates(2, 40, 32)
    ctx = Context(3, "layer")
    create("tsv_m", {"rank": [4, 4, 3]}).merge(Updates.of([first, first, second]), ctx)
    assert (ctx.facts["rank"], ctx.facts["cover_rank"]) == ([4, 4, 3], 11)
    assert ctx.facts["cover_u"]["dropped"] == ctx.facts["cover_v"]["dropped"] == 4


def test_estimates_grow_with_the_work() -> None:
    method = create("tsv_m", {})
    small, large = (cases.dense_specs(4, size, size) for size in (64, 256))
    assert 0 < method.flops(small, 4) < method.flops(large, 4) / 16
    assert 64 * 64 * 2 < method.workspace(small, 4) < method.workspace(large, 4) / 8
    adapters = Updates.of(cases.lora_updates([4] * 4, 256, 256)).specs
    assert method.workspace(adapters, 4) < method.workspace(large, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6}, r"rank 6 exceeds min\(m, n\) = 5 of a 6 x 5 update"),
        ({"rank": [1]}, r"rank has 1 entries for 2 tasks"),
        ({"rank": 0}, r"rank"),
        ({"basis_tol": 2.0}, r"basis_tol"),
        ({"tol": 1e-3, "accuracy": "fast"}, r"tol belongs to accuracy='exact', and accuracy is 'fast'"),
        ({"seed": -1}, r"seed"),
        ({"official": "llm"}, r"has no preset 'llm'; it has: fft, lora"),
        ({"official": "lora", "rank": 8}, r"rank=8 conflicts with official='lora'"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tsv_m([torch.ones(6, 5)] * 2, **options)


@pytest.mark.parametrize("shape", [(5,), ()])
def test_an_update_that_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"tsv_m merges matrices \(..., m, n\)"):
        tsv_m([torch.ones(shape)] * 2)
