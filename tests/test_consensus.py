"""Consensus TA and TIES: TALL masks counted over the tasks, against the rule on one vector per task."""

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

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.errors import OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import consensus, create, task_arithmetic, ties

X = [torch.tensor(x, dtype=torch.float64) for x in cases.TASK_VECTORS]

# which entries each task relies on at lambda 0.4, and the entries of the sum that two rely on
MASKS = ["1111101101", "1111111001", "1111001111"]
CONSENSUS = [-0.2, 0.1, -0.1, -0.1, 0.3, 0, 0.05, -0.4, 0, 0]


def written_out(updates: Sequence[Update], tau: Tensor, lambdas: Sequence[float], agree: int) -> Tensor:
    """The masks of arXiv 2405.07813, entry by entry."""
    x = torch.stack([cases.dense(u).flatten() for u in updates])
    merged = tau.flatten().clone()
    for e in range(len(merged)):
        votes = 0
        for t, coefficient in enumerate(lambdas):
            votes += bool(abs(x[t, e]) > coefficient * abs(tau.flatten()[e] - x[t, e]))
        if votes < agree:
            merged[e] = 0
    return merged.reshape(tau.shape)


class TestWorkedNumbers:
    def test_two_of_three_tasks(self, backend: str) -> None:
        torch.testing.assert_close(
            consensus(X, mask_lambda=0.4), torch.tensor(CONSENSUS, dtype=torch.float64), rtol=0, atol=1e-6
        )

    def test_tasks_that_rely_on_each_entry(self) -> None:
        votes = sum((consensus(X, agree=k) != 0).int() for k in (1, 2, 3))
        expected = torch.tensor([[int(bit) for bit in mask] for mask in MASKS]).sum(0)
        # the last sum is 0 in decimal and round-off in binary: there is nothing to see it by
        assert torch.equal(votes[:-1], expected[:-1].int())

    def test_ties_with_agreeing_entries_summed(self) -> None:
        tau = torch.tensor(next(w[3] for w in cases.WORKED_TIES if w[:2] == (0.5, "sum")), dtype=torch.float64)
        torch.testing.assert_close(consensus(X, aggregate="ties", keep=0.5, agree=0), tau, rtol=0, atol=1e-6)
        expected = written_out(X, tau, [0.4] * 3, 2)
        assert 0 < int((expected != 0).sum()) < int((tau != 0).sum())
        torch.testing.assert_close(consensus(X, aggregate="ties", keep=0.5), expected, rtol=0, atol=1e-6)


class TestWrittenOut:
    @given(
        tasks=st.integers(1, 5),
        agree=st.integers(0, 5),
        coefficient=st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0, 3.0]),
        aggregate=st.sampled_from(["sum", "ties"]),
        seed=st.integers(0, 1_000),
    )
    @settings(max_examples=40)
    def test_one_lambda(self, tasks: int, agree: int, coefficient: float, aggregate: str, seed: int) -> None:
        updates = [cases.normal(6, 5, seed=10 * seed + t) for t in range(tasks)]
        agree = min(agree, tasks)
        tau = ties(updates, keep=0.2, disjoint="sum") if aggregate == "ties" else task_arithmetic(updates)
        merged = consensus(updates, mask_lambda=coefficient, agree=agree, aggregate=aggregate)
        assert torch.equal(merged, written_out(updates, tau, [coefficient] * tasks, agree))

    @pytest.mark.parametrize("aggregate", ["sum", "ties"])
    @pytest.mark.parametrize("shape", [(), (11,), (7, 6), (2, 3, 4, 2)])
    def test_a_lambda_per_task(self, aggregate: str, shape: tuple[int, ...], backend: str) -> None:
        updates = [cases.normal(*shape, seed=t) for t in range(3)]
        tau = ties(updates, disjoint="sum") if aggregate == "ties" else task_arithmetic(updates)
        merged = consensus(updates, mask_lambda=[0.2, 0.6, 0.4], aggregate=aggregate)
        assert torch.equal(merged, written_out(updates, tau, [0.2, 0.6, 0.4], 2))

    def test_the_model_is_trimmed_as_one(self) -> None:
        model = {
            "a": [cases.normal(5, 4, seed=t) for t in range(3)],
            "b": [0.1 * cases.normal(9, seed=t) for t in (5, 6, 7)],
        }
        tau = merge_updates(model, "ties", keep=0.3, disjoint="sum")
        merged = merge_updates(model, "consensus", keep=0.3, aggregate="ties")
        for name, updates in model.items():
            assert torch.equal(merged[name], written_out(updates, tau[name], [0.4] * 3, 2))


