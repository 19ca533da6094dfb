"""The cover basis by ascent: algorithm 2 written out, what stays of the polar cover, and degenerate bases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.errors import OptionError
from dcmerge_ext.linalg import polar
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import Context, create, dc_merge
from dcmerge_ext.methods.stiefel import ascend
from dcmerge_ext.updates import Updates

NO_MASK_SUM = {"smoothing": "none", "aggregate": "sum", "block_size": 0}
SUM = {"smoothing": "none", "aggregate": "sum", "cover_steps": 2000}


# --- the published algorithm, written out ----------------------------------------------------------------------------


def bases(updates: list[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = [torch.linalg.svd(u, full_matrices=False) for u in updates]
    U, V = (torch.cat([side(p)[:, :rank] for p in parts], 1) for side in (lambda p: p[0], lambda p: p[2].T))
    return U, V, torch.cat([p[1][:rank] for p in parts])


def objective(left: Tensor, right: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return ((left.T @ U) * (right.T @ V)).square().sum()


def published(left: Tensor, right: Tensor, U: Tensor, V: Tensor, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Gradient ascent over A and B, U~ = expm(A - A') U~_0 and V~ = expm(B - B') V~_0."""
    A, B = (torch.zeros(len(X), len(X), dtype=X.dtype, requires_grad=True) for X in (left, right))
    for _ in range(steps):
        turned = [torch.matrix_exp(G - G.T) @ X for G, X in ((A, left), (B, right))]
        gradients = torch.autograd.grad(objective(*turned, U, V), (A, B))
        with torch.no_grad():
            A += rate * gradients[0]
            B += rate * gradients[1]
    return tuple((torch.matrix_exp(G - G.T) @ X).detach() for G, X in ((A, left), (B, right)))  # type: ignore[return-value]


def masked_sum(left: Tensor, right: Tensor, updates: list[Tensor], rank: int) -> Tensor:
    core = sum(left.T @ cases.truncated(u, rank) @ right for u in updates)
    block = torch.arange(len(core)) // rank
    return left @ (core * (block[:, None] == block)) @ right.T


def updates_of(m: int, n: int, tasks: int, rank: int, seed: int) -> list[Tensor]:
    """Updates whose spectra have no ties, in random directions."""
    return [cases.with_spectrum(m, n, cases.power_law(rank, 0.5) * (1 + i), seed + i) for i in range(tasks)]


def facts_of(updates: list[Update], **options: Any) -> tuple[Update, dict[str, Any]]:
    ctx = Context(len(updates))
    return create("dc_merge", {"cover": "stiefel", **options}).merge(Updates.of(updates), ctx), ctx.facts


class TestPublishedAlgorithm:
    def test_gradient(self) -> None:
        U, V, _ = bases(updates_of(10, 12, 3, 2, 1), 2)
        left, right = (polar(cases.normal(len(X), 6, seed=len(X))).Q.requires_grad_() for X in (U, V))
        (gradient,) = torch.autograd.grad(objective(left, right, U, V), left)
        P, Q = left.T @ U, right.T @ V
        torch.testing.assert_close(2 * U @ (P * Q * Q).T, gradient)

    @pytest.mark.parametrize(("m", "n", "seed"), [(10, 10, 0), (10, 12, 3), (14, 9, 7)])
    def test_reaches_its_maximum(self, m: int, n: int, seed: int) -> None:
        updates = updates_of(m, n, 3, 2, seed)
        U, V, _ = bases(updates, 2)
        left, right = published(polar(U).Q, polar(V).Q, U, V, 800, 0.1)
        merged, facts = facts_of(updates, rank=2, **SUM)
        (trace,) = facts["cover_objective"]
        assert trace[0] == pytest.approx(float(objective(polar(U).Q, polar(V).Q, U, V)), abs=1e-12)
        assert trace[-1] == pytest.approx(float(objective(left, right, U, V)), abs=1e-9)
        assert trace[0] < trace[-1] <= 6
        assert cases.error(merged, masked_sum(left, right, updates, 2)) < 1e-5
        assert cases.error(merged, dc_merge(updates, rank=2, smoothing="none", aggregate="sum")) > 1e-3

    def test_its_start_leads_to_the_same_maximum(self) -> None:
        updates = updates_of(10, 10, 3, 2, 0)
        U, V, _ = bases(updates, 2)
        P, _, Qh = torch.linalg.svd(sum(updates))
        left, right = published(P[:, :6], Qh[:6].T, U, V, 1500, 0.1)
        _, facts = facts_of(updates, rank=2, **SUM)
        assert objective(P[:, :6], Qh[:6].T, U, V) < facts["cover_objective"][0][0] - 1
        assert facts["cover_objective"][0][-1] == pytest.approx(float(objective(left, right, U, V)), abs=1e-9)


