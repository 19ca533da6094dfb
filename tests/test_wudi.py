"""WUDI-Merging: the published optimization by torch's own Adam and autograd, its identities, and degenerate input."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import Context, create, wudi
from dcmerge_ext.updates import Updates, UpdateSpec

MODULE = importlib.import_module("dcmerge_ext.methods.wudi")  # its package hides it behind the function


def loss_of(M: Tensor, updates: Sequence[Tensor]) -> Tensor:
    """arXiv 2503.08099: the objective as it is written."""
    terms = [((M - D) @ D.mT).square().sum() / D.square().sum() for D in updates]
    return torch.stack(terms).sum()


def published(updates: Sequence[Tensor], iterations: int = 300, lr: float = 1e-5) -> Tensor:
    tasks = torch.stack([u.double() for u in updates])
    M = tasks.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([M], lr=lr)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss_of(M, tasks.unbind()).backward()
        optimizer.step()
    return M.detach()


def moved(merged: Update, updates: Sequence[Update]) -> Tensor:
    """How far from the sum."""
    return cases.dense(merged).double() - torch.stack([cases.dense(u).double() for u in updates]).sum(0)


def fine_tunes(tasks: int, m: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Updates whose entries are a few hundred steps of the default learning rate."""
    return [(5e-3 * u).to(dtype) for u in cases.full_updates(tasks, m, n)]


class TestPublishedAlgorithm:
    @pytest.mark.parametrize(
        ("m", "n", "tasks"), [(12, 9, 2), (9, 12, 3), (16, 16, 4), (1, 7, 2), (7, 1, 2), (5, 40, 3)]
    )
    @pytest.mark.parametrize("options", [{}, {"iterations": 50, "lr": 1e-4}, {"iterations": 1}])
    def test_full_updates(self, m: int, n: int, tasks: int, options: dict[str, Any], backend: str) -> None:
        updates = fine_tunes(tasks, m, n)
        step, expected = moved(wudi(updates, **options), updates), moved(published(updates, **options), updates)
        assert expected.abs().max() > 1e-6
        assert cases.error(step, expected) < 1e-6

    @pytest.mark.parametrize("ranks", [[2, 3], [1, 0, 4], [6, 9]])
    @pytest.mark.parametrize("form", ["lowrank", "mixed"])
    def test_adapters(self, ranks: list[int], form: str) -> None:
        updates: list[Update] = [u * 5e-3 for u in cases.lora_updates(ranks, 10, 24)]
        if form == "mixed":
            updates[0] = cases.dense(updates[0])
        formed = [cases.dense(u) for u, r in zip(updates, ranks, strict=True) if r]
        merged = wudi(updates)
        assert isinstance(merged, Tensor)
        assert cases.error(moved(merged, updates), moved(published(formed), formed)) < 1e-6

    @pytest.mark.parametrize("preset", ["vit", "roberta"])
    def test_presets_differ_in_the_learning_rate(self, preset: str) -> None:
        updates = fine_tunes(2, 8, 6)
        expected = published(updates, 300, {"vit": 1e-5, "roberta": 2e-5}[preset])
        assert cases.error(wudi(updates, official=preset), expected) < 1e-8

    def test_first_step_is_the_sign_of_the_gradient(self) -> None:
        """Adam's first step is lr g / (|g| + eps), whatever its betas."""
        updates = fine_tunes(3, 8, 6)
        M = sum(updates[1:], updates[0]).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(M, updates), M)
        expected = -1e-5 * gradient / (gradient.abs() + 1e-8)
        assert cases.error(moved(wudi(updates, iterations=1), updates), expected) < 1e-7

    def test_many_steps_reach_the_minimizer_of_regmean(self) -> None:
        updates = fine_tunes(3, 8, 6)
        grams = [u.T @ u / u.square().sum() for u in updates]
        minimizer = sum(u @ g for u, g in zip(updates, grams, strict=True)) @ torch.linalg.inv(sum(grams))
        assert cases.error(wudi(updates), minimizer) > 1e-2  # the method is the path, not its end
        assert cases.error(wudi(updates, iterations=20_000), minimizer) < 1e-3

    @pytest.mark.parametrize(("m", "n"), [(6, 40), (20, 16)])
    def test_losses_of_the_record_are_those_of_the_objective(self, m: int, n: int) -> None:
        updates = fine_tunes(2, m, n)
        ctx = Context(2)
        merged = create("wudi", {}).merge(Updates.of(updates), ctx)
        assert isinstance(merged, Tensor)
        before, after = ctx.facts["loss"]
        assert before == pytest.approx(loss_of(updates[0] + updates[1], updates).item(), rel=1e-10)
        assert after == pytest.approx(loss_of(merged, updates).item(), rel=1e-7)
        assert after < before

    def test_a_toy_of_known_losses(self) -> None:
        """Two tasks of norm 1 with one common input direction, by hand."""
        first = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        second = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
        ctx = Context(2)
        merged = create("wudi", {"iterations": 1, "lr": 0.25}).merge(Updates.of([first, second]), ctx)
        # L = sum_i |(M - D_i) e_1|^2: 2 at the sum; the gradient is 2 in both entries of the first column
        torch.testing.assert_close(merged, torch.tensor([[0.75, 0.0], [0.75, 0.0]], dtype=torch.float64))
        assert ctx.facts["loss"] == pytest.approx([2.0, 2 * (0.75**2 + 0.25**2)])