class TestIdentities:
    @pytest.mark.parametrize("keep", [0.2, 1.0])
    def test_no_agreement_asked_for_is_the_merge_itself(self, keep: float) -> None:
        updates = cases.full_updates(3, 8, 6)
        assert torch.equal(consensus(updates, agree=0), task_arithmetic(updates))
        expected = ties(updates, keep=keep, disjoint="sum")
        assert torch.equal(consensus(updates, agree=0, aggregate="ties", keep=keep), expected)

    def test_more_agreement_keeps_fewer_entries(self) -> None:
        updates = cases.full_updates(4, 20, 15)
        kept = [consensus(updates, agree=k) != 0 for k in range(5)]
        for more, fewer in itertools.pairwise(kept):
            assert not (fewer & ~more).any()
            assert fewer.sum() < more.sum()

    def test_larger_lambdas_keep_fewer_entries(self) -> None:
        updates = cases.full_updates(4, 20, 15)
        counts = [int((consensus(updates, mask_lambda=x) != 0).sum()) for x in (0.0, 0.2, 0.4, 0.6, 2.0)]
        assert sorted(counts, reverse=True) == counts
        assert counts[0] == 300 > counts[-1]

    def test_what_two_copies_share_stays(self) -> None:
        x, y = cases.normal(8, 6, seed=1), 1e-3 * cases.normal(8, 6, seed=2)
        assert torch.equal(consensus([x, x]), 2 * x)
        assert torch.equal(consensus([x, torch.zeros_like(x)]), torch.zeros_like(x))  # one task alone relies on it
        assert torch.equal(consensus([x, torch.zeros_like(x)], agree=1), x)
        torch.testing.assert_close(consensus([x, x, y]), 2 * x + y)

    @pytest.mark.parametrize("aggregate", ["sum", "ties"])
    @pytest.mark.parametrize("ranks", [[2, 3, 1], [2, 0, 3], [2, 3, None]])
    def test_adapters_merge_as_their_products(self, aggregate: str, ranks: list[int | None]) -> None:
        adapters = cases.lora_updates([4 if r is None else r for r in ranks], 9, 7)
        updates = [a.dense() if r is None else a for a, r in zip(adapters, ranks, strict=True)]
        merged = consensus(updates, aggregate=aggregate)
        assert isinstance(merged, Tensor)
        assert 0 < int((merged != 0).sum()) < 63
        assert cases.error(merged, consensus([cases.dense(u) for u in updates], aggregate=aggregate)) < 1e-14

    @pytest.mark.parametrize("aggregate", ["sum", "ties"])
    def test_single_precision(self, aggregate: str) -> None:
        updates = [u.float() for u in cases.full_updates(4, 12, 9)]
        merged = consensus(updates, aggregate=aggregate)
        assert merged.dtype == torch.float32
        assert cases.error(merged, consensus([u.double() for u in updates], aggregate=aggregate)) < 1e-6


class TestOneTask:
    def test_relies_on_itself(self) -> None:
        x = cases.normal(8, 6, seed=1)
        assert torch.equal(consensus([x]), x)
        assert torch.equal(consensus([x], agree=1, mask_lambda=5.0), x)

    def test_beside_tasks_that_touch_nothing(self) -> None:
        x, untouched = cases.normal(4, 3, seed=1), LowRank(torch.zeros(4, 0).double(), torch.zeros(0, 3).double())
        assert torch.equal(consensus([x, untouched], agree=1), x)
        assert not consensus([x, untouched]).any()


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"aggregate": "mean"}, r"aggregate: invalid enum value 'mean' \(takes 'sum' \| 'ties'\)"),
            ({"mask_lambda": -0.1}, r"mask_lambda: expected float >= 0.0"),
            ({"mask_lambda": [0.2, -1.0]}, r"expected float >= 0.0"),
            ({"mask_lambda": [0.2]}, r"mask_lambda has 1 entries for 2 tasks; give one per task"),
            ({"agree": 3}, r"agree=3 exceeds the 2 tasks: nothing would be merged"),
            ({"agree": -1}, r"agree: expected int >= 0"),
            ({"keep": 0.2}, r"keep belongs to aggregate='ties', and aggregate is 'sum'"),
            ({"keep": 0.0, "aggregate": "ties"}, r"keep: expected float > 0.0"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            consensus([torch.ones(3, 2)] * 2, **options)

    @pytest.mark.parametrize(("aggregate", "surveys"), [("sum", 0), ("ties", 3)])
    def test_passes_and_scales(self, aggregate: str, surveys: int) -> None:
        method = create("consensus", {"aggregate": aggregate})
        assert method.num_surveys(torch.float32) == surveys
        assert (method.default_scale(1), method.default_scale(8)) == (1.0, 0.3)


@pytest.mark.parametrize("aggregate", ["sum", "ties"])
def test_degenerate_input(aggregate: str) -> None:
    assert torch.equal(consensus([torch.zeros(4, 3)] * 2, aggregate=aggregate), torch.zeros(4, 3))
    assert consensus([torch.ones(1, 1)] * 2, aggregate=aggregate).item() == 2.0
    untouched = LowRank(torch.zeros(4, 0), torch.zeros(0, 3))
    assert torch.equal(consensus([untouched, untouched], aggregate=aggregate), torch.zeros(4, 3))
