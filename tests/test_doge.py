"""DOGE: the published optimization by torch's own Adam and autograd, its whole-model mask, and degenerate input."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import Context, create, doge
from dcmerge_ext.methods.apply import survey_model
from dcmerge_ext.methods.base import SurveyState
from dcmerge_ext.updates import Updates, UpdateSpec

MODULE = importlib.import_module("dcmerge_ext.methods.doge")  # its package hides it behind the function


def loss_of(X: Tensor, tasks: Tensor, lambdas: Tensor) -> Tensor:
    """arXiv 2501.01230: the objective of one layer as it is written, tasks (T, m, n)."""
    gap = tasks - torch.einsum("t,tmn->mn", lambdas, tasks) - lambdas.sum() * X
    return (tasks * gap).sum(-1).square().sum()


def shared_projector(tasks: Tensor, subspace: int = 6) -> Tensor:
    q = min(tasks.shape[1:])
    each = int(q / len(tasks))
    together = torch.cat([torch.linalg.svd(t, full_matrices=False).U[:, :each] for t in tasks], dim=1)
    U = torch.linalg.svd(together, full_matrices=False).U[:, : int(q / subspace)]
    return U @ U.T


def corrected(
    tasks: Tensor, coefficient: float = 0.07, iterations: int = 400, lr: float = 1e-4, subspace: int | None = 6
) -> tuple[Tensor, Tensor]:
    """lambda (T,) and X (m, n) of one layer."""
    lambdas = coefficient / tasks.flatten(1).norm(dim=1)
    off = (
        torch.eye(tasks.shape[1]).to(tasks)
        if subspace is None
        else torch.eye(tasks.shape[1]).to(tasks) - shared_projector(tasks, subspace)
    )
    X = torch.zeros_like(tasks[0], requires_grad=True)
    optimizer = torch.optim.Adam([X], lr=lr)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss_of(X, tasks, lambdas).backward()
        assert X.grad is not None
        X.grad.copy_(off @ X.grad)
        optimizer.step()
    return lambdas, X.detach()


def published(model: Mapping[str, Sequence[Tensor]], keep: float = 0.3, **options: Any) -> dict[str, Tensor]:
    """Every layer by itself, then one mask per task over the whole model."""
    layers = {name: torch.stack([u.double() for u in updates]) for name, updates in model.items()}
    whole = torch.cat([tasks.abs().flatten(1) for tasks in layers.values()], dim=1)
    below = whole.shape[1] - int(whole.shape[1] * keep)
    limits = whole.kthvalue(below).values if below else torch.zeros(len(whole)).to(whole)
    merged = {}
    for name, tasks in layers.items():
        lambdas, X = corrected(tasks, **options)
        shares = (tasks + X) * (tasks.abs() >= limits[:, None, None])
        merged[name] = torch.einsum("t,tmn->mn", lambdas, shares)
    return merged


def of_one(updates: Sequence[Tensor], **options: Any) -> Tensor:
    return published({"": updates}, **options)[""]


def moved(updates: Sequence[Update], **options: Any) -> Tensor:
    """What the correction adds to the merged update."""
    return (cases.dense(doge(updates, **options)) - cases.dense(doge(updates, **{**options, "iterations": 0}))).double()


class TestPublishedAlgorithm:
    @pytest.mark.parametrize(
        ("m", "n", "tasks"), [(12, 9, 2), (9, 12, 3), (20, 24, 4), (7, 40, 2), (40, 7, 3), (5, 6, 2)]
    )
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"iterations": 60, "lr": 1e-3, "coefficient": 0.3},
            {"subspace": 2, "keep": 1.0, "iterations": 100},
            {"subspace": None, "keep": 0.01, "iterations": 100},
        ],
    )
    def test_full_updates(self, m: int, n: int, tasks: int, options: dict[str, Any], backend: str) -> None:
        updates = [0.1 * u for u in cases.full_updates(tasks, m, n)]
        expected = of_one(updates, **options)
        assert cases.error(moved(updates, **options), expected - of_one(updates, **{**options, "iterations": 0})) < 1e-6
        assert cases.error(doge(updates, **options), expected) < 1e-9

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
    def test_updates_of_any_size(self, scale: float) -> None:
        """Above norm 1 the descent is in other units, with another eps."""
        updates = [scale * u for u in cases.full_updates(3, 12, 15)]
        expected = of_one(updates) - of_one(updates, iterations=0)
        assert expected.abs().max() > 0
        assert cases.error(moved(updates), expected) < 1e-6

    @pytest.mark.parametrize("keep", [0.05, 0.3, 1.0])
    def test_the_mask_is_of_the_whole_model(self, keep: float, backend: str) -> None:
        model = {
            "large": cases.full_updates(3, 12, 9),
            "small": [0.3 * u for u in cases.full_updates(3, 7, 14, seed=1)],
            "tall": cases.full_updates(3, 30, 4, seed=2),
        }
        found, expected = merge_updates(model, "doge", keep=keep), published(model, keep=keep)
        for name in model:
            assert cases.error(found[name], expected[name]) < 1e-9
        if keep < 1:
            assert cases.error(found["small"], doge(model["small"], keep=keep)) > 1e-2  # its own mask is another

    def test_first_step_is_the_sign_of_the_projected_gradient(self) -> None:
        """Adam's first step is lr g / (|g| + eps), whatever its betas."""
        updates = [0.1 * u for u in cases.full_updates(3, 12, 18)]
        tasks = torch.stack(updates)
        lambdas = 0.07 / tasks.flatten(1).norm(dim=1)
        X = torch.zeros_like(updates[0], requires_grad=True)
        (gradient,) = torch.autograd.grad(loss_of(X, tasks, lambdas), X)
        gradient = gradient - shared_projector(tasks) @ gradient
        step = -1e-4 * gradient / (gradient.abs() + 1e-8)
        assert cases.error(moved(updates, iterations=1, keep=1.0), lambdas.sum() * step) < 1e-9

    def test_losses_of_the_record_are_those_of_the_objective(self) -> None:
        for scale in (0.1, 30.0):
            updates = [scale * u for u in cases.full_updates(3, 12, 9)]
            ctx = Context(3, state=torch.zeros(3, dtype=torch.float64))
            create("doge", {"keep": 1.0}).merge(Updates.of(updates), ctx)
            tasks = torch.stack(updates)
            lambdas, X = corrected(tasks)
            expected = [loss_of(at, tasks, lambdas).item() for at in (torch.zeros_like(X), X)]
            assert ctx.facts["loss"] == pytest.approx(expected, rel=1e-7)
            assert ctx.facts["svd"]["routes"] == {"lapack": 3}

    def test_many_steps_without_projection_close_the_gap(self) -> None:
        """A row has n unknowns and T < n equations: the minimum is 0."""
        updates = [0.1 * u for u in cases.full_updates(3, 8, 12)]
        losses = []
        for iterations in (0, 100, 400, 6000):
            ctx = Context(3, state=torch.zeros(3, dtype=torch.float64))
            create("doge", {"iterations": iterations, "subspace": None, "lr": 1e-3}).merge(Updates.of(updates), ctx)
            losses.append(
                ctx.facts["loss"][1]
                if iterations
                else loss_of(
                    torch.zeros(8, 12), torch.stack(updates), 0.07 / torch.stack(updates).flatten(1).norm(dim=1)
                ).item()
            )
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 1e-8 * losses[0]