class TestIdentities:
    def test_no_steps_give_the_sum(self) -> None:
        updates = cases.full_updates(3, 12, 9)
        assert cases.error(wudi(updates, iterations=0), updates[0] + updates[1] + updates[2]) < 1e-15
        adapters = cases.lora_updates([2, 3], 12, 9)
        assert isinstance(wudi(adapters, iterations=0), Tensor)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_single_task_comes_back_bit_for_bit(self, dtype: torch.dtype) -> None:
        (full,), (adapter,) = cases.full_updates(1, 40, 30, dtype=dtype), cases.lora_updates([3], 40, 30, dtype=dtype)
        assert torch.equal(wudi([full]), full)
        assert torch.equal(wudi([adapter]), adapter.dense())
        for nothing in (torch.zeros_like(full), LowRank(torch.zeros(40, 2, dtype=dtype), adapter.right[:2])):
            for tasks in ([adapter, nothing], [nothing, adapter]):
                assert cases.error(wudi(tasks), adapter) < 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_tasks_of_orthogonal_inputs_merge_to_their_sum(self, dtype: torch.dtype, form: str) -> None:
        P, Q = cases.orthonormal(60, 8, 1), cases.orthonormal(50, 8, 2)
        tasks: list[Update] = [LowRank(P[:, i].to(dtype), Q[:, i].T.to(dtype)) for i in (slice(0, 4), slice(4, 8))]
        if form == "dense":
            tasks = [cases.dense(t) for t in tasks]
        total = cases.dense(tasks[0]) + cases.dense(tasks[1])
        assert cases.error(wudi(tasks), total) < 4 * torch.finfo(dtype).eps

    def test_small_entries_of_the_gradient_are_no_round_off(self) -> None:
        """Adam's first steps are as long for them as for large ones: in float32 they have to be taken, too."""
        random = torch.Generator().manual_seed(0)
        adapters = [
            LowRank(*(torch.randn(*shape, dtype=torch.float64, generator=random) for shape in ((32, 16), (16, 1024))))
            for _ in range(8)
        ]
        total = sum((u.dense() for u in adapters[1:]), adapters[0].dense())
        exact = wudi(adapters, iterations=5, lr=0.1) - total
        single = wudi([u.to(torch.float32) for u in adapters], iterations=5, lr=0.1).double() - total
        assert cases.error(single, exact) < 1e-4

    def test_order_of_the_tasks_does_not_matter(self) -> None:
        updates = fine_tunes(3, 20, 24)
        merged = [wudi(list(p)) for p in itertools.permutations(updates)]
        assert max(cases.error(m, merged[0]) for m in merged) < 1e-9

    def test_odd(self) -> None:
        updates = fine_tunes(3, 12, 9)
        assert cases.error(wudi([-u for u in updates]), -wudi(updates)) < 1e-14

    def test_scaling_the_updates_is_scaling_the_learning_rate(self) -> None:
        """The step is absolute: homogeneous only together with lr, up to Adam's eps."""
        updates = cases.full_updates(3, 12, 9)
        both = wudi([100.0 * u for u in updates], lr=1e-3)
        assert cases.error(both, 100 * wudi(updates, lr=1e-5)) < 1e-6
        assert cases.error(wudi([0.01 * u for u in updates]), 0.01 * wudi(updates)) > 1e-2

    def test_an_entry_moves_no_further_than_its_steps(self) -> None:
        updates = fine_tunes(3, 12, 9)
        assert moved(wudi(updates), updates).abs().max() < 1.01 * 300 * 1e-5

    def test_the_loss_falls_for_each_longer_path(self) -> None:
        updates = fine_tunes(4, 16, 12)
        losses = [loss_of(wudi(updates, iterations=i), updates).item() for i in (0, 10, 50, 150, 300)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.9 * losses[0]

    @pytest.mark.parametrize("rank", [3, 20])
    def test_adapters_equal_their_products(self, rank: int) -> None:
        adapters = [u * 5e-3 for u in cases.lora_updates([rank, rank], 30, 40)]
        formed = [u.dense() for u in adapters]
        assert cases.error(moved(wudi(adapters), formed), moved(wudi(formed), formed)) < 1e-6

    def test_rows_are_independent(self) -> None:
        """Given the tasks' input subspaces: what panels of rows rely on."""
        updates = fine_tunes(2, 40, 12)
        half, gram, _ = MODULE._start(Updates.of(updates), updates[0] + updates[1])
        whole = MODULE._adam(half, gram, 50, 1e-5)
        rows = torch.cat([MODULE._adam(half[i : i + 1], gram, 50, 1e-5) for i in range(40)])
        torch.testing.assert_close(rows, whole, rtol=1e-9, atol=1e-15)

    def test_panels_equal_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        updates = fine_tunes(2, 137, 12)
        expected = wudi(updates)
        monkeypatch.setattr(MODULE, "_PANEL", 12 * 65)  # two panels of 65 rows and one of 7
        assert cases.error(moved(wudi(updates), updates), moved(expected, updates)) < 1e-9

    @pytest.mark.parametrize("narrow", [False, True])
    def test_leading_dimensions_equal_the_loop(self, narrow: bool) -> None:
        """Each matrix of a batch has norms, steps and loss of its own."""
        m, n = (3, 20) if narrow else (12, 9)
        updates = [5e-3 * cases.normal(2, 2, m, n, seed=s) for s in (1, 2)]
        updates[0][1, 1] *= 10
        merged = wudi(updates)
        for i, j in itertools.product(range(2), range(2)):
            assert cases.error(merged[i, j], wudi([u[i, j] for u in updates])) < 1e-12

    def test_a_batch_goes_as_one_where_calls_cost_more_than_caches(self) -> None:
        updates = [5e-3 * cases.normal(2, 12, 9, seed=s) for s in (1, 2)]
        half, gram, _ = MODULE._start(Updates.of(updates), updates[0] + updates[1])
        together, apart = MODULE._adam(half, gram, 300, 1e-5), MODULE._descend(half, gram, 300, 1e-5)
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-15)

    def test_the_same_bytes_again_and_the_same_steps_on_any_number_of_threads(self, restore_threads: None) -> None:
        updates = fine_tunes(3, 1500, 200, torch.float32)  # three panels
        assert torch.equal(wudi(updates, iterations=5), wudi(updates, iterations=5))
        half, gram, _ = MODULE._start(Updates.of(updates), updates[0] + updates[1] + updates[2])
        torch.set_num_threads(1)
        one = MODULE._descend(half, gram, 20, 1e-5)
        torch.set_num_threads(2)
        assert torch.equal(MODULE._descend(half, gram, 20, 1e-5), one)


