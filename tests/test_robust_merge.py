"""RobustMerge: worked numbers, the published rules written out on stacked factors, and adapters those rules fail on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dcmerge_ext import LowRank, merge_updates
from dcmerge_ext.errors import OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import create, robust_merge
from dcmerge_ext.updates import UpdateSpec


def published(
    adapters: Sequence[LowRank], keep: float = 0.2, top: float = 0.2, factor: float = 2.0
) -> tuple[Tensor, Tensor]:
    """arXiv 2502.17159 with the rules of its code: B and A, each with its factor of 2, for adapters of one rank."""

    def pruned(x: Tensor) -> Tensor:
        smallest = int(x.numel() * (1 - keep))
        return x if smallest == 0 else x * (x.abs() >= x.abs().flatten().kthvalue(smallest).values)

    weights, lefts, rights = [], [], []
    for adapter in adapters:
        A, B = adapter.right.double(), adapter.left.double()
        scales = A.abs().sum(1) / pruned(A).abs().sum(1)
        low = scales.sort().values[int(len(scales) * (1 - top))] if top < 1 else scales.min()
        weights.append(scales.clamp(min=low))
        lefts.append(pruned(B))
        rights.append(pruned(A))
    total = torch.stack(weights).sum(0)
    left = sum(s / total * b for s, b in zip(weights, lefts, strict=True))
    return factor * left, factor * torch.stack(rights).sum(0)


def adapters_of(
    ranks: Sequence[int], m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[LowRank]:
    """Factors with entries of one size, whose pruning leaves something in every row."""
    return [
        LowRank(cases.normal(m, r, seed=100 * seed + i), cases.normal(r, n, seed=100 * seed + 50 + i)).to(dtype)
        for i, r in enumerate(ranks)
    ]


def merged(adapters: Sequence[Update], **options: Any) -> LowRank:
    found = robust_merge(adapters, **options)
    assert isinstance(found, LowRank)
    return found


class TestPublishedAlgorithm:
    B = ([[1, 0.2], [-0.3, 0.4], [0.5, -0.6]], [[0.12, 0.22], [0.32, -0.42], [0.52, 0.62]])
    A = (
        [[0.1, -0.2, 0.3, 0.4], [0.5, -0.6, 0.05, 0.7]],
        [[-0.15, 0.25, 0.35, 0.45], [0.55, 0.65, -0.75, 0.08]],
    )

    def test_worked_numbers(self, backend: str) -> None:
        pair = [
            LowRank(torch.tensor(b, dtype=torch.float64), torch.tensor(a, dtype=torch.float64))
            for b, a in zip(self.B, self.A, strict=True)
        ]
        found = merged(pair, keep=0.5, top_scales=0.5)
        left = [[0.975610, 0], [0.327805, -0.04], [1.020488, 0.049756]]
        right = [[0, 0, 1.3, 1.7], [2.1, 0.1, -1.5, 1.4]]
        product = [
            [0, 0, 1.268293, 1.658537],
            [-0.084, -0.004, 0.486146, 0.501268],
            [0.104488, 0.004976, 1.252, 1.804488],
        ]
        for actual, expected in ((2 * found.left, left), (2 * found.right, right), (4 * found.dense(), product)):
            torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("m", "n", "rank", "tasks"), [(24, 40, 4, 2), (40, 24, 8, 5), (60, 60, 16, 8), (30, 50, 1, 3)]
    )
    @pytest.mark.parametrize(
        "options", [{}, {"keep": 0.5, "top_scales": 0.5}, {"keep": 1.0}, {"keep": 0.9, "top_scales": 1.0}]
    )
    def test_adapters_of_one_rank(
        self, m: int, n: int, rank: int, tasks: int, options: dict[str, float], backend: str
    ) -> None:
        adapters = adapters_of([rank] * tasks, m, n)
        left, right = published(adapters, options.get("keep", 0.2), options.get("top_scales", 0.2))
        found = merged(adapters, **options)
        assert cases.error(2 * found.left, left) < 1e-14
        assert cases.error(2 * found.right, right) < 1e-14

    def test_the_factors_of_two_are_the_default_scale(self) -> None:
        chosen = create("robust_merge", {})
        assert (chosen.default_scale(1), chosen.default_scale(2), chosen.default_scale(8)) == (1.0, 4.0, 4.0)

    @pytest.mark.parametrize(("keep", "kept"), [(0.2, 21), (0.5, 51), (0.001, 1 + 1), (1.0, 100)])
    def test_one_entry_more_than_the_fraction_survives(self, keep: float, kept: int) -> None:
        """100 entries in A and in B: the int(100 (1 - keep))-th smallest survives, too."""
        (adapter,) = adapters_of([10], 10, 10)
        found = merged([adapter], keep=keep)
        assert int((found.right != 0).sum()) == kept

    def test_every_tie_at_the_threshold_survives(self) -> None:
        A = torch.tensor([[1.0, -1.0, 1.0, 3.0, 0.5]])
        assert merged([LowRank(torch.ones(2, 1), A)], keep=0.4).right.tolist() == [[1.0, -1.0, 1.0, 3.0, 0.0]]

    def test_lower_scales_are_raised_to_the_fifth_largest(self) -> None:
        """r = 16: int(16 * 0.8) = 12 of a task's scales become the 13th. Two tasks with one nonzero entry of B tell them."""
        first, second = adapters_of([16, 16], 16, 40, seed=3)
        tell = LowRank(torch.eye(16, dtype=torch.float64), first.right)
        zeros_elsewhere = LowRank(1e-9 * second.left, second.right)
        found = merged([tell, zeros_elsewhere], keep=0.5).left.diagonal()
        raw = [
            u.right.abs().sum(1)
            / torch.where(u.right.abs() >= u.right.abs().flatten().kthvalue(320).values, u.right, 0).abs().sum(1)
            for u in (tell, zeros_elsewhere)
        ]
        S, other = (s.clamp(min=s.sort().values[12]) for s in raw)
        assert int((S.min() < S).sum()) == 3
        torch.testing.assert_close(found, S / (S + other), rtol=1e-7, atol=1e-9)


