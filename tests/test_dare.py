"""DARE: random masks that depend on names and positions alone, and the two merges that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dcmerge_ext import LowRank, merge_checkpoints, merge_updates, ops, use_backend
from dcmerge_ext.checkpoints import plan as plan_module
from dcmerge_ext.errors import OptionError
from dcmerge_ext.lowrank import Update
from dcmerge_ext.methods import create, dare, task_arithmetic, ties
from dcmerge_ext.methods.apply import survey_model
from dcmerge_ext.methods.base import Context
from dcmerge_ext.methods.dare import drop
from dcmerge_ext.updates import Updates

WORD = 0xFFFFFFFF


def philox(counter: list[int], key: int) -> list[int]:
    """Philox4x32-10 in integers of Python."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return [c0, c1, c2, c3]


def plain_mask(length: int, rate: float, seed: int, key: str, task: int, offset: int = 0) -> list[float]:
    """The definition, entry by entry."""
    hashed = xxhash.xxh3_64_intdigest(key.encode(), seed=seed)
    words = [
        philox([e // 4 & WORD, e // 4 >> 32, task, 1 << 31], hashed)[e % 4] for e in range(offset, offset + length)
    ]
    return [float(word >= rate * 2**32) for word in words]


def mask_of(*shape: int, rate: float = 0.5, dtype: torch.dtype = torch.float64, **changes: Any) -> Tensor:
    """1 where an entry survives."""
    arguments = {"seed": 0, "key": "w", "task": 0} | changes
    found = drop(torch.ones(shape, dtype=dtype), rate, **arguments)
    survives = found != 0
    torch.testing.assert_close(found[survives], torch.full_like(found[survives], 1 / (1 - rate)))
    return survives.to(dtype)


def by_hand(updates: Sequence[Update], rate: float, seed: int = 0, key: str = "") -> list[Tensor]:
    """Drop and rescale, written out."""
    return [
        cases.dense(u)
        * torch.tensor(plain_mask(u.shape.numel(), rate, seed, key, t), dtype=u.dtype).reshape(u.shape)
        / (1 - rate)
        for t, u in enumerate(updates)
    ]


class TestMask:
    @pytest.mark.parametrize(("seed", "key", "task"), [(0, "", 0), (2**64 - 1, "layers.0.w", 3), (7, "ü", 2**32 - 1)])
    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.999])
    def test_definition(self, seed: int, key: str, task: int, rate: float, backend: str) -> None:
        found = mask_of(13, 7, rate=rate, seed=seed, key=key, task=task)
        assert found.shape == (13, 7)
        assert found.flatten().tolist() == plain_mask(91, rate, seed, key, task)

    @pytest.mark.parametrize("offset", [1, 4, 1_001, 2**34 + 3])
    def test_definition_beyond_the_start(self, offset: int) -> None:
        assert mask_of(9, offset=offset).tolist() == plain_mask(9, 0.5, 0, "w", 0, offset)

    @given(begin=st.integers(0, 90_000), count=st.integers(0, 90_000))
    @settings(max_examples=20)
    def test_any_run_of_entries_is_that_of_the_whole(self, begin: int, count: int) -> None:
        whole = mask_of(180_000, rate=0.3, dtype=torch.float32)
        assert torch.equal(mask_of(count, rate=0.3, offset=begin, dtype=torch.float32), whole[begin : begin + count])

    def test_threads_do_not_matter(self, restore_threads: None) -> None:
        expected = mask_of(300_007)
        torch.set_num_threads(3)
        assert torch.equal(mask_of(300_007), expected)

    def test_the_global_generator_is_neither_read_nor_moved(self) -> None:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        expected = mask_of(50)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(mask_of(50), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("length", [1, 255, 256, 257, 16_385, 40_001])
    @pytest.mark.parametrize("offset", [0, 3, 2**32 - 2, 2**34 - 101])
    def test_the_backends_have_the_same_bits(self, dtype: torch.dtype, length: int, offset: int) -> None:
        values = cases.normal(length, seed=3).to(dtype)
        found = {}
        for name in ("cpu", "reference"):
            with use_backend(name):
                found[name] = drop(values, 0.3, seed=1, key="w", task=2, offset=offset)
        assert torch.equal(found["cpu"], found["reference"])
        assert torch.equal(found["cpu"].signbit(), values.signbit())  # a dropped entry keeps the sign of its zero

    def test_views_are_dropped_by_their_own_order(self) -> None:
        values = cases.normal(40, 30, seed=3)
        assert torch.equal(
            drop(values.T, 0.4, seed=0, key="w", task=0), drop(values.T.contiguous(), 0.4, seed=0, key="w", task=0)
        )

    def test_ends_of_the_range(self) -> None:
        assert mask_of(1_000, rate=0.0).all()
        assert not mask_of(1_000, rate=1 - 2**-40).any()  # of 32 bits all lie below
        assert mask_of(0, 5).shape == (0, 5)
        assert mask_of().shape == ()

    def test_a_word_at_the_rate_itself_survives(self) -> None:
        word = philox([0, 0, 0, 1 << 31], xxhash.xxh3_64_intdigest(b"w", seed=0))[0]
        assert mask_of(1, rate=word / 2**32).item() == 1
        assert mask_of(1, rate=(word + 1) / 2**32).item() == 0

    @pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
    def test_as_many_entries_are_dropped_as_asked(self, rate: float) -> None:
        count = 400_000
        deviations = (float(mask_of(count, rate=rate).mean()) - (1 - rate)) / math.sqrt(rate * (1 - rate) / count)
        assert abs(deviations) < 4

    def test_masks_of_other_seeds_names_and_tasks_are_independent(self) -> None:
        masks = [mask_of(40_000, seed=seed) for seed in (0, 1, 2**32, 2**63)]
        masks += [mask_of(40_000, key=key) for key in ("W", "w ", "layers.0.w", "layers.1.w")]
        masks += [mask_of(40_000, task=task) for task in (1, 2, 2**32 - 1)]
        masks += [mask_of(40_000, offset=offset) for offset in (1, 4, 40_000, 2**34)]
        signs = 2 * torch.stack(masks) - 1
        correlation = signs @ signs.T / 40_000 - torch.eye(len(masks), dtype=torch.float64)
        assert correlation.abs().max() < 4.5 / 200  # 4.5 standard deviations, for 105 pairs

    def test_masks_are_independent_of_random_directions(self) -> None:
        mask = 2 * mask_of(40_000) - 1
        for stream in (0, 1):
            signs = ops.rademacher(1, 40_000, seed=0, key="w", stream=stream, dtype=torch.float64)[0]
            assert abs(float(mask @ signs)) / 40_000 < 4 / 200


class TestSum:
    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
    @pytest.mark.parametrize("shape", [(), (7,), (8, 6), (2, 3, 4, 5)])
    def test_written_out(self, rate: float, shape: tuple[int, ...], backend: str) -> None:
        updates = [cases.normal(*shape, seed=t) for t in range(3)]
        merged = dare(updates, rate=rate, seed=5)
        torch.testing.assert_close(merged, sum(by_hand(updates, rate, seed=5)), rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize("ranks", [[2, 3], [0, 3, 1], [0, 0], [2, None, 0]])
    def test_adapters_are_dropped_as_their_products(self, ranks: list[int | None]) -> None:
        adapters = cases.lora_updates([4 if r is None else r for r in ranks], 9, 7)
        updates = [a.dense() if r is None else a for a, r in zip(adapters, ranks, strict=True)]
        merged = dare(updates, rate=0.3)
        assert isinstance(merged, Tensor)
        assert torch.equal(merged, dare([cases.dense(u) for u in updates], rate=0.3))

    def test_nothing_dropped_is_task_arithmetic(self) -> None:
        updates = cases.full_updates(3, 8, 6)
        assert torch.equal(dare(updates, rate=0.0), task_arithmetic(updates))

    def test_the_mean_over_seeds_is_the_sum_of_the_tasks(self) -> None:
        updates = cases.full_updates(2, 6, 5)
        draws = torch.stack([dare(updates, rate=0.6, seed=s) for s in range(2_000)])
        deviation = (sum(u**2 for u in updates) * 0.6 / 0.4 / 2_000).sqrt()  # of the mean, entry by entry
        assert ((draws.mean(0) - sum(updates)) / deviation).abs().max() < 4.5

    @pytest.mark.parametrize("aggregate", ["sum", "ties"])
    def test_each_name_has_masks_of_its_own(self, aggregate: str) -> None:
        x = torch.ones(30, 30)
        merged = merge_updates({"a": [x], "b": [x]}, "dare", rate=0.5, aggregate=aggregate)
        assert not torch.equal(merged["a"], merged["b"])
        assert torch.equal(merged["a"].double(), by_hand([x.double()], 0.5, key="a")[0])

    def test_each_position_of_a_task_has_a_mask_of_its_own(self) -> None:
        x, y = cases.normal(2, 100, seed=1)
        assert cases.error(dare([x, y], rate=0.5), dare([y, x], rate=0.5)) > 0.1

    def test_single_precision(self) -> None:
        updates = cases.full_updates(4, 12, 9)
        single = dare([u.float() for u in updates], rate=0.7)
        assert cases.error(single, dare(updates, rate=0.7)) < 3e-7


class TestTies:
    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("keep", [None, 0.05, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_ties_of_the_dropped_updates(
        self, rate: float, keep: float | None, dtype: torch.dtype, backend: str
    ) -> None:
        model = {
            "a": [cases.normal(9, 6, seed=t, dtype=dtype) for t in range(3)],
            "b": [cases.normal(11, seed=10 + t, dtype=dtype) for t in range(3)],
        }
        merged = merge_updates(model, "dare", rate=rate, aggregate="ties", keep=keep, seed=3)
        dropped = {name: by_hand(updates, rate, seed=3, key=name) for name, updates in model.items()}
        expected = merge_updates(dropped, "ties", keep=0.2 if keep is None else keep)
        for name in model:
            torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=0)

    def test_adapters(self) -> None:
        updates: list[Update] = [*cases.lora_updates([2, 0], 9, 7), cases.full_updates(1, 9, 7)[0]]
        merged = dare(updates, rate=0.2, aggregate="ties", keep=0.5)
        assert torch.equal(merged, dare([cases.dense(u) for u in updates], rate=0.2, aggregate="ties", keep=0.5))

    def test_nothing_dropped_is_ties(self) -> None:
        updates = cases.full_updates(3, 8, 6)
        assert torch.equal(dare(updates, rate=0.0, aggregate="ties"), ties(updates))


class TestPanels:
    @pytest.mark.parametrize("aggregate", ["sum", "ties"])
    def test_a_panel_takes_its_part_of_the_mask(self, aggregate: str) -> None:
        whole = [cases.normal(60, 8, seed=t) for t in range(3)]
        method = create("dare", {"rate": 0.4, "aggregate": aggregate})

        def merged(rows: int) -> Tensor:
            panels = [Updates.of([x[i : i + rows] for x in whole]) for i in range(0, 60, rows)]
            for number, panel in enumerate(panels):
                panel.offset = number * rows * 8

            def visit(state: Any) -> None:
                for panel in panels:
                    method.survey("w", panel, state)

            context = Context(3, "w", survey_model(method, 3, torch.float64, visit))
            return torch.cat([cases.dense(method.merge(panel, context)) for panel in panels])

        expected = merged(60)
        assert torch.equal(merged(7), expected)
        assert torch.equal(merged(1), expected)

    @pytest.mark.parametrize("aggregate", ["sum", "ties"])
    @pytest.mark.parametrize("elements", [1, 40, 1 << 20])
    def test_files_merge_as_what_is_held_in_memory(
        self, aggregate: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = families.toy(dtype=torch.float32)
        tuned = [families.tuned(start, i) for i in range(2)]
        base = families.write_model(tmp_path / "base", start)
        tasks = [families.write_model(tmp_path / f"t{i}", t) for i, t in enumerate(tuned)]
        monkeypatch.setattr(plan_module, "PANEL_ELEMENTS", elements)
        options = {"rate": 0.5, "aggregate": aggregate, "seed": 11}
        merge_checkpoints(base, tasks, tmp_path / "out", "dare", scale=1.0, **options)
        found = load_file(tmp_path / "out" / "model.safetensors")
        updates = {
            name: [t[name] - w for t in tuned]
            for name, w in start.items()
            if w.is_floating_point() and not name.endswith(("running_mean", "running_var"))
        }
        for name, merged in merge_updates(updates, "dare", **options).items():
            assert torch.equal(found[name], start[name] + merged)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rate": 1.0}, r"rate: expected float < 1.0"),
            ({"rate": -0.1}, r"rate: expected float >= 0.0"),
            ({"aggregate": "mean"}, r"aggregate: invalid enum value 'mean' \(takes 'sum' \| 'ties'\)"),
            ({"aggregate": "ties", "keep": 0.0}, r"keep: expected float > 0.0"),
            ({"keep": 0.5}, r"keep belongs to aggregate='ties', and aggregate is 'sum'"),
            ({"seed": -1}, r"seed: expected int >= 0"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            create("dare", options)

    @pytest.mark.parametrize(("aggregate", "surveys", "scales"), [("sum", 0, (1.0, 0.3)), ("ties", 3, (1.0, 1.0))])
    def test_passes_and_scales(self, aggregate: str, surveys: int, scales: tuple[float, float]) -> None:
        method = create("dare", {"aggregate": aggregate})
        assert method.num_surveys(torch.float32) == surveys
        assert (method.default_scale(1), method.default_scale(8)) == scales

    def test_cost_counts_the_tasks_that_touch_the_tensor(self) -> None:
        specs = cases.dense_specs(2, 8, 6)
        untouched = [specs[0], specs[1]._replace(rank=0)]
        method = create("dare", {})
        assert method.flops(specs, 2) == 2 * method.flops(untouched, 2) > 0


@pytest.mark.parametrize("aggregate", ["sum", "ties"])
def test_degenerate_input(aggregate: str) -> None:
    options: dict[str, Any] = {"rate": 0.5, "aggregate": aggregate}
    assert torch.equal(dare([torch.zeros(4, 3)] * 2, **options), torch.zeros(4, 3))
    assert dare([torch.ones(1, 1)], **options).item() in (0.0, 2.0)
    untouched = LowRank(torch.zeros(4, 0), torch.zeros(0, 3))
    assert torch.equal(dare([untouched, untouched], **options), torch.zeros(4, 3))