class TestIdentities:
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_a_single_task_comes_back_bit_for_bit(self, form: str) -> None:
        (full,), (adapter,) = cases.full_updates(1, 12, 9), cases.lora_updates([3], 12, 9)
        update = full if form == "dense" else adapter
        assert torch.equal(doge([update]), cases.dense(update))

    def test_without_steps_it_is_a_masked_sum_of_normalized_updates(self) -> None:
        updates = cases.full_updates(3, 12, 9)
        shares = [0.07 * u / u.norm() * (u.abs() >= u.abs().flatten().kthvalue(108 - 32).values) for u in updates]
        assert cases.error(doge(updates, iterations=0), shares[0] + shares[1] + shares[2]) < 1e-14
        everything = doge(updates, iterations=0, keep=1.0)
        assert cases.error(everything, sum(0.07 * u / u.norm() for u in updates)) < 1e-14

    def test_the_size_of_a_task_does_not_matter_without_steps(self) -> None:
        """What makes weights of no effect, but for their sign."""
        updates = cases.full_updates(3, 12, 9)
        plain = doge(updates, iterations=0)
        assert cases.error(doge(updates, iterations=0, weights=[2.0, 1.0, 0.25]), plain) < 1e-14
        negative = doge(updates, iterations=0, weights=[1.0, 1.0, -1.0])
        assert cases.error(negative, doge([*updates[:2], -updates[2]], iterations=0)) < 1e-14
        assert cases.error(negative, plain) > 0.1

    def test_odd(self) -> None:
        updates = cases.full_updates(3, 12, 9)
        assert cases.error(doge([-u for u in updates]), -doge(updates)) < 1e-12

    def test_an_entry_moves_no_further_than_its_steps(self) -> None:
        updates = [0.1 * u for u in cases.full_updates(3, 12, 9)]
        total = sum(0.07 / u.norm().item() for u in updates)
        assert 0 < moved(updates, iterations=10, keep=1.0).abs().max() < 1.01 * 10 * 1e-4 * total

    def test_order_of_tensors_and_tasks_does_not_matter(self) -> None:
        model = {"a": cases.full_updates(3, 12, 9), "b": cases.full_updates(3, 7, 14, seed=1)}
        found = merge_updates(model, "doge")
        for order in itertools.permutations(range(3)):
            again = merge_updates({name: [model[name][t] for t in order] for name in reversed(model)}, "doge")
            for name in model:
                assert cases.error(again[name], found[name]) < 1e-10

    @pytest.mark.parametrize("ranks", [[6, 6], [3, 2], [8, 0, 7]])
    def test_adapters_equal_their_products(self, ranks: list[int]) -> None:
        adapters = [0.1 * u for u in cases.lora_updates(ranks, 24, 30)]
        formed = [cases.dense(u) for u in adapters]
        merged = doge(adapters)
        assert isinstance(merged, Tensor)
        assert moved(adapters).norm() > 0
        assert cases.error(moved(adapters), moved(formed)) < 1e-6
        mixed: list[Update] = [formed[0], *adapters[1:]]
        assert cases.error(moved(mixed), moved(formed)) < 1e-6

    def test_leading_dimensions_equal_the_loop(self) -> None:
        """Each matrix of a batch is a layer of its own; the mask is of all of them."""
        updates = [0.1 * cases.normal(2, 2, 12, 9, seed=s) for s in (1, 2)]
        updates[0][1, 1] *= 10
        merged = doge(updates)
        parts = {f"{i}{j}": [u[i, j] for u in updates] for i in range(2) for j in range(2)}
        for name, expected in merge_updates(parts, "doge").items():
            assert cases.error(merged[int(name[0]), int(name[1])], expected) < 1e-11

    def test_all_directions_shared_is_no_correction(self) -> None:
        """subspace=1 takes the whole gradient; Adam would make steps of its round-off."""
        for dtype in (torch.float32, torch.float64):
            updates = [u.to(dtype) for u in cases.full_updates(2, 12, 20)]
            assert torch.equal(doge(updates, subspace=1), doge(updates, iterations=0))

    def test_the_same_bytes_again(self) -> None:
        updates = cases.full_updates(3, 60, 50, dtype=torch.float32)
        assert torch.equal(doge(updates), doge(updates))