class TestPrecision:
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_float32_follows_the_path_of_float64(self, form: str) -> None:
        updates: list[Update] = list(fine_tunes(4, 60, 40))
        if form == "lowrank":
            updates = [u * 5e-3 for u in cases.lora_updates([4, 4, 4, 4], 60, 40)]
        single = wudi([u.to(torch.float32) for u in updates])
        assert single.dtype == torch.float32
        assert cases.error(single, wudi(updates)) < 1e-5

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_sizes_whose_squares_leave_the_range_of_float32(self, scale: float, form: str) -> None:
        updates: list[Update] = [u.float() * scale for u in cases.full_updates(2, 12, 9)]
        if form == "lowrank":
            updates = [u.to(torch.float32) * scale for u in cases.lora_updates([3, 2], 12, 9)]
        merged = wudi(updates)
        assert merged.isfinite().all()
        total = cases.dense(updates[0]) + cases.dense(updates[1])
        # eps stops the steps of tiny gradients, and steps of 1e-5 are nothing beside huge entries
        assert (merged - total).abs().max() <= 1e-5 + 1e-6 * total.abs().max()


class TestDegenerate:
    def test_zero_updates_take_no_part(self) -> None:
        """The published objective divides zero by zero."""
        updates = fine_tunes(2, 12, 9)
        assert published([*updates, torch.zeros_like(updates[0])]).isnan().all()
        for nothing in (torch.zeros(12, 9).double(), LowRank(torch.zeros(12, 0), torch.zeros(0, 9)).to(torch.float64)):
            assert cases.error(wudi([updates[0], nothing, updates[1]]), wudi(updates)) < 1e-14

    def test_only_zeros_merge_to_zero(self) -> None:
        assert torch.equal(wudi([torch.zeros(6, 5)] * 2), torch.zeros(6, 5))
        assert torch.equal(wudi([LowRank(torch.zeros(6, 0), torch.zeros(0, 5))] * 2), torch.zeros(6, 5))
        assert torch.equal(wudi([LowRank(torch.zeros(6, 3), torch.ones(3, 5))] * 2), torch.zeros(6, 5))

    def test_a_zero_matrix_inside_a_batch(self) -> None:
        updates = [5e-3 * cases.normal(2, 12, 9, seed=s) for s in (1, 2)]
        for u in updates:
            u[1] = 0
        merged = wudi(updates)
        assert cases.error(merged[0], wudi([u[0] for u in updates])) < 1e-12
        assert torch.equal(merged[1], torch.zeros(12, 9, dtype=torch.float64))

    def test_copies_and_opposites(self) -> None:
        (update,) = fine_tunes(1, 12, 9)
        assert cases.error(wudi([update] * 3), published([update] * 3)) < 1e-8
        assert torch.equal(wudi([update, -update]), torch.zeros_like(update))  # the minimum already

    def test_more_tasks_than_rows(self) -> None:
        updates = fine_tunes(7, 3, 4)
        assert cases.error(wudi(updates), published(updates)) < 1e-8

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        assert wudi([torch.ones(shape)] * 2).shape == shape

    def test_one_by_one(self) -> None:
        updates = [torch.tensor([[0.01]], dtype=torch.float64), torch.tensor([[0.02]], dtype=torch.float64)]
        assert cases.error(wudi(updates), published(updates)) < 1e-8

    def test_steps_too_long_for_the_updates_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merge_updates({"w": fine_tunes(2, 12, 9)}, "wudi")
            assert not caplog.messages
            merge_updates({"w": [1e-6 * u for u in fine_tunes(2, 12, 9)]}, "wudi")
        (message,) = caplog.messages
        assert message.startswith("w: 300 steps of lr 1e-05 raised the loss from")
        assert message.endswith("lower lr")


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"iterations": -1}, r"method 'wudi': iterations: expected int >= 0"),
            ({"iterations": 2.5}, r"iterations: expected int, got float"),
            ({"lr": 0.0}, r"lr: expected float > 0"),
            ({"lr": float("inf")}, r"lr must be a finite number above 0, got inf"),
            ({"official": "bert"}, r"has no preset 'bert'; it has: vit, roberta"),
            ({"official": "vit", "lr": 2e-5}, r"option lr=2e-05 conflicts with official='vit'"),
            ({"steps": 5}, r"method 'wudi' has no option 'steps'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            wudi([torch.ones(3, 2)] * 2, **options)

    @pytest.mark.parametrize("shape", [(), (5,)])
    def test_vectors(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"wudi merges matrices \(\.\.\., m, n\), got an update of shape"):
            wudi([torch.ones(shape)] * 2)


def test_cost_counts_the_cheaper_product() -> None:
    method = create("wudi", {})
    full, adapters = ([UpdateSpec((768, 768), r, torch.float32)] * 4 for r in (None, 16))
    assert method.flops(full, 4) == pytest.approx(300 * 2 * 768**3, rel=0.1)
    assert method.flops(adapters, 4) == pytest.approx(300 * 768 * 768 * (4 * 64 + 30), rel=0.1)
    assert method.merged_rank(adapters, 4) is None
    assert method.workspace(full, 4) >= 5 * 768 * 768
