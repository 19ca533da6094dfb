"""TIES-Merging: whole-model trimming, streamed, against the same rules on one concatenated vector per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import create, ties
from dcmerge_ext.methods.apply import survey_model
from dcmerge_ext.methods.base import SurveyState
from dcmerge_ext.updates import Updates

SHAPES = {"a": (7, 5), "b": (11,), "c": (), "d": (2, 3, 4), "e": (1, 600)}


def brute_force(model: Mapping[str, Sequence[Update]], keep: float, disjoint: str = "mean") -> dict[str, np.ndarray]:
    """arXiv 2306.01708 with the rules of its published code, on (T, N) in numpy."""
    tasks = len(next(iter(model.values())))
    x = np.stack([np.concatenate([cases.dense(u[t]).numpy().ravel() for u in model.values()]) for t in range(tasks)])
    if keep < 1:
        ascending = np.sort(np.abs(x), axis=1)
        limit = ascending[:, max(0, x.shape[1] - int(x.shape[1] * keep) - 1)]
        x = np.where(np.abs(x) >= limit[:, None], x, 0)
    sign = np.sign(sum(x))
    sign[sign == 0] = np.sign(sign.sum())
    selected = np.where(sign > 0, x > 0, x < 0)
    merged = sum(x * selected)
    if disjoint == "mean":
        merged = merged / np.maximum(selected.sum(0), 1)
    parts = np.split(merged, np.cumsum([cases.dense(u[0]).numel() for u in model.values()])[:-1])
    return {name: p.reshape(u[0].shape) for (name, u), p in zip(model.items(), parts, strict=True)}


def model_of(dtype: torch.dtype, tasks: int = 4, seed: int = 0, steps: float | None = None) -> dict[str, list[Tensor]]:
    """Tensors of several shapes; with ``steps``, values on a grid, where magnitudes tie and sums cancel exactly."""
    model = {}
    for j, (name, shape) in enumerate(SHAPES.items()):
        values = [cases.normal(*shape, seed=1_000 * seed + 10 * j + t) for t in range(tasks)]
        model[name] = [(v if steps is None else (v / steps).round() * steps).to(dtype) for v in values]
    return model


def same(actual: Mapping[str, Update], expected: Mapping[str, np.ndarray], tolerance: float = 0) -> None:
    assert list(actual) == list(expected)
    for name, merged in actual.items():
        assert isinstance(merged, Tensor)
        np.testing.assert_allclose(merged.numpy(), expected[name], rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [0.001, 0.2, 0.5, 0.97, 0.9999, 1.0])
@pytest.mark.parametrize("disjoint", ["mean", "sum"])
def test_equals_the_rules_on_concatenated_vectors(dtype: torch.dtype, keep: float, disjoint: str, backend: str) -> None:
    model = model_of(dtype)
    merged = merge_updates(model, "ties", keep=keep, disjoint=disjoint)
    same(merged, brute_force(model, keep, disjoint), 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_rules_where_magnitudes_tie_and_sums_cancel(
    dtype: torch.dtype, keep: float, seed: int, backend: str
) -> None:
    model = model_of(dtype, seed=seed, steps=0.5)
    same(merge_updates(model, "ties", keep=keep), brute_force(model, keep), 1e-6)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 2.0), (-1.0, -2.0)])
def test_the_majority_of_the_whole_model_decides_exact_cancellation(sign: float, expected: float) -> None:
    model = {
        "cancels": [torch.tensor([2.0]), torch.tensor([-2.0])],
        "elsewhere": [sign * torch.tensor([1.0, 1.0, -3.0]), sign * torch.tensor([1.0, 1.0, 1.0])],
    }
    assert merge_updates(model, "ties", keep=1.0)["cancels"].item() == expected
    # alone, there is no majority, and the negative entries are taken
    assert merge_updates({"cancels": model["cancels"]}, "ties", keep=1.0)["cancels"].item() == -2.0


def test_one_threshold_for_the_whole_model() -> None:
    model = {"large": [torch.tensor([5.0, -6.0, 7.0])], "small": [torch.tensor([1.0, 2.0, 3.0])]}
    merged = merge_updates(model, "ties", keep=0.4)  # int(6 * 0.4) + 1 = 3 entries
    assert merged["large"].tolist() == [5.0, -6.0, 7.0]
    assert merged["small"].tolist() == [0.0, 0.0, 0.0]
    assert ties([model["small"][0]], keep=0.4).tolist() == [0.0, 2.0, 3.0]


def test_every_tie_at_the_threshold_survives() -> None:
    x = torch.tensor([1.0, -1.0, 1.0, 3.0, 0.5])
    assert ties([x], keep=0.2).tolist() == [1.0, -1.0, 1.0, 3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_are_trimmed_as_their_products(dtype: torch.dtype) -> None:
    adapters = cases.lora_updates([3, 0, 2], 12, 9, dtype=dtype)
    model: dict[str, list[Update]] = {
        "w": list(adapters),
        "v": cases.full_updates(3, 5, 4, dtype=dtype),
        "u": cases.lora_updates([0, 0, 0], 3, 3, dtype=dtype),
    }
    formed = {name: [cases.dense(u) for u in updates] for name, updates in model.items()}
    for keep in (0.2, 0.9, 1.0):
        merged = merge_updates(model, "ties", keep=keep)
        assert not any(isinstance(m, LowRank) for m in merged.values())
        same(merged, brute_force(formed, keep), 1e-6)


def test_an_adapter_that_touches_nothing_counts_with_its_zeros() -> None:
    # 100 entries, 4 of them not zero: with the zeros counted, int(100 * 0.02) + 1 = 3 survive
    x = torch.zeros(2, 48)
    x[0, :4] = torch.tensor([4.0, 3, 2, 1])
    model: dict[str, list[Update]] = {"x": [x], "untouched": [LowRank(torch.zeros(2, 0), torch.zeros(0, 2))]}
    assert merge_updates(model, "ties", keep=0.02)["x"][0, :4].tolist() == [4.0, 3.0, 2.0, 0.0]


def test_a_mapping_of_two_dtypes_is_trimmed_in_the_wider() -> None:
    model = model_of(torch.float64)
    model["a"] = [x.float() for x in model["a"]]
    merged = merge_updates(model, "ties", keep=0.3)
    assert merged["a"].dtype == torch.float32
    assert merged["b"].dtype == torch.float64
    same(merged, brute_force(model, 0.3), 1e-6)


def test_order_of_tensors_and_tasks_does_not_matter() -> None:
    model = model_of(torch.float64, steps=0.5)
    merged = merge_updates(model, "ties", keep=0.3)
    shuffled = {name: [model[name][t] for t in (2, 0, 3, 1)] for name in reversed(model)}
    again = merge_updates(shuffled, "ties", keep=0.3)
    for name in model:
        torch.testing.assert_close(again[name], merged[name], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_surveys_of_panels_equal_the_survey_of_the_whole(dtype: torch.dtype, keep: float) -> None:
    whole = [cases.normal(60, 8, seed=t, dtype=dtype) for t in range(3)]
    panels = [[x[i : i + 7] for x in whole] for i in range(0, 60, 7)]
    method = create("ties", {"keep": keep})

    def found(pieces: list[list[Tensor]], shares: bool = False) -> Any:
        def visit(state: Any) -> None:
            for piece in pieces:
                share = state.fork() if shares else state
                method.survey("w", Updates.of(piece), share)
                if shares:
                    state.join(share)

        return survey_model(method, 3, dtype, visit)

    states = [found([whole]), found(panels), found(panels[::-1]), found(panels, shares=True)]
    for state in states[1:]:
        assert torch.equal(state.thresholds, states[0].thresholds)
        assert state.sign == states[0].sign


def test_shares_of_a_survey_add_up() -> None:
    pieces = [[cases.normal(7, 8, seed=10 * p + t) for t in range(3)] for p in range(4)]
    method = create("ties", {"keep": 0.2})

    def in_shares(state: SurveyState) -> None:
        shares = [state.fork(), state.fork()]
        for i, piece in enumerate(pieces):
            method.survey("w", Updates.of(piece), shares[i % 2])
        for share in shares:
            state.join(share)

    together = survey_model(
        method, 3, torch.float64, lambda state: [method.survey("w", Updates.of(piece), state) for piece in pieces]
    )
    apart = survey_model(method, 3, torch.float64, in_shares)
    assert torch.equal(apart.thresholds, together.thresholds)
    assert apart.sign == together.sign


@pytest.mark.parametrize(("dtype", "surveys"), [(torch.float32, 3), (torch.float64, 5)])
def test_number_of_passes(dtype: torch.dtype, surveys: int) -> None:
    assert create("ties", {}).num_surveys(dtype) == surveys
    assert create("ties", {"keep": 1.0}).num_surveys(dtype) == 1


def test_only_zeros_merge_to_zero() -> None:
    for keep in (0.2, 1.0):
        assert torch.equal(ties([torch.zeros(3, 4)] * 2, keep=keep), torch.zeros(3, 4))


def test_keeping_everything_of_one_task_returns_it_bit_for_bit() -> None:
    x = cases.normal(30, 20, seed=1, dtype=torch.float32)
    assert torch.equal(ties([x], keep=1.0), x)


@pytest.mark.parametrize("tasks", [3, 20, 64])
def test_the_majority_counts_the_signs_that_are_elected(tasks: int) -> None:
    """Both passes must add the tasks in one order: a sum that is zero in one is zero in the other."""
    x = cases.normal(tasks, 4_000, seed=2, dtype=torch.float32)
    x[-1] = 0
    for t in range(tasks - 1):
        x[-1] -= x[t]  # the plain loop over the tasks sums to exactly zero everywhere
    model = {"x": list(x), "tips": [torch.tensor([1e-3])] * tasks}
    merged = merge_updates(model, "ties", keep=1.0, disjoint="sum")
    positive = x.double().clamp(min=0).sum(0)  # the one elected sign of the whole model is positive
    torch.testing.assert_close(merged["x"].double(), positive, rtol=1e-5, atol=1e-5)
