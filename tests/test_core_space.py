"""Core Space: the published algorithm, what it equals, and degenerate input."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import dcmerge_ext
from dcmerge_ext import LowRank, merge_checkpoints, merge_updates
from dcmerge_ext.errors import InputError, OptionError
from dcmerge_ext.methods import Context, averaging, core_space, create, iso_c, task_arithmetic, tsv_m
from dcmerge_ext.methods.core_space import _basis
from dcmerge_ext.methods.dare import drop
from dcmerge_ext.updates import Updates, UpdateSpec

RANKS = [[4, 4, 4], [4, 5, 4], [5], [6, 6]]


def adapters(ranks: Sequence[int], m: int, n: int, *, seed: int = 0) -> list[LowRank]:
    """Of factors whose singular values differ: the bases are unique up to signs."""
    return [
        LowRank(cases.normal(m, r, seed=100 * seed + i), cases.normal(r, n, seed=50 + 100 * seed + i))
        for i, r in enumerate(ranks)
    ]


def trimmed_mean(cores: Sequence[Tensor], keep: float) -> Tensor:
    """TIES-Merging of one matrix by the published rules."""
    x = torch.stack([c.flatten() for c in cores])
    total = x.shape[1]
    if keep < 1:
        x = x * (x.abs() >= x.abs().kthvalue(total - int(total * keep), dim=1, keepdim=True).values)
    sign = x.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    chosen = torch.where(torch.where(sign > 0, x > 0, x < 0), x, 0.0)
    return (chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)).reshape(cores[0].shape)


def whitened(cores: Sequence[Tensor]) -> Tensor:
    """TSV-M of the cores: full SVDs, int(k / T) components each, bases padded with zeros."""
    rows, cols = cores[0].shape
    k = min(rows, cols)
    r = int(k * (1 / len(cores)))
    left, right, values = (torch.zeros(*size, dtype=torch.float64) for size in ((rows, k), (k, cols), (k,)))
    for i, core in enumerate(cores):
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        block = slice(i * r, (i + 1) * r)
        left[:, block], values[block], right[block] = U[:, :r], S[:r], Vh[:r]
    (P, _, Q), (Pv, _, Qv) = (torch.linalg.svd(X, full_matrices=False) for X in (left, right))
    return P @ Q * values @ Pv @ Qv


def dropped(cores: Sequence[Tensor], rate: float, seed: int) -> list[Tensor]:
    return [drop(core, rate, seed=seed, key="", task=i) for i, core in enumerate(cores)]


RULES: dict[str, tuple[dict[str, Any], Callable[[Sequence[Tensor]], Tensor]]] = {
    "sum": ({"aggregate": "sum"}, lambda cores: torch.stack(list(cores)).sum(0)),
    "mean": ({"aggregate": "mean"}, lambda cores: torch.stack(list(cores)).mean(0)),
    "ties": ({"aggregate": "ties"}, lambda cores: trimmed_mean(cores, 0.1)),
    "ties, 0.5": ({"aggregate": "ties", "keep": 0.5}, lambda cores: trimmed_mean(cores, 0.5)),
    "ties, 1": ({"aggregate": "ties", "keep": 1.0}, lambda cores: trimmed_mean(cores, 1.0)),
    "tsv_m": ({}, whitened),
}


def published(
    updates: Sequence[LowRank], rule: Callable[[Sequence[Tensor]], Tensor], isotropic: bool = False
) -> Tensor:
    """arXiv 2509.17786 as its authors run it, in float64."""
    left, right = (
        torch.cat([getattr(u, side).double() for u in updates], dim) for side, dim in (("left", 1), ("right", 0))
    )
    U = torch.linalg.svd(left, full_matrices=False)[0]
    Vh = torch.linalg.svd(right, full_matrices=False)[2]
    core = rule([U.T @ u.left.double() @ u.right.double() @ Vh.T for u in updates])
    if isotropic:
        P, S, Qh = torch.linalg.svd(core, full_matrices=False)
        core = S.mean() * P @ Qh
    return U @ core @ Vh


class TestPublished:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("ranks", RANKS)
    @pytest.mark.parametrize("shape", [(30, 20), (14, 25)])
    def test_agrees(self, rule: str, ranks: list[int], shape: tuple[int, int], backend: str) -> None:
        updates = adapters(ranks, *shape, seed=sum(ranks))
        options, by_hand = RULES[rule]
        merged = core_space(updates, isotropic=False, **options)
        assert isinstance(merged, LowRank)
        assert cases.error(merged, published(updates, by_hand)) < 1e-10

    @pytest.mark.parametrize("rule", ["sum", "mean", "ties, 0.5", "tsv_m"])
    @pytest.mark.parametrize("ranks", [[4, 4, 4], [6, 6], [5]])
    def test_agrees_with_isotropic_cores(self, rule: str, ranks: list[int]) -> None:
        updates = adapters(ranks, 30, 20, seed=sum(ranks))
        options, by_hand = RULES[rule]
        expected = published(updates, by_hand, isotropic=True)
        assert cases.error(core_space(updates, **options), expected) < 1e-10

    @pytest.mark.parametrize(("rate", "seed"), [(None, 0), (0.6, 421)])
    @pytest.mark.parametrize("keep", [None, 1.0])
    def test_dare(self, rate: float | None, seed: int, keep: float | None, backend: str) -> None:
        """The masks apply to cores of fixed signs: those of the method's own bases."""
        updates = cases.lora_updates([4, 4, 4], 30, 20)
        U, _, left = _basis(torch.cat([u.left for u in updates], -1), 1e-16)
        V, _, right = _basis(torch.cat([u.right for u in updates], -2).mT, 1e-16)
        cores = [u @ v.mT for u, v in zip(left.chunk(3, -1), right.chunk(3, -1), strict=True)]
        kept = dropped(cores, 0.3 if rate is None else rate, seed)
        options: dict[str, Any] = {"rate": rate, "seed": seed, "isotropic": False}
        merged = core_space(updates, aggregate="dare", **options)
        assert cases.error(merged, U @ sum(kept) @ V.mT) < 1e-12
        merged = core_space(updates, aggregate="dare_ties", keep=keep, **options)
        assert cases.error(merged, U @ trimmed_mean(kept, keep or 0.1) @ V.mT) < 1e-10

    @pytest.mark.parametrize("ranks", RANKS)
    def test_nothing_is_lost(self, ranks: list[int]) -> None:
        updates = cases.lora_updates(ranks, 25, 20)
        U, _, left = _basis(torch.cat([u.left for u in updates], -1), 1e-16)
        V, _, right = _basis(torch.cat([u.right for u in updates], -2).mT, 1e-16)
        blocks = zip(updates, torch.split(left, ranks, -1), torch.split(right, ranks, -1), strict=True)
        for update, u, v in blocks:
            assert cases.error(U @ u @ v.mT @ V.mT, update) < 1e-13


