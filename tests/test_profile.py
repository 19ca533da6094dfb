"""Stages of a merge, and ``dcmerge profile``."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import msgspec
import pytest
import torch
from families import refused, run, tasks, tree
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity

import dcmerge_ext as dcm
from dcmerge_ext.checkpoints.config import MergeConfig
from dcmerge_ext.parallel import side_by_side
from dcmerge_ext.profiling import Profile, profile
from dcmerge_ext.profiling import rates as rates_module
from dcmerge_ext.profiling.rates import Rates
from dcmerge_ext.profiling.result import stage_costs
from dcmerge_ext.stages import WAIT, Event, Work, by_tensor, collect, stage, staged

CPU = torch.device("cpu")
DC_MERGE = {"plan", "other", "read", "digest", "norms", "merge", "truncated SVD", "whiten", "project", "elect",
            "back-project", "add to base", "write"}  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def family(folder: Path) -> tuple[Path, list[Path]]:
    base = families.toy()
    return families.write_model(folder / "base", base), [
        families.write_model(folder / f"task{i}", families.tuned(base, i)) for i in range(3)
    ]


def updates() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(48, 40, generator=generator) for _ in range(3)]


class TestStages:
    def test_nothing_is_made_while_nobody_looks(self) -> None:
        assert stage("a") is stage("b", 1.0, 2.0)

    def test_time_inside_is_taken_off(self) -> None:
        with collect(CPU) as collector, stage("outer"), stage("inner", 3.0, 4.0):
            torch.ones(100).sum()
        inner, outer = collector.events
        assert (inner.stage, outer.stage) == ("inner", "outer")
        assert inner.work == Work(3.0, 4.0)
        assert outer.exclusive == outer.duration - inner.duration >= 0
        assert inner.exclusive == inner.duration

    def test_an_error_closes_its_stage(self) -> None:
        with collect(CPU) as collector:
            with pytest.raises(ValueError, match="no"), stage("broken"):
                raise ValueError("no")
            with stage("after"):
                pass
        assert [(e.stage, e.exclusive == e.duration) for e in collector.events] == [("broken", True), ("after", True)]

    def test_work_is_asked_for_only_when_somebody_looks(self) -> None:
        asked = []

        @staged("twice", lambda x: asked.append(x) or Work(2.0))
        def twice(x: int) -> int:
            return 2 * x

        assert twice(3) == 6
        assert not asked
        with collect(CPU) as collector:
            assert twice(4) == 8
        assert asked == [4]
        assert collector.events[0].work == Work(2.0)

    def test_threads_take_the_stage_and_the_tensor_with_them(self) -> None:
        class Named:
            name = "w"

        def work(_: Named) -> None:
            with stage("split"):
                side_by_side(lambda i: torch.ones(10).sum(), range(4))

        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            with collect(CPU) as collector:
                by_tensor(work)(Named())
        finally:
            torch.set_num_threads(before)
        assert {e.tensor for e in collector.events} == {"w"}
        assert Counter(e.stage for e in collector.events) == {"split": 5, WAIT: 1, "other": 1}
        assert {e.threads for e in collector.events if e.stage == "split"} == {1, 2}

    def test_one_collector_a_process(self) -> None:
        with collect(CPU), pytest.raises(RuntimeError, match="already"), collect(CPU):
            pass
        assert stage("a") is stage("b")

    def test_torch_profiler_sees_the_same_names(self, one_thread: None) -> None:
        with collect(CPU) as collector:
            expected = dcm.methods.dc_merge(updates())
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
            merged = dcm.methods.dc_merge(updates())
        assert torch.equal(merged, expected)
        ours = Counter(e.stage for e in collector.events)
        assert {"truncated SVD", "whiten", "project", "elect", "back-project"} <= set(ours)
        theirs = Counter(e.name for e in seen.events() if e.is_user_annotation)
        assert theirs == ours

    def test_nvtx_ranges_and_waiting_for_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
        monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(f"push {name}"))
        monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
        with collect(torch.device("cuda")), stage("outer"), stage("inner"):
            pass
        assert calls == ["push outer", "push inner", "wait", "pop", "wait", "pop"]

    def test_flops_are_those_of_the_shapes(self, one_thread: None) -> None:
        with collect(CPU) as collector:
            dcm.truncated_svd(torch.stack(updates()), 5)
        found = [e for e in collector.events if e.stage == "truncated SVD"]
        # p q^2 + 4/3 q^3 + 2 q^2 r + 2 p q r, three times
        one = 48 * 40**2 + 4 / 3 * 40**3 + 2 * 40**2 * 5 + 2 * 48 * 40 * 5
        assert sum(e.work.flops for e in found) == pytest.approx(3 * one)


def test_rates_achieved() -> None:
    def event(name: str, seconds: float, work: Work, threads: int) -> Event:
        return Event(name, None, "t", 0, int(seconds * 1e9), int(seconds * 1e9), work, threads)

    rates = Rates(product=100.0, copy=40.0, read=10.0, write=5.0)
    costs = stage_costs(
        [
            event("whiten", 2.0, Work(flops=50.0), threads=1),
            event("write", 4.0, Work(bytes=10.0), threads=1),
            event("trim", 1.0, Work(bytes=20.0), threads=2),
            event(WAIT, 9.0, Work(), threads=2),
        ],
        2,
        rates,
    )
    assert [(c.stage, c.seconds, c.machine_seconds) for c in costs] == [
        ("write", 4.0, 2.0), ("whiten", 2.0, 1.0), ("trim", 1.0, 1.0)
    ]  # fmt: skip
    assert [(c.achieved.product, c.achieved.bytes) for c in costs] == [(None, 0.5), (0.5, None), (None, 0.5)]


class TestCommand:
    @pytest.fixture(autouse=True)
    def small_measurements(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the machine can do takes a second to measure, and does not matter here."""
        for name, size in (("_SIDE", 64), ("_COPIED", 1 << 16), ("_FILE", 1 << 20)):
            monkeypatch.setattr(rates_module, name, size)

    def arguments(self, folder: Path) -> list[str | Path]:
        base, models = family(folder)
        return ["--base", base, *tasks(*models)]

    def reports(
        self, capsys: pytest.CaptureFixture[str], folder: Path, *more: str
    ) -> tuple[Profile, dict[str, Any], str]:
        result = run(capsys, "profile", *self.arguments(folder), "--out", folder / "merged", *more,
                     "--json", folder / "p.json", "--trace", folder / "t.json")  # fmt: skip
        assert result.status == 0, result.err
        found = msgspec.json.decode((folder / "p.json").read_bytes(), type=Profile, strict=True)
        return found, json.loads((folder / "t.json").read_text()), result.out

    def test_one_thread_adds_up_to_the_wall_time(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        found, _, printed = self.reports(capsys, tmp_path)
        assert found.schema == 1
        assert (found.method, found.threads) == ("dc_merge", 1)
        assert {c.stage for c in found.stages} == DC_MERGE
        total = sum(c.seconds for c in found.stages)
        assert total <= found.seconds
        assert total == pytest.approx(sum(c.machine_seconds for c in found.stages))
        assert found.idle == pytest.approx(found.seconds - total)
        assert all(c.seconds >= 0 and c.calls > 0 for c in found.stages)
        for name in DC_MERGE:
            assert f" {name} " in printed

    def test_tensors_add_up_to_what_belongs_to_them(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        found, trace, _ = self.reports(capsys, tmp_path)
        for tensor in found.tensors:
            assert tensor.machine_seconds == pytest.approx(sum(tensor.stages.values()))
        models = ["--base", tmp_path / "base", *tasks(*(tmp_path / f"task{i}" for i in range(3)))]
        assert run(capsys, "merge", *models, "--out", tmp_path / "merged").status == 0
        record = json.loads((tmp_path / "merged" / "dcmerge.json").read_text())
        assert {t.name: t.action for t in found.tensors} == {t["name"]: t["action"] for t in record["tensors"]}
        assert sum(t.machine_seconds for t in found.tensors) <= sum(c.machine_seconds for c in found.stages) * (
            1 + 1e-9
        )
        written = next(c for c in found.stages if c.stage == "write")
        assert written.bytes == sum(e["args"]["bytes"] for e in trace["traceEvents"] if e["name"] == "write")

    def test_a_trace_nests_on_every_thread(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            found, trace, _ = self.reports(capsys, tmp_path)
        finally:
            torch.set_num_threads(before)
        tracks = defaultdict(list)
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                tracks[event["tid"]].append(event)
        named = {e["tid"] for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
        assert named == set(tracks)
        assert len(tracks) > 1
        assert {e["name"] for events in tracks.values() for e in events} - {WAIT} == {c.stage for c in found.stages}
        for events in tracks.values():
            open_until: list[float] = []
            for event in events:  # in the order of their starts
                start, end = event["ts"], event["ts"] + event["dur"]
                while open_until and start >= open_until[-1] - 1e-3:
                    open_until.pop()
                assert not open_until or end <= open_until[-1] + 1e-3  # a nanosecond, in microseconds
                open_until.append(end)

    @pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
    def test_elementwise_methods(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str) -> None:
        found, _, _ = self.reports(capsys, tmp_path, "--method", method)
        names = {c.stage for c in found.stages}
        assert {"plan", "read", "merge", "write", "digest"} <= names
        assert names & {"survey", "trim", "elect"} == ({"survey", "trim", "elect"} if method == "ties" else set())

    def test_adapters(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        adapters = [families.write_adapter(tmp_path / f"a{i}", families.toy(), seed=i) for i in range(2)]
        result = run(capsys, "profile", *tasks(*adapters), "--out", tmp_path / "merged", "--json", tmp_path / "p.json")
        assert result.status == 0, result.err
        found = msgspec.json.decode((tmp_path / "p.json").read_bytes(), type=Profile)
        assert found.save_as == "adapter"
        assert {t.name for t in found.tensors} == {"layers.0.attn.weight", "layers.1.attn.weight"}
        assert {"read", "whiten", "project", "elect", "back-project", "write"} <= {c.stage for c in found.stages}
        # A (2, 8) and B (12, 2) of two modules of two tasks, in float32
        assert next(c for c in found.stages if c.stage == "read").bytes == 2 * 2 * 4 * (2 * 8 + 12 * 2)

    def test_nothing_but_the_reports_is_left(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        arguments = self.arguments(tmp_path)
        before = tree(tmp_path)
        result = run(capsys, "profile", *arguments, "--out", tmp_path / "merged", "--picture", tmp_path / "p.svg")
        assert result.status == 0, result.err
        picture = (tmp_path / "p.svg").read_text()
        assert picture.startswith("<svg")
        assert "truncated SVD" in picture
        assert "<image" not in picture
        (tmp_path / "p.svg").unlink()
        assert tree(tmp_path) == before

    def test_the_output_may_be_left_out(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(scratch))
        arguments = self.arguments(tmp_path / "models")
        result = run(capsys, "profile", *arguments)
        assert result.status == 0, result.err
        assert tree(scratch) == {}
        config = tmp_path / "merge.yaml"
        config.write_text(f"out: {tmp_path / 'elsewhere' / 'merged'}\n")
        assert run(capsys, "profile", *arguments, "--config", config).status == 0
        assert not (tmp_path / "elsewhere").exists()

    def test_quiet(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        result = run(capsys, "profile", *self.arguments(tmp_path), "--out", tmp_path / "merged", "-q")
        assert (result.status, result.out, result.err) == (0, "", "")

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (["--method", "dcmerge"], ["dcmerge", "dc_merge"]),
            (["--set", "rank=0"], ["rank"]),
            (["--task", "nowhere"], ["nowhere"]),
            (["--json", "{folder}"], ["is a directory"]),
            (["--trace", "{folder}/base/config.json"], ["exists already"]),
        ],
    )
    def test_refused_as_a_merge(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, more: list[str], says: list[str]
    ) -> None:
        arguments = self.arguments(tmp_path)
        (tmp_path / "base" / "config.json").write_text("{}")
        filled = [text.format(folder=tmp_path) for text in more]
        refused(capsys, tmp_path, *arguments, "--out", tmp_path / "merged", *filled, says=says, command="profile")

    def test_bad_data_leaves_nothing(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        arguments = self.arguments(tmp_path)
        task = Path(str(arguments[3]))
        file = next(task.glob("*.safetensors"))
        model = load_file(file)
        model["layers.0.attn.weight"][0, 0] = torch.nan
        save_file(model, file)
        refused(capsys, tmp_path, *arguments, "--out", tmp_path / "merged",
                says=["layers.0.attn.weight", "NaN"], command="profile")  # fmt: skip
        assert stage("a") is stage("b"), "the collector is gone"

    def test_from_python(self, tmp_path: Path) -> None:
        base, models = family(tmp_path)
        found, events = profile(MergeConfig(base=str(base), tasks=[str(m) for m in models], out=str(tmp_path / "m")))
        assert found.tasks == len(models)
        assert sum(c.calls for c in found.stages) == sum(e.stage != WAIT for e in events)
        assert found.rates.product > 1e6
        assert min(found.rates.copy, found.rates.read, found.rates.write) > 1e6
        found.save_json(tmp_path / "p.json")
        assert msgspec.json.decode((tmp_path / "p.json").read_bytes(), type=Profile) == found