class TestAscent:
    @pytest.mark.parametrize(("m", "tasks", "rank"), [(40, 4, 8), (24, 4, 6), (20, 4, 6)])
    def test_never_falls_and_ends_where_it_is_stationary(self, m: int, tasks: int, rank: int) -> None:
        U, V, _ = bases(updates_of(m, m + 3, tasks, rank, m), rank)
        P, Q = polar(U).H, polar(V).H
        (X, Y), trace = ascend(P, Q, 3000)
        assert all(later >= earlier for earlier, later in itertools.pairwise(trace))
        assert trace[-1] > trace[0] + 1e-3
        for turn in (X, Y):
            torch.testing.assert_close(turn.T @ turn, torch.eye(len(X), dtype=X.dtype), rtol=0, atol=1e-13)
        P, Q = X.T @ P, Y.T @ Q
        assert (P * Q).square().sum().item() == pytest.approx(trace[-1], abs=1e-10)
        for mine, other in ((P, Q), (Q, P)):
            gradient = mine @ (mine * other * other).T
            assert (gradient - gradient.T).norm() < 1e-6

    def test_each_basis_vector_stays_that_of_its_component(self) -> None:
        U, V, _ = bases(updates_of(60, 70, 4, 8, 5), 8)
        P, Q = polar(U).H, polar(V).H
        (X, Y), _ = ascend(P, Q, 500)
        assert torch.equal(((X.T @ P) * (Y.T @ Q)).square().argmax(0), torch.arange(32))

    def test_steps_are_bounded(self) -> None:
        updates = updates_of(24, 24, 4, 6, 2)
        lengths = [len(facts_of(updates, cover_steps=n)[1]["cover_objective"][0]) for n in (1, 3)]
        assert lengths == [2, 4]
        assert len(facts_of(updates)[1]["cover_objective"][0]) <= 251


# --- identities ------------------------------------------------------------------------------------------------------


def test_unmasked_untrimmed_sum_is_the_sum(backend: str) -> None:
    updates = cases.full_updates(3, 24, 30)
    merged = dc_merge(updates, rank=4, cover="stiefel", **NO_MASK_SUM)
    assert cases.error(merged, sum(cases.truncated(u, 4) for u in updates)) < 1e-11


@pytest.mark.parametrize("options", [{}, {"aggregate": "sum"}, {"keep": 1.0}])
def test_a_single_task_comes_back(options: dict[str, Any]) -> None:
    (full,), (adapter,) = cases.full_updates(1, 20, 16), cases.lora_updates([5], 20, 16)
    for update in (full, adapter):
        merged, facts = facts_of([update], smoothing="none", **options)
        assert cases.error(merged, update) < 1e-12
        assert len(facts["cover_objective"][0]) == 1  # a maximum already


def test_tasks_in_orthogonal_spaces_are_at_the_maximum() -> None:
    P, Q = cases.orthonormal(20, 8, 1), cases.orthonormal(16, 8, 2)
    s = cases.power_law(4, 1.0)
    tasks = [LowRank(P[:, i] * s * (1 + i.start), Q[:, i].T) for i in (slice(0, 4), slice(4, 8))]
    merged, facts = facts_of(tasks, smoothing="none")
    assert facts["cover_objective"] == [[pytest.approx(8.0, abs=1e-12)]]
    assert cases.error(merged, tasks[0].dense() + tasks[1].dense()) < 1e-12