class TestEquals:
    @pytest.mark.parametrize("ranks", RANKS)
    @pytest.mark.parametrize("shape", [(30, 20), (9, 12)])
    def test_sum_and_mean_are_task_arithmetic_and_averaging(self, ranks: list[int], shape: tuple[int, int]) -> None:
        updates = cases.lora_updates(ranks, *shape)
        for rule, method in (("sum", task_arithmetic), ("mean", averaging)):
            merged = core_space(updates, aggregate=rule, isotropic=False)
            assert cases.error(merged, method(updates)) < 1e-13

    def test_the_worked_pair_adds_up(self) -> None:
        pair = cases.worked_pair()
        expected = torch.tensor([[3, 3, 1, 2], [0, 2, 1, 1], [3, 3, 2, 1], [-2, 2, 0, 1]], dtype=torch.float64)
        merged = core_space(pair, aggregate="sum", isotropic=False)
        torch.testing.assert_close(cases.dense(merged), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
    @pytest.mark.parametrize("rank", [1, 4])
    def test_tsv_m_of_adapters_of_one_rank_is_tsv_m(self, shape: tuple[int, int], rank: int) -> None:
        updates = cases.lora_updates([rank] * 3, *shape)
        assert cases.error(core_space(updates, isotropic=False), tsv_m(updates)) < 1e-11

    @pytest.mark.parametrize("ranks", RANKS)
    def test_isotropic_sum_is_iso_c(self, ranks: list[int]) -> None:
        updates = cases.lora_updates(ranks, 25, 20)
        assert cases.error(core_space(updates, aggregate="sum"), iso_c(updates)) < 1e-11

    def test_defaults_are_isotropic_tsv_m(self) -> None:
        updates = cases.lora_updates([4, 4, 4], 30, 20)
        values = torch.linalg.svdvals(cases.dense(core_space(updates)))
        mean = torch.linalg.svdvals(cases.dense(tsv_m(updates)))[:12].mean()
        torch.testing.assert_close(values[:12], mean.expand(12), rtol=1e-12, atol=0)
        assert values[12:].max() < 1e-13 * mean

    def test_entrywise_rules_depend_on_the_factors(self) -> None:
        """The invariant ones do not."""
        updates = cases.lora_updates([4, 4], 30, 20)
        stretch = torch.tensor([4.0, 0.25, 1.0, 2.0], dtype=torch.float64)
        other = [LowRank(u.left * stretch, u.right / stretch[:, None]) for u in updates]
        assert cases.error(core_space(other), core_space(updates)) < 1e-11
        ties = [core_space(u, aggregate="ties", isotropic=False) for u in (updates, other)]
        assert cases.error(*ties) > 1e-3

    @pytest.mark.parametrize("aggregate", ["ties", "dare_ties"])
    def test_tasks_in_subspaces_of_their_own_do_not_dilute_each_other(self, aggregate: str) -> None:
        """Round-off of one task in the coordinates of another must not count in a mean."""
        left, right = cases.orthonormal(30, 8, seed=1), cases.orthonormal(20, 8, seed=2)
        mixed = cases.normal(2, 2, 4, 4, seed=9)
        updates = [
            LowRank(left[:, 4 * i : 4 * i + 4] @ mixed[0, i], mixed[1, i] @ right[:, 4 * i : 4 * i + 4].mT)
            for i in range(2)
        ]
        options: dict[str, Any] = {"rate": 0.0} if aggregate == "dare_ties" else {}
        merged = core_space(updates, aggregate=aggregate, keep=1.0, isotropic=False, **options)
        assert cases.error(merged, task_arithmetic(updates)) < 1e-12


class TestForms:
    @pytest.mark.parametrize("options", [options for options, _ in RULES.values()])
    @pytest.mark.parametrize("isotropic", [True, False])
    def test_a_stack_of_matrices_is_merged_one_by_one(self, options: dict[str, Any], isotropic: bool) -> None:
        single = [adapters([3, 2], 12, 9, seed=s) for s in range(4)]
        stack = [
            LowRank(*(torch.stack([getattr(s[i], side) for s in single]) for side in ("left", "right")))
            for i in range(2)
        ]
        stack = [LowRank(u.left.reshape(2, 2, 12, -1), u.right.reshape(2, 2, -1, 9)) for u in stack]
        merged = cases.dense(core_space(stack, isotropic=isotropic, **options)).reshape(4, 12, 9)
        for found, updates in zip(merged, single, strict=True):
            assert cases.error(found, core_space(updates, isotropic=isotropic, **options)) < 1e-11

    def test_matrices_of_a_stack_have_masks_of_their_own(self) -> None:
        (x,) = cases.lora_updates([3], 12, 9)
        stack = LowRank(torch.stack([x.left] * 2), torch.stack([x.right] * 2))
        first, second = cases.dense(core_space([stack], aggregate="dare", rate=0.5, isotropic=False))
        assert cases.error(first, second) > 0.1

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_lower_precision(self, rule: str, dtype: torch.dtype) -> None:
        updates = cases.lora_updates([4, 4, 4], 30, 20, dtype=dtype)
        merged = core_space(updates, isotropic=False, **RULES[rule][0])
        assert merged.dtype == torch.float32
        assert cases.error(merged, published(updates, RULES[rule][1])) < 1e-6

    @pytest.mark.parametrize("options", [options for options, _ in RULES.values()])
    def test_order_of_tasks(self, options: dict[str, Any]) -> None:
        updates = cases.lora_updates([4, 3, 2], 30, 20)
        merged = core_space([updates[i] for i in (2, 0, 1)], **options)
        assert cases.error(merged, core_space(updates, **options)) < 1e-10

    @pytest.mark.parametrize("options", [options for options, _ in RULES.values()])
    @pytest.mark.parametrize("factor", [2.0**-60, 2.0**40, 0.3, -1.0])
    def test_homogeneous(self, options: dict[str, Any], factor: float) -> None:
        updates = cases.lora_updates([4, 3, 2], 30, 20)
        merged = core_space([u * factor for u in updates], **options)
        assert cases.error(merged, cases.dense(core_space(updates, **options)) * factor) < 1e-10

    def test_weights(self) -> None:
        updates = cases.lora_updates([3, 2], 12, 9)
        merged = core_space(updates, weights=[2.0, -0.5])
        assert cases.error(merged, core_space([updates[0] * 2.0, updates[1] * -0.5])) < 1e-13

    @pytest.mark.parametrize("aggregate", ["sum", "ties", "dare", "dare_ties", "tsv_m"])
    def test_the_backends_agree(self, aggregate: str) -> None:
        results = []
        for name in ("reference", "cpu"):
            with dcmerge_ext.use_backend(name):
                results.append(core_space(cases.lora_updates([4, 3], 30, 20, dtype=torch.float32), aggregate=aggregate))
        assert cases.error(*results) < 1e-6

    @given(
        m=st.integers(1, 12),
        n=st.integers(1, 12),
        ranks=st.lists(st.integers(0, 4), min_size=1, max_size=4),
        aggregate=st.sampled_from(["sum", "ties", "dare_ties", "tsv_m"]),
        isotropic=st.booleans(),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=60)
    def test_any_shape(self, m: int, n: int, ranks: list[int], aggregate: str, isotropic: bool, seed: int) -> None:
        updates = adapters(ranks, m, n, seed=seed)
        merged = core_space(updates, aggregate=aggregate, isotropic=isotropic)
        assert merged.shape == (m, n)
        specs = [UpdateSpec((m, n), r, torch.float64) for r in ranks]
        assert merged.rank == create("core_space", {}).merged_rank(specs, len(ranks))
        assert cases.dense(merged).isfinite().all()
        if aggregate == "sum" and not isotropic:
            assert cases.error(merged, task_arithmetic(updates)) < 1e-12
        if aggregate in ("sum", "tsv_m") and any(ranks):
            assert cases.dense(merged).norm() > 0


class TestNull:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_directions_that_adapters_share_count_once(self, dtype: torch.dtype) -> None:
        (x,) = cases.lora_updates([3], 12, 20, dtype=dtype)
        context = Context(2, "")
        merged = create("core_space", {"aggregate": "mean"}).merge(Updates.of([x, x]), context)
        assert context.facts["core"] == [3, 3]
        assert context.facts["rank"] == 3
        assert isinstance(merged, LowRank)
        assert merged.rank == 6
        expected = cases.truncated(x, 3)
        U, S, Vh = torch.linalg.svd(expected)
        assert cases.error(merged, S[:3].mean() * U[:, :3] @ Vh[:3]) < (1e-5 if dtype == torch.float32 else 1e-11)

    def test_what_cancels_leaves_no_direction(self) -> None:
        """In single precision the difference of two tasks has a tail of round-off: equal values would blow it up."""
        shared, own = cases.lora_updates([4], 30, 20)[0], cases.lora_updates([2], 30, 20, seed=5)[0]
        first = LowRank(torch.cat([shared.left, own.left], -1), torch.cat([shared.right, own.right], -2))
        angle = cases.orthonormal(4, 4, seed=3)  # the same matrix from other factors
        second = LowRank(shared.left @ angle, angle.mT @ shared.right * -1.0)
        merged = core_space([first.to(torch.float32), second.to(torch.float32)], aggregate="sum")
        assert cases.error(merged, iso_c([own])) < 1e-5

    def test_tasks_that_touch_nothing_do_not_count_for_tsv_m(self) -> None:
        updates = cases.lora_updates([4, 4], 30, 20)
        none = LowRank(torch.zeros(30, 0).double(), torch.zeros(0, 20).double())
        assert cases.error(core_space([updates[0], none, updates[1]]), core_space(updates)) < 1e-12
        mean = core_space([updates[0], none, updates[1]], aggregate="mean", isotropic=False)
        assert cases.error(mean, averaging([updates[0], none, updates[1]])) < 1e-13

    def test_zeros_and_untouched_tensors(self) -> None:
        zero = LowRank(torch.zeros(8, 2), torch.zeros(2, 6))
        none = LowRank(torch.zeros(8, 0), torch.zeros(0, 6))
        for aggregate in ("sum", "ties", "dare", "tsv_m"):
            for updates in ([zero, zero], [zero, none], [none, none]):
                merged = core_space(updates, aggregate=aggregate)
                assert torch.equal(cases.dense(merged), torch.zeros(8, 6))

    def test_more_tasks_than_rows_give_the_mean(self, caplog: pytest.LogCaptureFixture) -> None:
        updates = cases.lora_updates([1] * 5, 3, 8)
        with caplog.at_level(logging.WARNING, logger="dcmerge_ext"):
            merged = core_space(updates, isotropic=False)
        assert "takes the mean" in caplog.text
        assert cases.error(merged, averaging(updates)) < 1e-13

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 5)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        *leading, m, n = shape
        assert core_space([LowRank(torch.zeros(*leading, m, 2), torch.zeros(*leading, 2, n))] * 2).shape == shape

    @pytest.mark.parametrize("isotropic", [True, False])
    def test_a_single_number(self, isotropic: bool) -> None:
        x = LowRank(torch.full((1, 1), 3.0), torch.full((1, 1), -2.0))
        assert cases.dense(core_space([x], isotropic=isotropic)).item() == pytest.approx(-6.0)


