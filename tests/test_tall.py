"""Tall matrices merged by row panels: the same result as merging them whole."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcmerge_ext import LowRank, merge_checkpoints
from dcmerge_ext.methods.base import Context, Method
from dcmerge_ext.methods.registry import create
from dcmerge_ext.updates import Updates

TALL, PLAN = import_module("dcmerge_ext.methods.tall"), import_module("dcmerge_ext.checkpoints.plan")
METHODS = [
    ("tsv_m", {}),
    ("tsv_m", {"rank": 5}),
    ("tsv_m", {"rank": (3, 7, 2)}),
    ("dc_merge", {}),
    ("dc_merge", {"rank": 4, "keep": 0.2, "smoothing": "average"}),
    ("dc_merge", {"aggregate": "sum", "block_size": 0}),
]


@pytest.fixture(autouse=True)
def _all_are_tall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TALL, "TALL", 0)
    monkeypatch.setattr(PLAN, "PASS_ELEMENTS", 16 * 20)


def by_panels(method: Method, updates: list[Tensor | LowRank], rows: int) -> tuple[Tensor, dict[str, Any]]:
    given = Updates.of(updates)
    m = given.shape[0]

    def part(update: Tensor | LowRank, begin: int) -> Tensor | LowRank:
        if isinstance(update, LowRank):
            return LowRank(update.left[begin : begin + rows], update.right)
        return update[begin : begin + rows]

    def panels() -> Iterator[Updates]:
        for begin in range(0, m, rows):
            yield Updates.of([part(update, begin) for update in updates])

    context = Context(len(updates), "w")
    assert method.in_panels(given.specs, len(updates))
    merge = method.prepare(given.specs, panels, context)
    return torch.cat([cases.dense(merge(panel)) for panel in panels()]), context.facts


def family(seed: int, *, m: int = 90, n: int = 20) -> list[Tensor]:
    return [cases.normal(m, n, seed=seed + i).float() * torch.linspace(2, 0.5, n) for i in range(3)]


@pytest.mark.parametrize("rows", [90, 16, 1])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_same_as_whole(name: str, options: dict[str, Any], rows: int) -> None:
    method, updates = create(name, options), family(1)
    found, facts = by_panels(method, list(updates), rows)
    context = Context(3, "w")
    whole = method.merge(Updates.of(updates), context)
    exact = method.merge(Updates.of([u.double() for u in updates]), Context(3, "w"))
    assert cases.error(found, exact) < max(2 * cases.error(whole, exact), 1e-6)
    for fact in ("rank", "cover_rank"):
        assert facts[fact] == context.facts[fact]
    for side in ("cover_u", "cover_v"):
        assert facts[side]["dropped"] == context.facts[side]["dropped"]
        assert facts[side]["smallest_kept"] == pytest.approx(context.facts[side]["smallest_kept"], rel=1e-4)


def test_copies_of_a_task_are_dropped() -> None:
    first, second, _ = family(2)
    found, facts = by_panels(create("tsv_m", {"rank": 5}), [first, second, first.clone()], 16)
    whole = create("tsv_m", {"rank": 5}).merge(Updates.of([first, second, first.clone()]), Context(3, "w"))
    assert facts["cover_u"]["dropped"] == facts["cover_v"]["dropped"] == 5
    assert cases.error(found, whole) < 1e-5


def test_updates_of_low_rank_and_of_rank_0_among_dense_ones() -> None:
    low = LowRank(cases.normal(90, 4, seed=5).float(), cases.normal(4, 20, seed=6).float())
    none = LowRank(torch.zeros(90, 0), torch.zeros(0, 20))
    updates = [family(3)[0], low, none]
    found, facts = by_panels(create("dc_merge", {}), list(updates), 16)
    context = Context(3, "w")
    whole = cases.dense(create("dc_merge", {}).merge(Updates.of(updates), context))
    assert cases.error(found, whole) < 1e-5
    assert facts["rank"] == context.facts["rank"]


def test_null_components_of_a_task() -> None:
    updates = [*family(4)[:2], (cases.normal(90, 2, seed=7) @ cases.normal(2, 20, seed=8)).float()]
    found, facts = by_panels(create("tsv_m", {}), list(updates), 16)
    context = Context(3, "w")
    whole = create("tsv_m", {}).merge(Updates.of(updates), context)
    assert facts["rank"] == context.facts["rank"] == [6, 6, 2]
    assert cases.error(found, whole) < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "shape", "dtype", "expected"),
    [
        ("tsv_m", {}, (40, 20), torch.float32, True),
        ("dc_merge", {}, (40, 20), torch.float32, True),
        ("dc_merge", {"cover": "stiefel"}, (40, 20), torch.float32, False),
        ("score", {}, (40, 20), torch.float32, False),
        ("tsv_m", {}, (39, 20), torch.float32, False),  # not tall
        ("tsv_m", {}, (20, 40), torch.float32, False),
        ("tsv_m", {}, (2, 40, 20), torch.float32, False),
        ("tsv_m", {}, (40, 20), torch.float64, False),
        ("tsv_m", {}, (40, 2), torch.float32, False),  # no component each: the mean
    ],
)
def test_what_goes_by_panels(
    name: str, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, expected: bool
) -> None:
    updates = Updates.of([torch.ones(shape, dtype=dtype)] * 3)
    assert create(name, options).in_panels(updates.specs, 3) is expected


def test_adapters_alone_do_not() -> None:
    updates = Updates.of(cases.lora_updates([3, 4], 40, 20, dtype=torch.float32))
    assert not create("tsv_m", {}).in_panels(updates.specs, 2)


@pytest.mark.parametrize("method", ["tsv_m", "dc_merge"])
def test_in_files(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = {
        "embed.weight": cases.normal(90, 20, seed=1).float(),
        "square.weight": cases.normal(20, 20, seed=2).float(),
    }
    base = families.write_model(tmp_path / "base", start)
    tasks = []
    for i in range(3):
        changed = {
            name: w + 0.1 * cases.normal(*w.shape, seed=10 * i + j).float() for j, (name, w) in enumerate(start.items())
        }
        tasks.append(families.write_model(tmp_path / f"t{i}", changed))
    report = merge_checkpoints(base, tasks, tmp_path / "panels", method)
    monkeypatch.setattr(TALL, "TALL", 1 << 26)
    whole = merge_checkpoints(base, tasks, tmp_path / "whole", method)
    found, expected = (load_file(tmp_path / out / "model.safetensors") for out in ("panels", "whole"))
    for name in start:
        assert cases.error(found[name] - start[name], expected[name] - start[name]) < 1e-4
    routes = [record["svd"]["routes"] for record in report.record["tensors"]]
    assert "gram panels" in routes[0]
    assert [t["update_norms"] for t in report.record["tensors"]] == [
        pytest.approx(t["update_norms"], rel=1e-6) for t in whole.record["tensors"]
    ]
    assert report.record["tasks"] == [
        {**task, "content": ours["content"]}
        for task, ours in zip(whole.record["tasks"], report.record["tasks"], strict=True)
    ]


def test_a_nan_is_named(tmp_path: Path) -> None:
    start = {"embed.weight": cases.normal(90, 20, seed=1).float()}
    broken = {"embed.weight": start["embed.weight"].clone()}
    broken["embed.weight"][77, 3] = torch.nan
    base = families.write_model(tmp_path / "base", start)
    task = families.write_model(tmp_path / "task", broken)
    with pytest.raises(ValueError, match=r"task.*embed\.weight.*1 NaN"):
        merge_checkpoints(base, [task, base], tmp_path / "out", "tsv_m")
    assert not (tmp_path / "out").exists()