@pytest.mark.parametrize("options", [SUM, {**SUM, "block_size": 4}, {"cover_steps": 2000, "keep": 0.6}])
def test_order_of_the_tasks_does_not_matter(options: dict[str, Any]) -> None:
    updates = updates_of(24, 30, 3, 4, 11)
    merged = [dc_merge(list(p), rank=4, cover="stiefel", **options) for p in itertools.permutations(updates)]
    assert max(cases.error(m, merged[0]) for m in merged) < 1e-5


@pytest.mark.parametrize("factor", [4.0, 0.3, -1.0])
def test_homogeneous(factor: float) -> None:
    updates = cases.full_updates(3, 12, 9)
    merged = dc_merge(updates, cover="stiefel", **SUM)
    assert cases.error(dc_merge([u * factor for u in updates], cover="stiefel", **SUM), factor * merged) < 1e-5


def test_backends_agree(backend: str) -> None:
    updates = updates_of(24, 30, 3, 4, 13)
    U, V, _ = bases(updates, 4)
    (X, Y), _ = ascend(polar(U).H, polar(V).H, 2000)
    expected = masked_sum(polar(U).Q @ X, polar(V).Q @ Y, updates, 4)
    assert cases.error(dc_merge(updates, rank=4, cover="stiefel", **SUM), expected) < 1e-5


class TestForms:
    @pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 5, 3]])
    @pytest.mark.parametrize("options", [SUM, {"cover_steps": 2000, "keep": 0.6}])
    def test_adapters_and_their_dense_products_agree(self, ranks: list[int], options: dict[str, Any]) -> None:
        adapters = cases.lora_updates(ranks, 30, 24)
        factored = dc_merge(adapters, cover="stiefel", **{"smoothing": "none", **options})
        formed = dc_merge(
            [a.dense() for a in adapters], rank=ranks, cover="stiefel", **{"smoothing": "none", **options}
        )
        assert isinstance(factored, LowRank)
        assert factored.rank == sum(ranks)
        assert cases.error(factored, formed) < 1e-5

    @pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 5, 3]])  # from Gram matrices of the factors, and one by one
    def test_float32_adapters(self, ranks: list[int]) -> None:
        adapters = cases.lora_updates(ranks, 60, 48, dtype=torch.float32)
        merged = dc_merge(adapters, cover="stiefel", **SUM)
        assert merged.dtype == torch.float32
        wide = dc_merge([a.to(torch.float64) for a in adapters], cover="stiefel", **SUM)
        assert cases.error(merged, wide) < 1e-5

    @pytest.mark.parametrize("options", [{**SUM, "cover_steps": 50}, {"keep": 0.6, "cover_steps": 50}])
    def test_float32_dense(self, options: dict[str, Any]) -> None:
        updates = updates_of(60, 48, 3, 8, 4)
        narrow = dc_merge([u.float() for u in updates], rank=8, cover="stiefel", **options)
        assert narrow.dtype == torch.float32
        assert cases.error(narrow, dc_merge(updates, rank=8, cover="stiefel", **options)) < 1e-4

    def test_mixed(self) -> None:
        adapters = cases.lora_updates([3, 3], 20, 16)
        mixed = dc_merge([adapters[0], adapters[1].dense()], rank=3, cover="stiefel", **SUM)
        assert isinstance(mixed, Tensor)
        assert cases.error(mixed, dc_merge(adapters, rank=3, cover="stiefel", **SUM)) < 1e-5

    @pytest.mark.parametrize(
        "make", [lambda: cases.full_updates(3, 12, 10), lambda: cases.lora_updates([2] * 3, 12, 10)]
    )
    def test_a_batch_is_its_matrices(self, make: Callable[[], list[Update]]) -> None:
        singles = [make(), [u * (1 + i) for i, u in enumerate(make())]]
        batch: list[Update] = []
        for pair in zip(*singles, strict=True):
            if isinstance(pair[0], LowRank):
                batch.append(LowRank(*(torch.stack([getattr(u, x) for u in pair]) for x in ("left", "right"))))
            else:
                batch.append(torch.stack(pair))
        merged, facts = facts_of(batch)
        assert len(facts["cover_objective"]) == 2
        for i, updates in enumerate(singles):
            alone, found = facts_of(updates)
            assert cases.error(cases.dense(merged)[i], alone) < 1e-7
            assert facts["cover_objective"][i][-1] == pytest.approx(found["cover_objective"][0][-1], abs=1e-10)


