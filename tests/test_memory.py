"""The bound on memory, and what a plan says of cost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import cases
import families
import pytest
import torch

from dcmerge_ext import merge_checkpoints
from dcmerge_ext.checkpoints import disk, memory
from dcmerge_ext.checkpoints.config import build_config
from dcmerge_ext.checkpoints.estimate import estimate
from dcmerge_ext.checkpoints.memory import MemoryBudget, anonymous_bytes, peak_bytes, watched_memory
from dcmerge_ext.checkpoints.run import Prepared, prepare
from dcmerge_ext.cli import main
from dcmerge_ext.errors import InputError

SHAPES = {"a.weight": (300, 200), "b.weight": (200, 300), "c.weight": (64, 64), "norm.weight": (64,)}


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    start = {name: cases.normal(*shape, seed=i).float() for i, (name, shape) in enumerate(SHAPES.items())}
    base = families.write_model(tmp_path / "base", start)
    tasks = [
        families.write_model(
            tmp_path / f"t{i}",
            {
                name: w + 0.1 * cases.normal(*w.shape, seed=50 * i + j).float()
                for j, (name, w) in enumerate(start.items())
            },
        )
        for i in range(1, 3)
    ]
    return {"base": base, "tasks": tasks}


def prepared(family: dict[str, Any], out: Path, **settings: Any) -> Prepared:
    values = {"base": str(family["base"]), "tasks": [str(t) for t in family["tasks"]], "out": str(out), **settings}
    return prepare(build_config(values))


class TestBound:
    def test_a_tensor_that_cannot_fit_is_refused_before_anything_is_written(
        self, family: dict[str, Any], tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=r"tensor '[ab]\.weight' .*GB to merge.*--max-memory.*at least \d+\.\d+GB"):
            merge_checkpoints(**family, out=tmp_path / "out", method="tsv_m", max_memory="1MB")
        assert not list(tmp_path.glob("out*"))

    def test_what_the_message_asks_for_is_enough(self, family: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError) as refused:
            merge_checkpoints(**family, out=tmp_path / "out", method="tsv_m", max_memory="1MB")
        least = str(refused.value).split("at least ")[1].split(",")[0]
        merge_checkpoints(**family, out=tmp_path / "out", method="tsv_m", max_memory=f"{float(least[:-2]) + 0.1:.2f}GB")

    @pytest.mark.parametrize("method", ["dc_merge", "ties", "knots"])
    def test_it_changes_no_byte(self, method: str, family: dict[str, Any], tmp_path: Path) -> None:
        for name, bound in (("free", None), ("bound", "3GB")):
            merge_checkpoints(**family, out=tmp_path / name / "m", method=method, max_memory=bound)
        free, bound_ = (
            {f.name: f.read_bytes() for f in (tmp_path / name / "m").iterdir() if f.name != "dcmerge_timings.json"}
            for name in ("free", "bound")
        )
        for held in (free, bound_):
            for name in ("dcmerge.json", "README.md"):
                held[name] = held[name].replace(b"/free/", b"/./").replace(b"/bound/", b"/./")
        assert free == bound_

    def test_work_in_flight_stays_under_the_bound(self) -> None:
        budget = MemoryBudget(anonymous_bytes() + (2 << 30))
        left = budget._left
        assert left is not None
        size, inside, most = left // 3, 0, 0
        lock = threading.Lock()

        def work() -> None:
            nonlocal inside, most
            with budget.hold(size):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.02)
                with lock:
                    inside -= 1

        threads = [threading.Thread(target=work) for _ in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
        assert most == 3
        assert budget._left == left

    def test_memory_comes_back_after_an_error(self) -> None:
        budget = MemoryBudget(anonymous_bytes() + (1 << 30))
        left = budget._left
        with pytest.raises(ZeroDivisionError), budget.hold(1 << 20):
            raise ZeroDivisionError
        assert budget._left == left

    @pytest.mark.parametrize("size", ["4 apples", "0", "-1GB"])
    def test_a_size_that_is_none(self, size: str, family: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="max_memory"):
            merge_checkpoints(**family, out=tmp_path / "out", max_memory=size)

    def test_on_the_command_line(
        self, family: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tasks = [f"--task={task}" for task in family["tasks"]]
        arguments = ["merge", "--base", str(family["base"]), *tasks, "--out", str(tmp_path / "out")]
        assert main([*arguments, "--max-memory", "1MB"]) == 1
        assert "at least" in capsys.readouterr().err
        assert main([*arguments, "--max-memory", "3GB", "-v"]) == 0
        assert "predicted" in capsys.readouterr().out


def test_watched_memory_sees_what_is_held_for_a_while() -> None:
    before = anonymous_bytes()
    with watched_memory() as peak:
        held = torch.ones(64 << 20)  # 256 MB
        time.sleep(0.2)
        del held
    assert 200e6 < peak() - before < 400e6


def test_the_report_tells_the_peak(family: dict[str, Any], tmp_path: Path) -> None:
    report = merge_checkpoints(**family, out=tmp_path / "out", method="averaging")
    assert 0 < report.peak_bytes < 100e9


class TestPlan:
    def test_bytes_of_each_pass_count(self, family: dict[str, Any], tmp_path: Path) -> None:
        stored = sum(4 * torch.Size(shape).numel() for shape in SHAPES.values())
        for method, passes in (("task_arithmetic", 1), ("ties", 4), ("tsv_m", 1)):
            found = prepared(family, tmp_path / "out", method=method)
            cost = estimate(found.plan, found.output_bytes, tmp_path / "out")
            assert cost.read_bytes == passes * 3 * stored
            assert cost.written_bytes == stored
            assert cost.compute_seconds > 0
            assert cost.write_seconds > 0
            assert cost.seconds >= cost.compute_seconds
        assert not (tmp_path / "out").exists()

    def test_adapters_alone(self, tmp_path: Path) -> None:
        start = families.toy()
        tasks = [str(families.write_adapter(tmp_path / f"a{i}", start, rank=3, seed=i)) for i in range(2)]
        found = prepare(build_config({"tasks": tasks, "out": str(tmp_path / "out"), "method": "dc_merge"}))
        cost = estimate(found.plan, found.output_bytes, tmp_path / "out")
        assert cost.compute_seconds > 0
        assert cost.peak_bytes > 0

    def test_peak_is_that_of_the_tensors_that_go_together(self, family: dict[str, Any], tmp_path: Path) -> None:
        plan = prepared(family, tmp_path / "out", method="tsv_m").plan
        sizes = sorted((peak_bytes(plan, t) for t in plan.tensors), reverse=True)
        assert memory.plan_peak(plan) == sum(sizes[: memory.workers()]) + memory._FIXED_BYTES


class TestDisk:
    def test_a_file_just_written_is_cached(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(1 << 20))
        assert disk.cached_fraction([path]) in (0.0, 1.0)  # 0 where the file system does not tell
        assert disk.cached_fraction([]) == 0

    def test_rates_are_rates(self, tmp_path: Path) -> None:
        path, empty = tmp_path / "file", tmp_path / "empty"
        path.write_bytes(bytes(1 << 20))
        empty.touch()
        assert disk.read_rate([path, empty]) > 1e6
        assert disk.write_rate(tmp_path) > 1e6
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]
