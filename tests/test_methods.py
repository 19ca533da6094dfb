"""Properties that every registered method has, or declares not to have; and the methods that are a line of algebra."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import dcmerge_ext
from dcmerge_ext import LowRank, list_methods, merge_updates
from dcmerge_ext.errors import InputError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import describe_options
from dcmerge_ext.updates import UpdateSpec

REGISTERED = list(list_methods())
METHODS = [name for name in REGISTERED if name not in cases.LORA_ONLY]
MATRIX_METHODS = [name for name in METHODS if list_methods()[name].scope == "matrix"]
every_registered = pytest.mark.parametrize("method", REGISTERED)
every_method = pytest.mark.parametrize("method", METHODS)


def merged_tensor(updates: Sequence[Update], method: str, **options: Any) -> Tensor:
    return cases.dense(merge_updates(updates, method=method, **options))


class TestRegister:
    def test_the_methods_are_listed_in_order(self) -> None:
        assert sorted(REGISTERED) == REGISTERED
        assert {"averaging", "dc_merge", "task_arithmetic", "ties"} <= set(REGISTERED)

    @every_registered
    def test_each_method_is_a_function_with_its_options_for_a_signature(self, method: str) -> None:
        function = getattr(dcmerge_ext.methods, method)
        parameters = inspect.signature(function).parameters
        options = describe_options(list_methods()[method])
        assert list(parameters) == ["updates", "weights", *(o.name for o in options)]
        for option in options:
            assert parameters[option.name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[option.name].default == option.default
        assert (function.__name__, function.__module__) == (method, f"dcmerge_ext.methods.{method}")

    @every_registered
    def test_each_option_is_described(self, method: str) -> None:
        function, cls = getattr(dcmerge_ext.methods, method), list_methods()[method]
        assert function.__doc__.startswith(cls.__doc__.splitlines()[0])
        for option in describe_options(cls):
            assert len(option.meaning) > 15
            assert option.type
            assert f"{option.name}: {option.meaning}" in function.__doc__

    @every_registered
    def test_each_method_names_its_paper(self, method: str) -> None:
        cls = list_methods()[method]
        assert cls.paper.startswith("https://arxiv.org/abs/")
        assert cls.paper.removeprefix("https://arxiv.org/abs/") in cls.__doc__

    @every_method
    def test_the_function_is_merge_updates_by_name(self, method: str) -> None:
        updates = cases.full_updates(2, 8, 6)
        assert torch.equal(getattr(dcmerge_ext.methods, method)(updates), merge_updates(updates, method))

    @every_method
    @pytest.mark.parametrize("tasks", [1, 2, 8])
    def test_defaults_suit_any_number_of_tasks(self, method: str, tasks: int) -> None:
        chosen = list_methods()[method]()
        specs = [UpdateSpec((3, 64, 48), None if i % 2 else 4, torch.float32) for i in range(tasks)]
        chosen.check(specs, tasks)
        assert chosen.default_scale(tasks) > 0
        assert chosen.flops(specs, tasks) >= 0
        assert chosen.workspace(specs, tasks) > 0

    @pytest.mark.parametrize(
        ("method", "scales"),
        [("averaging", (1.0, 1.0)), ("task_arithmetic", (1.0, 0.3)), ("ties", (1.0, 1.0)), ("dc_merge", (1.0, 2.0))],
    )
    def test_default_scales_for_one_task_and_for_several(self, method: str, scales: tuple[float, float]) -> None:
        chosen = list_methods()[method]()
        assert (chosen.default_scale(1), chosen.default_scale(8)) == scales


class TestEveryMethod:
    @every_method
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(8, 6), (6, 8), (1, 5), (2, 3, 8, 6)])
    def test_shape_is_kept_and_the_result_is_at_least_float32(
        self, method: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        merged = merge_updates([cases.normal(*shape, seed=s).to(dtype) for s in (1, 2)], method)
        assert isinstance(merged, Tensor)
        assert merged.shape == shape
        assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert merged.isfinite().all()
        assert merged.norm() > 0

    @every_registered
    @pytest.mark.parametrize("ranks", [[2, 3], [0, 3], [0, 0]])
    def test_adapters_stay_adapters_where_the_method_keeps_rank(self, method: str, ranks: list[int]) -> None:
        merged = merge_updates(cases.lora_updates(ranks, 8, 6, dtype=torch.float32), method)
        assert merged.shape == (8, 6)
        assert merged.dtype == torch.float32
        chosen = list_methods()[method]()
        rank = merged.rank if isinstance(merged, LowRank) else None
        assert rank == (max(ranks) if method in cases.LARGEST_RANK else sum(ranks) if chosen.keeps_rank else None)
        assert rank == chosen.merged_rank([UpdateSpec((8, 6), r, torch.float32) for r in ranks], len(ranks))

    @every_method
    def test_adapters_beside_full_updates_give_a_tensor(self, method: str) -> None:
        merged = merge_updates([cases.lora_updates([2], 8, 6)[0], cases.full_updates(1, 8, 6)[0]], method)
        assert isinstance(merged, Tensor)

    @pytest.mark.parametrize("method", [name for name in METHODS if name not in cases.FLATTENED])
    def test_a_single_task_comes_back_where_nothing_is_trimmed(self, method: str) -> None:
        options = cases.NOTHING_TRIMMED.get(method, {})
        (full,), (adapter,) = cases.full_updates(1, 8, 6), cases.lora_updates([3], 8, 6)
        assert cases.error(merge_updates([full], method, **options), full) < 1e-12
        assert cases.error(merge_updates([adapter], method, **options), adapter) < 1e-12

    @pytest.mark.parametrize("method", [name for name in METHODS if name not in cases.ABSOLUTE_STEP])
    @pytest.mark.parametrize("factor", [4.0, 0.3, -1.0])
    def test_homogeneous(self, method: str, factor: float) -> None:
        updates = cases.full_updates(3, 12, 9)
        scaled = merged_tensor([u * factor for u in updates], method)
        assert cases.error(scaled, factor * merged_tensor(updates, method)) < 1e-12

    @pytest.mark.parametrize("method", [name for name in METHODS if name not in cases.DRAWN_BY_POSITION])
    def test_order_of_the_tasks_does_not_matter(self, method: str) -> None:
        updates = cases.full_updates(3, 12, 9, exponent=1.0)
        for order in ((2, 0, 1), (1, 0, 2)):
            permuted = merged_tensor([updates[i] for i in order], method)
            assert cases.error(permuted, merged_tensor(updates, method)) < 1e-11

    @every_method
    def test_weights_multiply_the_updates(self, method: str) -> None:
        updates = [*cases.lora_updates([3, 2], 12, 9), *cases.full_updates(1, 12, 9)]
        weighted = merged_tensor(updates, method, weights=[2.0, 1.0, -0.5])
        assert cases.error(weighted, merged_tensor([updates[0] * 2.0, updates[1], updates[2] * -0.5], method)) < 1e-11
        assert cases.error(weighted, merged_tensor(updates, method)) > 1e-2

    @every_registered
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_updates_are_left_alone(self, method: str, dtype: torch.dtype) -> None:
        """And the result is no view of one, or of its factors."""
        families: list[list[Update]] = [list(cases.lora_updates([2, 2], 8, 6, dtype=dtype))]
        if method not in cases.LORA_ONLY:
            families.append(list(cases.full_updates(2, 8, 6, dtype=dtype)))
        for updates in families:
            before = [cases.dense(u).clone() for u in updates]
            for count in (1, 2):
                merged = merge_updates(updates[:count], method)
                for part in (merged.left, merged.right) if isinstance(merged, LowRank) else (merged,):
                    part.zero_()
            assert all(torch.equal(cases.dense(a), b) for a, b in zip(updates, before, strict=True))

    @every_method
    def test_only_zero_tasks_merge_to_zero(self, method: str) -> None:
        assert torch.equal(merge_updates([torch.zeros(8, 6)] * 3, method), torch.zeros(8, 6))

    @pytest.mark.parametrize("method", MATRIX_METHODS)
    def test_a_mapping_is_merged_matrix_by_matrix(self, method: str) -> None:
        model: dict[str, Sequence[Update]] = {
            "full": cases.full_updates(2, 12, 9),
            "adapters": cases.lora_updates([2, 3], 6, 8),
        }
        merged = merge_updates(model, method)
        assert list(merged) == list(model)
        for name, updates in model.items():
            assert torch.equal(cases.dense(merged[name]), merged_tensor(updates, method))

    @pytest.mark.parametrize("method", MATRIX_METHODS)
    def test_leading_dimensions_equal_the_loop(self, method: str) -> None:
        updates = [cases.normal(2, 2, 12, 9, seed=s) for s in (1, 2, 3)]
        merged = merge_updates(updates, method)
        for i in range(2):
            for j in range(2):
                assert cases.error(merged[i, j], merge_updates([u[i, j] for u in updates], method)) < 1e-11

    @every_method
    def test_the_backends_agree(self, method: str) -> None:
        updates = cases.full_updates(3, 12, 9, dtype=torch.float32)
        results = []
        for name in ("reference", "cpu"):
            with dcmerge_ext.use_backend(name):
                results.append(merge_updates(updates, method))
        assert torch.equal(*results)


class TestRefusedInput:
    @every_method
    def test_no_tasks(self, method: str) -> None:
        with pytest.raises(InputError, match="needs at least one task, got none"):
            merge_updates([], method)

    @every_method
    def test_shapes_that_differ(self, method: str) -> None:
        with pytest.raises(InputError, match=r"update 1 of 'w' has shape \(4, 3\), update 0 has \(3, 4\)"):
            merge_updates({"w": [torch.ones(3, 4), torch.ones(4, 3)]}, method)

    @every_method
    def test_integers(self, method: str) -> None:
        with pytest.raises(TypeError, match=r"update 1: needs a floating dtype, got torch.int64"):
            merge_updates([torch.ones(3, 4), torch.ones(3, 4).long()], method)

    @every_method
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_values(self, method: str, value: float) -> None:
        bad = torch.ones(3, 4)
        bad[1, 2] = value
        with pytest.raises(InputError, match=r"update 2 of 'w' holds 1 NaN or Inf values"):
            merge_updates({"v": [torch.ones(3, 4)] * 3, "w": [torch.ones(3, 4), torch.ones(3, 4), bad]}, method)

    @pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [float("inf"), 1.0]])
    def test_weights_that_do_not_fit(self, weights: list[float]) -> None:
        with pytest.raises(InputError, match=r"weights: needs one finite number for each of 2 tasks, got \["):
            merge_updates([torch.ones(3, 4)] * 2, "averaging", weights=weights)

    def test_tensors_with_different_numbers_of_tasks(self) -> None:
        with pytest.raises(InputError, match=r"same number of tasks, got \[1, 2\]"):
            merge_updates({"v": [torch.ones(3, 4)], "w": [torch.ones(3, 4)] * 2}, "averaging")

    def test_no_tensors_give_no_tensors(self) -> None:
        assert merge_updates({}, "ties") == {}


class TestLinearMethods:
    @pytest.mark.parametrize(("method", "divisor"), [("task_arithmetic", 1), ("averaging", 4)])
    @pytest.mark.parametrize("form", ["dense", "lowrank", "mixed"])
    def test_are_the_sum_and_the_mean(self, method: str, divisor: int, form: str) -> None:
        adapters: list[Update] = list(cases.lora_updates([2, 0, 3, 1], 12, 9))
        updates = adapters if form == "lowrank" else [cases.dense(u) for u in adapters]
        if form == "mixed":
            updates[:2] = adapters[:2]
        expected = torch.stack([cases.dense(u) for u in adapters]).sum(0) / divisor
        merged = merge_updates(updates, method)
        assert isinstance(merged, LowRank) == (form == "lowrank")
        assert cases.error(merged, expected) < 1e-14

    @pytest.mark.parametrize("method", ["task_arithmetic", "averaging"])
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 4)])
    def test_take_tensors_of_any_shape(self, method: str, shape: tuple[int, ...]) -> None:
        updates = [cases.normal(*shape, seed=s) for s in (1, 2)]
        expected = (updates[0] + updates[1]) / (2 if method == "averaging" else 1)
        torch.testing.assert_close(merge_updates(updates, method), expected)

    def test_dtypes_mix_to_the_widest(self) -> None:
        updates = [
            u.to(d) for u, d in zip(cases.lora_updates([2, 3], 12, 9), (torch.bfloat16, torch.float64), strict=True)
        ]
        for update_list in (updates, [u.dense() for u in updates]):
            merged = merge_updates(update_list, "averaging")
            assert merged.dtype == torch.float64
            assert cases.error(merged, (cases.dense(updates[0]).double() + cases.dense(updates[1])) / 2) < 5e-3
