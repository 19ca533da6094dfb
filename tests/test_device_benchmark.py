"""The GPU benchmark without a GPU: every row in small, with the CUDA kernels run on the host and a stopwatch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cub
import device
import device_timing
import pytest
import torch
from case import Check
from conftest import HOST_KERNELS
from device_case import Bench, DeviceCase, DeviceProblem, DeviceRival, measure_row
from device_timing import Clock, EventClock, HostClock
from roofline import DeviceRates, Needs, measure_device_rates, roof
from timing import QUICK

from dcmerge_ext import LowRank
from dcmerge_ext.backends import SOURCES, available

ROOT = Path(__file__).parents[1]
RATES = DeviceRates("a device", copy=100.0, float32=10.0, float64=5.0, launch=1.0)
ROWS = device.suite(quick=True)


@pytest.fixture(autouse=True)
def _host_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "cuda_host", HOST_KERNELS)
    if not available("cuda_host"):
        pytest.skip("the CUDA kernels do not compile for the host here")


def bench(clock: Clock | None = None) -> Bench:
    return Bench(torch.device("cpu"), "cuda_host", clock or HostClock(), QUICK)


class Seconds:
    """Every call takes one second."""

    def timer(self, call: Callable[[], Any], manner: str) -> Callable[[], float]:
        return lambda: 1.0


def bent(answer: Any) -> Any:
    """An answer wrong by a percent."""
    if isinstance(answer, LowRank):
        return LowRank(bent(answer.left), answer.right)
    if isinstance(answer, tuple):
        return (bent(answer[0]), *answer[1:])
    return answer * 1.01 if answer.is_floating_point() else answer + 1


class TestRows:
    @pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
    def test_every_row_is_right_and_timed(self, case: DeviceCase) -> None:
        row = measure_row(case, bench(), RATES)
        assert (row.status, row.note) == ("timed", "")
        assert row.check is not None
        assert row.check.passed
        assert row.roof.seconds > 0
        assert row.fraction is not None
        assert row.rivals
        for rival in row.rivals:
            if rival.rival.name.startswith("CUB"):
                assert rival.note == "CUB runs on CUDA devices only"
            else:
                assert rival.ratio is not None, f"{rival.rival.name}: {rival.note}"

    @pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
    def test_a_wrong_answer_is_failed_and_not_timed(self, case: DeviceCase) -> None:
        def prepare(given: Bench) -> DeviceProblem:
            problem = case.prepare(given)
            return replace(problem, ours=lambda: bent(problem.ours()))

        row = measure_row(replace(case, prepare=prepare), bench(), RATES)
        assert row.status == "failed"
        assert row.check is not None
        assert not row.check.passed
        assert row.ours is None
        assert not row.rivals

    def test_names_are_distinct(self) -> None:
        for quick in (True, False):
            names = [case.name for case in device.suite(quick=quick)]
            assert len(set(names)) == len(names)


class TestMeasure:
    """With a clock that is known."""

    def row(self, *rivals: DeviceRival, answer: float = 1.0) -> Any:
        def check(found: float) -> Check:
            return Check(abs(found - 1.0), 0.1)

        def prepare(_: Bench) -> DeviceProblem:
            return DeviceProblem(lambda: answer, check, rivals, "warm")

        return measure_row(DeviceCase("row", Needs(10.0), prepare), bench(Seconds()), RATES)

    def test_the_fraction_is_roof_over_time(self) -> None:
        row = self.row()
        assert row.roof == (1.0, "launches")
        assert row.fraction == 1.0

    def test_parts_timed_once_count_as_often_as_they_are(self) -> None:
        row = self.row(DeviceRival("slow", lambda: 1.0, once=(8, lambda: None)))
        assert row.rivals[0].ratio == 9.0

    def test_a_rival_that_is_wrong_is_not_timed(self) -> None:
        wrong, right = self.row(DeviceRival("wrong", lambda: 2.0), DeviceRival("right", lambda: 1.05)).rivals
        assert wrong.samples is None
        assert "exceeds" in wrong.note
        assert right.ratio == 1.0

    def test_an_error_costs_a_rival_or_a_row(self) -> None:
        def fail() -> float:
            raise torch.cuda.OutOfMemoryError("out of memory")

        rival = self.row(DeviceRival("big", fail)).rivals[0]
        assert rival.samples is None
        assert "out of memory" in rival.note

        def prepare(_: Bench) -> DeviceProblem:
            return DeviceProblem(fail, lambda _: Check(0.0, 0.0), [], "warm")

        row = measure_row(DeviceCase("row", Needs(1.0), prepare), bench(), RATES)
        assert row.status == "failed"
        assert "out of memory" in row.note


class TestRoof:
    def test_the_longest_part_counts(self) -> None:
        assert roof(Needs(1000.0), RATES) == (10.0, "memory")
        assert roof(Needs(100.0, 50.0), RATES) == (5.0, "arithmetic")
        assert roof(Needs(100.0, 50.0, torch.float64), RATES) == (10.0, "arithmetic")
        assert roof(Needs(100.0, 50.0, launches=7), RATES) == (7.0, "launches")

    def test_every_prediction_is_positive_and_finite(self) -> None:
        for case in device.suite(quick=False):
            assert 1e-7 < roof(case.needs, device.H100).seconds < 1

    def test_an_election_reads_the_blocks_that_the_mask_keeps(self) -> None:
        needs = {case.name: case.needs for case in device.suite(quick=False)}
        assert needs["elect/float32/8x768x768/unmasked"].traffic == 4 * 9 * 768 * 768
        assert needs["elect/float32/8x768x768/masked"].traffic == 4 * 2 * 768 * 768
        assert needs["project/float64/k128/T8"].flops == 2 * 128**3

    def test_rates_are_measured(self) -> None:
        rates = measure_device_rates(torch.device("cpu"), HostClock(), quick=True)
        assert min(rates[1:]) > 0


class Stream:
    """What a stream of a device was asked for, in order; every item takes a millisecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        stream = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1

            def record(self) -> None:
                self.at = len(stream.asked)
                stream.asked.append("event")

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at - 1)

        properties = SimpleNamespace(L2_cache_size=1 << 10)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.asked.append("sleep"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        self.clock = EventClock(torch.device("cpu"))
        self.clock._filler = SimpleNamespace(sum=lambda: self.asked.append("flush"))  # type: ignore[assignment]

    def sample(self, manner: device_timing.Manner) -> tuple[float, list[str]]:
        timer = self.clock.timer(lambda: self.asked.append("call"), manner)
        self.asked.clear()
        return timer(), self.asked


class TestEventClock:
    """On a pretended stream: what is asked for, and in which order."""

    def test_a_cold_call_follows_a_flush_and_a_lead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds, asked = Stream(monkeypatch).sample("cold")
        assert asked == ["flush", "sleep", "event", "call", "event"]
        assert seconds == 1e-3

    def test_warm_calls_follow_a_lead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device_timing, "_SAMPLE", 3e-3)
        seconds, asked = Stream(monkeypatch).sample("warm")
        assert asked == ["sleep", "event", "call", "call", "call", "event"]
        assert seconds == 1e-3

    def test_a_whole_call_begins_on_an_idle_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds, asked = Stream(monkeypatch).sample("whole")
        assert asked == ["event", "call", "event"]
        assert seconds == 1e-3