class TestSurveys:
    @pytest.mark.parametrize(("dtype", "surveys"), [(torch.float32, 2), (torch.float64, 4)])
    def test_number_of_passes(self, dtype: torch.dtype, surveys: int) -> None:
        assert create("doge", {}).num_surveys(dtype) == surveys
        assert create("doge", {"keep": 1.0}).num_surveys(dtype) == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shares_of_a_survey_add_up(self, dtype: torch.dtype) -> None:
        pieces = [[cases.normal(7, 8, seed=10 * p + t, dtype=dtype) for t in range(3)] for p in range(4)]
        method = create("doge", {})

        def in_shares(state: SurveyState) -> None:
            shares = [state.fork(), state.fork()]
            for i, piece in enumerate(pieces):
                method.survey("w", Updates.of(piece), shares[i % 2])
            for share in shares:
                state.join(share)

        thresholds = survey_model(method, 3, dtype, in_shares)
        whole = torch.stack([torch.cat([piece[t].flatten() for piece in pieces]) for t in range(3)])
        assert torch.equal(thresholds, whole.abs().kthvalue(4 * 56 - int(4 * 56 * 0.3)).values)

    def test_an_adapter_that_touches_nothing_counts_with_its_zeros(self) -> None:
        x = torch.arange(1.0, 21.0).reshape(4, 5).double()
        updates = [x, cases.full_updates(1, 4, 5)[0]]
        untouched = LowRank(torch.zeros(6, 0), torch.zeros(0, 10)).to(torch.float64)
        model: dict[str, list[Update]] = {"x": [*updates], "untouched": [untouched, untouched]}
        merged = merge_updates(model, "doge", keep=0.1, iterations=0)
        zeros = {"x": updates, "untouched": [torch.zeros(6, 10).double()] * 2}
        assert torch.equal(
            cases.dense(merged["x"]), cases.dense(merge_updates(zeros, "doge", keep=0.1, iterations=0)["x"])
        )
        assert not cases.dense(merged["untouched"]).any()

    def test_a_mapping_of_two_dtypes_is_masked_in_the_wider(self) -> None:
        model = {"a": [u.float() for u in cases.full_updates(2, 12, 9)], "b": cases.full_updates(2, 7, 14, seed=1)}
        merged, expected = merge_updates(model, "doge", iterations=0), published(model, iterations=0)
        assert (merged["a"].dtype, merged["b"].dtype) == (torch.float32, torch.float64)
        for name in model:
            assert cases.error(merged[name], expected[name]) < 1e-6