class TestIdentities:
    def test_one_adapter_comes_back_where_nothing_is_pruned(self) -> None:
        (adapter,) = adapters_of([3], 8, 6)
        found = merged([adapter], keep=1.0)
        assert cases.error(found, adapter) < 1e-15
        assert torch.equal(found.right, adapter.right)

    def test_copies_add_up_in_A_and_average_in_B(self) -> None:
        (adapter,) = adapters_of([4], 12, 9)
        one, three = merged([adapter]), merged([adapter] * 3)
        assert cases.error(three.left, one.left) < 1e-15
        assert cases.error(three.right, 3 * one.right) < 1e-15

    def test_order_of_the_tasks_does_not_matter(self) -> None:
        adapters = adapters_of([4, 4, 2], 12, 20)
        first = merged(adapters)
        for order in itertools.permutations(adapters):
            assert cases.error(merged(order), first) < 1e-14

    def test_order_of_the_components_does_not_matter(self) -> None:
        adapters, order = adapters_of([4, 4, 4], 12, 20), [2, 0, 3, 1]
        shuffled = [LowRank(u.left[:, order], u.right[order]) for u in adapters]
        assert cases.error(merged(shuffled), merged(adapters)) < 1e-14

    @pytest.mark.parametrize("factor", [4.0, 0.3, -1.0])
    @pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
    def test_homogeneous_wherever_the_scale_lies(self, factor: float, shape: tuple[int, int]) -> None:
        adapters = adapters_of([4, 4, 4], *shape)
        expected = factor * merged(adapters).dense()
        assert cases.error(merged([u * factor for u in adapters]), expected) < 1e-14
        on_the_right = [LowRank(u.left, factor * u.right) for u in adapters]
        assert cases.error(merged(on_the_right), expected) < 1e-14

    def test_weights_multiply_the_smaller_factor(self) -> None:
        adapters = adapters_of([3, 3], 12, 20)
        weighted = merged(adapters, weights=[2.0, -0.5])
        left, right = published(
            [LowRank(2.0 * adapters[0].left, adapters[0].right), LowRank(-0.5 * adapters[1].left, adapters[1].right)],
            factor=1.0,
        )
        assert cases.error(weighted.left, left) < 1e-14
        assert cases.error(weighted.right, right) < 1e-14

    def test_other_factors_of_the_same_update_merge_differently(self) -> None:
        """It is no function of the updates: what the docstring warns of."""
        adapters, G = adapters_of([4, 4], 12, 20), cases.orthonormal(4, 4, 9)
        turned = [LowRank(u.left @ G, G.T @ u.right) for u in adapters]
        assert cases.error(turned[0], adapters[0]) < 1e-14
        assert cases.error(merged(turned), merged(adapters)) > 1e-2
        assert cases.error(merged([u.mT for u in adapters]).mT, merged(adapters)) > 1e-2

    def test_leading_dimensions_equal_the_loop(self) -> None:
        adapters = [
            LowRank(cases.normal(2, 3, 12, 4, seed=s), cases.normal(2, 3, 4, 20, seed=9 + s)) for s in (1, 2, 3)
        ]
        for u in adapters[:2]:
            u.left[1, 2] = 0  # takes no part there
        found = merged(adapters)
        assert found.shape == (2, 3, 12, 20)
        for i, j in itertools.product(range(2), range(3)):
            one = merged([LowRank(u.left[i, j], u.right[i, j]) for u in adapters])
            assert torch.equal(found.left[i, j], one.left)
            assert torch.equal(found.right[i, j], one.right)

    def test_a_mapping_is_merged_matrix_by_matrix(self) -> None:
        model = {"v": adapters_of([3, 3], 12, 20), "w": adapters_of([2, 4], 8, 6, seed=1)}
        found = merge_updates(model, "robust_merge")
        for name, adapters in model.items():
            assert torch.equal(cases.dense(found[name]), merged(adapters).dense())