class TestCommand:
    def test_files_hold_every_row(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        chosen = [case for case in ROWS if case.name.startswith(("rademacher", "smooth"))]
        rows = device.run(chosen, bench(), tmp_path, quick=True)
        found = json.loads((tmp_path / "device.json").read_text())
        assert [row["case"] for row in found["rows"]] == [case.name for case in chosen]
        assert all(row["roof_seconds"] > 0 and row["ours_seconds"] for row in found["rows"])
        text = (tmp_path / "device.txt").read_text()
        assert all(row.case.name in text for row in rows)
        assert "QUICK" in text
        assert capsys.readouterr().out == text

    def test_without_a_gpu_it_says_why_and_exits_2(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "--device", "cuda"],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert not done.stdout
        assert len(done.stderr.splitlines()) == 1
        assert "--device cuda needs a GPU: torch" in done.stderr

    def test_a_pattern_without_a_row_exits_2(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert device.main(["nothing*"], tmp_path, quick=True, predict=True, names_only=False) == 2
        assert "no case matches nothing*" in capsys.readouterr().err

    def test_the_readme_prints_what_the_command_predicts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert device.main(["*"], tmp_path, quick=False, predict=True, names_only=False) == 0
        printed = capsys.readouterr().out
        assert "Predicted, not measured" in printed
        assert printed in (ROOT / "benchmarks/README.md").read_text()


def test_cub_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cub.Unavailable, match="nvcc is missing"):
        cub.build((9, 0))


def test_cub_takes_rows_on_a_device_only() -> None:
    rivals = cub.kth_magnitude_rivals(torch.ones(2, 8), 1)
    assert [rival.call for rival in rivals] == [None, None]