class TestPrecision:
    @pytest.mark.parametrize("form", ["dense", "lowrank"])
    def test_float32_follows_the_path_of_float64(self, form: str) -> None:
        updates: list[Update] = [0.1 * u for u in cases.full_updates(4, 60, 40)]
        if form == "lowrank":
            updates = [0.1 * u for u in cases.lora_updates([4, 4, 4, 4], 60, 40)]
        singles = [u.to(torch.float32) for u in updates]
        merged = doge(singles)
        assert merged.dtype == torch.float32
        assert cases.error(merged, doge([u.to(torch.float64) for u in singles])) < 2e-5

    @pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-3, 1e15, 1e30])
    def test_sizes_whose_squares_leave_the_range_of_float32(self, scale: float) -> None:
        updates = [u.float() * scale for u in cases.full_updates(3, 12, 9)]
        assert doge(updates).isfinite().all()
        normalized = doge(updates, iterations=0)
        # at 1e-40 the updates themselves have but 17 bits
        tolerance = 1e-6 if scale > 1e-38 else 1e-3
        assert cases.error(normalized, doge(cases.full_updates(3, 12, 9), iterations=0)) < tolerance

    @pytest.mark.parametrize("small", [1e-10, 1e-40])
    def test_what_is_round_off_beside_the_largest_takes_no_part(self, small: float) -> None:
        updates = [u.float() for u in cases.full_updates(3, 12, 9)]
        nothing = small * updates[2]
        assert nothing.any()
        with_it, without = doge([*updates[:2], nothing]), doge([*updates[:2], torch.zeros(12, 9)])
        assert cases.error(with_it, without) < 1e-6