class TestRanks:
    def test_adapters_of_lower_rank_take_part_in_their_first_components(self) -> None:
        small, large = adapters_of([2, 5], 12, 30)
        found = merged([small, large])
        own = merged([large])
        assert found.rank == 5
        assert cases.error(found.left[:, 2:], own.left[:, 2:]) < 1e-15
        assert cases.error(found.right[2:], own.right[2:]) < 1e-15
        first = merged([small])
        assert cases.error(found.right[:2], first.right + own.right[:2]) < 1e-15

    @pytest.mark.parametrize(("ranks", "rank"), [([2, 3], 3), ([0, 3], 3), ([0, 0], 0), ([16], 16)])
    def test_the_result_has_the_largest_rank(self, ranks: list[int], rank: int) -> None:
        adapters = cases.lora_updates(ranks, 20, 18, dtype=torch.float32)
        specs = [UpdateSpec((20, 18), r, torch.float32) for r in ranks]
        assert merged(adapters).rank == create("robust_merge", {}).merged_rank(specs, len(ranks)) == rank

    def test_more_components_than_the_matrix_has_rows(self) -> None:
        adapters = adapters_of([6, 6], 3, 4)
        left, right = published(adapters, 0.9)
        assert cases.error(4 * merged(adapters, keep=0.9).dense(), left @ right) < 1e-14


class TestPrecision:
    def test_float32_follows_float64(self) -> None:
        adapters = adapters_of([8, 8, 8], 60, 80, dtype=torch.float32)
        found = merged(adapters)
        assert found.dtype == torch.float32
        assert cases.error(found, merged([u.to(torch.float64) for u in adapters])) < 2e-7

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_merged_in_float32(self, dtype: torch.dtype) -> None:
        adapters = adapters_of([4, 4], 12, 20, dtype=dtype)
        found = merged(adapters)
        assert found.dtype == torch.float32
        assert torch.equal(found.dense(), merged([u.to(torch.float32) for u in adapters]).dense())

    def test_dtypes_mix_to_the_widest(self) -> None:
        first, second = adapters_of([4, 4], 12, 20, dtype=torch.float32)
        found = merged([first, second.to(torch.float64)])
        assert found.dtype == torch.float64
        assert cases.error(found, merged([first.to(torch.float64), second.to(torch.float64)])) == 0

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_sizes_near_the_ends_of_float32(self, scale: float) -> None:
        adapters = adapters_of([4, 4], 12, 20, dtype=torch.float32)
        found = merged([LowRank(u.left * scale, u.right) for u in adapters])
        assert cases.error(found.left / scale, merged(adapters).left) < 1e-6