# --- input where a careless implementation breaks --------------------------------------------------------------------


class TestDegenerate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("aggregate", ["sum", "ties"])
    def test_copies_of_a_task(self, dtype: torch.dtype, aggregate: str) -> None:
        (update,) = cases.full_updates(1, 20, 16, dtype=dtype)
        options = {"aggregate": aggregate, "rank": 4}
        # the polar cover is symmetric in the copies, a saddle: no step is taken, which round-off would have to choose
        merged = dc_merge([update, update], cover="stiefel", **options)
        assert cases.error(merged, dc_merge([update, update], **options)) < 1e-6

    def test_near_copies_keep_their_sum(self) -> None:
        (update,) = cases.full_updates(1, 20, 16)
        pair = [update, update + 1e-4 * cases.normal(20, 16, seed=3)]
        options = {"rank": 4, "smoothing": "none", "aggregate": "sum"}
        assert cases.error(dc_merge(pair, cover="stiefel", **options), 2 * cases.truncated(update, 4)) < 2e-3
        assert cases.error(dc_merge(pair, **options), 2 * cases.truncated(update, 4)) > 0.7

    def test_a_zero_update_takes_no_part(self) -> None:
        updates = updates_of(20, 16, 2, 3, 1)
        with_zero, facts = facts_of([*updates, torch.zeros(20, 16, dtype=torch.float64)], rank=3, **SUM)
        alone, expected = facts_of(updates, rank=3, **SUM)
        assert cases.error(with_zero, alone) < 1e-6
        assert facts["cover_objective"][0][-1] == pytest.approx(expected["cover_objective"][0][-1], abs=1e-10)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (6, 5), (2, 3, 4)])
    @pytest.mark.parametrize("tasks", [1, 2, 5])
    def test_finite(self, shape: tuple[int, ...], tasks: int) -> None:
        updates = [cases.normal(*shape, seed=i) for i in range(tasks)]
        updates[0] = updates[0] * 0
        merged = merge_updates(updates, cover="stiefel")
        assert merged.shape == shape
        assert cases.dense(merged).isfinite().all()
        assert merge_updates([u * 0 for u in updates], cover="stiefel").count_nonzero() == 0  # type: ignore[union-attr]

    def test_more_components_than_rows(self) -> None:
        updates = cases.full_updates(3, 10, 8)
        merged = dc_merge(updates, rank=4, cover="stiefel", **NO_MASK_SUM)
        assert cases.error(merged, sum(cases.truncated(u, 4) for u in updates)) < 1e-11

    def test_fewer_rows_than_tasks_gives_the_mean(self, caplog: pytest.LogCaptureFixture) -> None:
        updates = [cases.normal(2, 9, seed=i) for i in range(3)]
        merged, facts = facts_of(updates)
        assert cases.error(merged, sum(updates) / 3) < 1e-14
        assert "cover_objective" not in facts


# --- options ---------------------------------------------------------------------------------------------------------


def test_polar_is_the_default_and_says_nothing_of_an_objective() -> None:
    updates = cases.full_updates(2, 12, 9)
    ctx = Context(2)
    merged = create("dc_merge", {}).merge(Updates.of(updates), ctx)
    assert "cover_objective" not in ctx.facts
    assert torch.equal(cases.dense(merged), cases.dense(dc_merge(updates, cover="polar")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cover": "qr"}, "cover"),
        ({"cover": "stiefel", "cover_steps": 0}, "cover_steps"),
        ({"cover_steps": 5}, "cover_steps belongs to cover='stiefel', and cover is 'polar'"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dc_merge(cases.full_updates(2, 6, 5), **options)


def test_the_plan_counts_the_steps() -> None:
    specs = cases.dense_specs(4, 64, 64)
    polar_cost, ten, twenty = (
        create("dc_merge", o).flops(specs, 4)
        for o in ({}, {"cover": "stiefel", "cover_steps": 10}, {"cover": "stiefel", "cover_steps": 20})
    )
    assert twenty - ten == ten - polar_cost == 90 * 10 * 64**3