class TestDegenerate:
    def test_zero_updates_take_no_part(self) -> None:
        """The published code divides by zero."""
        updates = [0.1 * u for u in cases.full_updates(2, 12, 9)]
        assert of_one([*updates, torch.zeros_like(updates[0])], subspace=None).isnan().all()
        expected = doge(updates, subspace=None)
        for nothing in (torch.zeros(12, 9).double(), LowRank(torch.zeros(12, 0), torch.zeros(0, 9)).to(torch.float64)):
            # P is of int(q / T) components each, with T of the run
            assert cases.error(doge([updates[0], nothing, updates[1]], subspace=None), expected) < 1e-12
            assert doge([updates[0], nothing, updates[1]]).isfinite().all()

    @pytest.mark.parametrize("iterations", [0, 400])
    def test_only_zeros_merge_to_zero(self, iterations: int) -> None:
        for nothing in (
            torch.zeros(12, 9),
            LowRank(torch.zeros(12, 0), torch.zeros(0, 9)),
            LowRank(torch.zeros(12, 3), torch.ones(3, 9)),
        ):
            assert torch.equal(doge([nothing] * 2, iterations=iterations), torch.zeros(12, 9))

    def test_a_zero_matrix_inside_a_batch(self) -> None:
        updates = [0.1 * cases.normal(2, 12, 9, seed=s) for s in (1, 2)]
        for u in updates:
            u[1] = 0
        merged = doge(updates, keep=1.0)
        assert cases.error(merged[0], doge([u[0] for u in updates], keep=1.0)) < 1e-12
        assert not merged[1].any()

    def test_updates_of_deficient_rank_have_no_null_directions_in_the_subspace(self) -> None:
        """12 x 12 of rank 1: the published code would fill 4 of 6 directions per task with what the SVD leaves there."""
        updates = [cases.with_spectrum(12, 12, [1.0], seed=s) for s in (1, 2)]
        tasks = torch.stack(updates)
        U = torch.linalg.svd(torch.cat([torch.linalg.svd(t).U[:, :1] for t in tasks], 1), full_matrices=False).U[:, :2]
        lambdas = 0.07 / tasks.flatten(1).norm(dim=1)
        X = torch.zeros_like(updates[0], requires_grad=True)
        (gradient,) = torch.autograd.grad(loss_of(X, tasks, lambdas), X)
        gradient = gradient - U @ (U.T @ gradient)
        step = -1e-4 * gradient / (gradient.abs() + 1e-8)
        assert cases.error(moved(updates, iterations=1, keep=1.0), lambdas.sum() * step) < 1e-9

    def test_copies_and_opposites(self) -> None:
        (update,) = cases.full_updates(1, 12, 9)
        assert doge([update] * 3).isfinite().all()
        opposite = doge([update, -update], iterations=0)
        assert opposite.abs().max() < 1e-15

    def test_more_tasks_than_rows_are_not_projected(self) -> None:
        updates = [0.1 * u for u in cases.full_updates(9, 7, 8)]
        assert cases.error(doge(updates), of_one(updates, subspace=None)) < 1e-9
        assert torch.equal(doge(updates), doge(updates, subspace=None))

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        assert doge([torch.ones(shape)] * 2).shape == shape

    def test_one_by_one(self) -> None:
        updates = [torch.tensor([[0.01]], dtype=torch.float64), torch.tensor([[0.02]], dtype=torch.float64)]
        expected = of_one(updates, subspace=None, keep=1.0)
        assert cases.error(doge(updates, keep=1.0), expected) < 1e-9
        assert torch.equal(doge(updates), doge(updates, keep=1.0))  # int(0.3) + 1 is all there is

    def test_the_updates_are_left_alone(self) -> None:
        updates = cases.full_updates(2, 8, 6)
        before = [u.clone() for u in updates]
        for count in (1, 2):
            doge(updates[:count]).zero_()
        assert all(torch.equal(a, b) for a, b in zip(updates, before, strict=True))

    def test_directions_that_tie_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        """Orthogonal tasks: all singular values of their bases are 1, and P keeps some of them."""
        P, Q = cases.orthonormal(12, 12, 1), cases.orthonormal(12, 12, 2)
        updates = [P[:, i] * torch.arange(6.0, 0, -1).double() @ Q[:, i].T for i in (slice(0, 6), slice(6, 12))]
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            doge(cases.full_updates(2, 12, 12))
            assert not caplog.messages
            merge_updates({"w": updates}, "doge")
        assert caplog.messages == ["w: shared directions tie at the cut; one of several equally good subspaces is used"]

    def test_steps_too_long_for_the_updates_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merge_updates({"w": [0.1 * u for u in cases.full_updates(2, 12, 9)]}, "doge")
            assert not caplog.messages
            merge_updates({"w": [1e-4 * u for u in cases.full_updates(2, 12, 9)]}, "doge", lr=1e-2)
        (message,) = caplog.messages
        assert message.startswith("w: 400 steps of lr 0.01 raised the loss from")
        assert message.endswith("lower lr")


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"iterations": -1}, r"method 'doge': iterations: expected int >= 0"),
            ({"lr": 0.0}, r"lr: expected float > 0"),
            ({"lr": float("inf")}, r"lr must be a finite number above 0, got inf"),
            ({"coefficient": -0.1}, r"coefficient: expected float > 0"),
            ({"coefficient": float("nan")}, r"coefficient"),
            ({"keep": 0.0}, r"keep: expected float > 0"),
            ({"keep": 30}, r"keep: expected float <= 1"),
            ({"subspace": 0}, r"subspace: expected int >= 1"),
            ({"eta": 0.07}, r"method 'doge' has no option 'eta'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            doge([torch.ones(3, 2)] * 2, **options)

    @pytest.mark.parametrize("shape", [(), (5,)])
    def test_vectors(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"doge merges matrices \(\.\.\., m, n\), got an update of shape"):
            doge([torch.ones(shape)] * 2)


def test_cost() -> None:
    method = create("doge", {})
    full, adapters = ([UpdateSpec((768, 768), r, torch.float32)] * 4 for r in (None, 16))
    steps = 400 * 768 * 768 * (4 * (4 + 128) + 30)
    assert steps < method.flops(adapters, 4) < method.flops(full, 4) < 2 * steps
    assert method.merged_rank(adapters, 4) is None
    assert method.workspace(full, 4) >= (2 * 4 + 8) * 768 * 768


def test_the_loss_of_a_descent_is_that_of_the_objective_in_any_unit() -> None:
    for scale in (0.2, 50.0):
        tasks = scale * torch.stack(cases.full_updates(3, 8, 10))
        lambdas = 0.07 / tasks.flatten(1).norm(dim=1)
        X, losses = MODULE._descend(tasks.unbind(), 0.07 / lambdas, lambdas, None, iterations=7, lr=1e-3)
        expected = [loss_of(at, tasks, lambdas).item() for at in (torch.zeros_like(X), X)]
        assert losses == pytest.approx(expected, rel=1e-9)