class TestDegenerate:
    def test_a_row_of_A_that_is_pruned_entirely(self) -> None:
        """The published code divides by zero: NaN in the whole column of B."""
        first, second = adapters_of([4, 4], 12, 20)
        first.right[1] *= 1e-6
        assert published([first, second])[0].isnan().any()
        found, alone = merged([first, second]), merged([second])
        assert found.dense().isfinite().all()
        assert cases.error(found.left[:, 1], alone.left[:, 1]) < 1e-15
        assert torch.equal(found.right[1], alone.right[1])

    def test_the_rows_that_remain_are_ranked_among_themselves(self) -> None:
        """5 rows, 2 of them pruned: the lower int(3 * 0.5) scales are raised, not the lower int(5 * 0.5)."""
        first, second = adapters_of([5, 5], 12, 40, seed=4)
        first.right[3:] *= 1e-6
        found = merged([first, second], keep=0.4, top_scales=0.5)
        live = LowRank(first.left[:, :3], first.right[:3])
        pruned = torch.where(
            first.right.abs() >= first.right.abs().flatten().kthvalue(int(200 * 0.6)).values, first.right, 0
        )[:3]
        S = live.right.abs().sum(1) / pruned.abs().sum(1)
        S = S.clamp(min=S.sort().values[1])
        own_left = merged([first], keep=0.4).left[:, :3]  # B', for its weights cancel
        other = merged([second], keep=0.4)
        expected_right = pruned + other.right[:3]
        assert cases.error(found.right[:3], expected_right) < 1e-14
        pruned_other = other.right
        T = second.right.abs().sum(1) / pruned_other.abs().sum(1)
        T = T.clamp(min=T.sort().values[2])[:3]
        assert cases.error(found.left[:, :3], (S * own_left + T * other.left[:, :3]) / (S + T)) < 1e-14

    @pytest.mark.parametrize("nothing", ["left", "right", "both", "rank 0", "weight 0"])
    def test_a_task_that_changes_nothing_takes_no_part(self, nothing: str) -> None:
        first, second, third = adapters_of([4, 4, 4], 12, 20)
        zero = {
            "left": LowRank(torch.zeros_like(third.left), third.right),
            "right": LowRank(third.left, torch.zeros_like(third.right)),
            "both": LowRank(torch.zeros_like(third.left), torch.zeros_like(third.right)),
            "rank 0": LowRank(third.left[:, :0], third.right[:0]),
            "weight 0": third,
        }[nothing]
        weights = [1.0, 0.0, 1.0] if nothing == "weight 0" else None
        assert torch.equal(merged([first, zero, second], weights=weights).dense(), merged([first, second]).dense())

    @pytest.mark.parametrize("ranks", [[3, 2], [0, 0]])
    def test_only_zeros_merge_to_zero(self, ranks: list[int]) -> None:
        found = merged([LowRank(torch.zeros(6, r), torch.zeros(r, 5)) for r in ranks])
        assert found.rank == max(ranks)
        assert torch.equal(found.dense(), torch.zeros(6, 5))

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        *leading, m, n = shape
        assert merged([LowRank(torch.ones(*leading, m, 2), torch.ones(*leading, 2, n))] * 2).shape == shape

    def test_one_by_one(self) -> None:
        found = merged([LowRank(torch.tensor([[b]]), torch.tensor([[a]])) for b, a in ((1.0, 2.0), (3.0, -5.0))])
        assert found.dense().tolist() == [[-6.0]]  # (1 + 3) / 2 times (2 - 5)

    def test_the_adapters_are_left_alone(self) -> None:
        adapters = adapters_of([4, 4], 12, 20)
        before = [(u.left.clone(), u.right.clone()) for u in adapters]
        found = merged(adapters[:1], keep=1.0)
        found.left.zero_()
        found.right.zero_()
        merged(adapters)
        assert all(
            torch.equal(u.left, b) and torch.equal(u.right, a) for u, (b, a) in zip(adapters, before, strict=True)
        )


class TestRefused:
    @pytest.mark.parametrize("position", [0, 1])
    def test_full_updates(self, position: int) -> None:
        updates: list[Update] = list(adapters_of([2, 2], 6, 5))
        updates[position] = torch.ones(6, 5)
        with pytest.raises(
            OptionError,
            match=rf"merges the factors A and B of LoRA adapters, and update {position} is a full 6 x 5 tensor",
        ):
            robust_merge(updates)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep": 0.0}, r"method 'robust_merge': keep: expected float > 0"),
            ({"keep": 1.5}, r"keep: expected float <= 1"),
            ({"top_scales": 0.0}, r"top_scales: expected float > 0"),
            ({"rho": 0.2}, r"method 'robust_merge' has no option 'rho'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            robust_merge(adapters_of([2, 2], 6, 5), **options)


def test_cost_is_that_of_the_factors() -> None:
    method = create("robust_merge", {})
    specs = [UpdateSpec((768, 1024), r, torch.float32) for r in (16, 8, 0)]
    assert method.flops(specs, 3) == 30 * 24 * 1792
    assert method.workspace(specs, 3) == 8 * 16 * 1792
    batch = [UpdateSpec((4, 768, 1024), 16, torch.float32)]
    assert method.flops(batch, 1) == 4 * method.flops([UpdateSpec((768, 1024), 16, torch.float32)], 1)