class TestFiles:
    @pytest.mark.parametrize("aggregate", ["ties", "tsv_m"])
    def test_adapters_of_different_ranks(self, aggregate: str, tmp_path: Path) -> None:
        start = families.toy(dtype=torch.float32)
        base = families.write_model(tmp_path / "base", start)
        tasks = [families.write_adapter(tmp_path / f"a{i}", start, rank=i + 2, seed=i) for i in range(3)]
        merge_checkpoints(base, tasks, tmp_path / "out", "core_space", aggregate=aggregate)
        found = load_file(tmp_path / "out" / "model.safetensors")
        stored = [load_file(task / "adapter_model.safetensors") for task in tasks]
        for module in ("layers.0.attn", "layers.1.attn"):
            A, B = ([t[f"base_model.model.{module}.lora_{side}.weight"] for t in stored] for side in "AB")
            merged = core_space([LowRank(b, a) * 2.0 for a, b in zip(A, B, strict=True)], aggregate=aggregate)
            name = f"{module}.weight"
            torch.testing.assert_close(found[name], start[name] + cases.dense(merged), rtol=1e-5, atol=1e-5)

    def test_full_fine_tunes_are_refused_by_name(self, tmp_path: Path) -> None:
        start = families.toy(dtype=torch.float32)
        base = families.write_model(tmp_path / "base", start)
        task = families.write_model(tmp_path / "t", families.tuned(start, 0))
        with pytest.raises(
            OptionError, match=r"tensor '.*': core_space merges LoRA updates only, and update 0 is dense"
        ):
            merge_checkpoints(base, [task], tmp_path / "out", "core_space")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"aggregate": "cart"}, r"aggregate: invalid enum value 'cart' \(takes 'sum' \| 'mean' \| 'ties'"),
            ({"keep": 0.1}, r"keep belongs to aggregate='ties' or 'dare_ties', and aggregate is 'tsv_m'"),
            ({"aggregate": "dare", "keep": 0.1}, r"keep belongs to aggregate='ties' or 'dare_ties'"),
            ({"aggregate": "ties", "rate": 0.1}, r"rate belongs to aggregate='dare' or 'dare_ties'"),
            ({"aggregate": "dare", "rate": 1.0}, r"rate: expected float < 1.0"),
            ({"isotropic": 1}, r"isotropic: expected bool"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            create("core_space", options)

    @pytest.mark.parametrize("full", [0, 1])
    def test_full_updates_are_refused(self, full: int) -> None:
        updates: list[Any] = list(cases.lora_updates([2, 2], 8, 6))
        updates[full] = updates[full].dense()
        with pytest.raises(
            OptionError, match=rf"core_space merges LoRA updates only, and update {full} is dense; choose"
        ):
            merge_updates({"w": updates}, "core_space")

    def test_vectors_are_refused(self) -> None:
        with pytest.raises(
            InputError, match=r"core_space merges matrices \(..., m, n\), got an update of shape \(5,\)"
        ):
            core_space([torch.ones(5)])

    @pytest.mark.parametrize("ranks", [[2], [0, 0], [16] * 8])
    def test_cost(self, ranks: list[int]) -> None:
        method = create("core_space", {})
        specs = [UpdateSpec((256, 128), r, torch.float32) for r in ranks]
        method.check(specs, len(ranks))
        assert method.default_scale(8) == 1.0
        assert (method.flops(specs, len(ranks)) > 0) == any(ranks)
        assert method.workspace(specs, len(ranks)) > 0
